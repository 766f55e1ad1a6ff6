"""The program as a process: pid file, life in the background, with its parent, as another user (cli.md §7)."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import pwd
import re
import signal

from .arguments import RunWith
from .chardev import reason
from .keyval import UsageError

READY = b"0"
PR_SET_PDEATHSIG = 1

_libc = ctypes.CDLL(None, use_errno=True)


class PidFile:
    """A file that holds our process id, locked as long as we live."""

    def __init__(self, path: str) -> None:
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise UsageError(f"cannot create PID file: Could not create '{path}': {reason(error)}") from error
        self._path = os.path.abspath(path)
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(self._descriptor, 0)
            os.write(self._descriptor, b"%d\n" % os.getpid())
        except OSError as error:
            os.close(self._descriptor)
            raise UsageError(f"cannot create PID file: '{path}' is in use: {reason(error)}") from error

    def close(self) -> None:
        """Remove the file, if it is still ours."""
        with contextlib.suppress(OSError):
            ours, found = os.fstat(self._descriptor), os.stat(self._path)
            if (ours.st_dev, ours.st_ino) == (found.st_dev, found.st_ino):
                os.unlink(self._path)
        os.close(self._descriptor)


class Background:
    """The child that goes on in the background; the parent waits until it is `ready`, or has failed."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    @classmethod
    def enter(cls) -> Background | int:
        """Fork: the child gets its Background, the parent the exit status to end with.  No thread may exist yet."""
        reader, writer = os.pipe()
        if os.fork():
            os.close(writer)
            with os.fdopen(reader, "rb") as pipe:
                return 0 if pipe.read(1) == READY else 1
        os.close(reader)
        os.setsid()
        return cls(writer)

    def ready(self) -> None:
        """Let go of the terminal and the folder, and let the parent end."""
        null = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(null, standard)
        os.close(null)
        os.chdir("/")
        os.write(self._descriptor, READY)
        os.close(self._descriptor)


def end_with_parent() -> None:
    """Have the kernel end us, as a signal from outside would, when our parent ends."""
    parent = os.getppid()
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:  # it ended before we asked
        os.kill(os.getpid(), signal.SIGTERM)


def confine(run_with: RunWith) -> None:
    """Change the root folder and the user for good; UsageError when the system does not let us."""
    identity = None if run_with.user is None else _identity(run_with.user)
    if run_with.chroot is not None:
        try:
            os.chroot(run_with.chroot)
            os.chdir("/")
        except OSError as error:
            raise UsageError(f"chroot failed: '{run_with.chroot}': {reason(error)}") from error
    if identity is None:
        return
    user, group, name = identity
    try:
        os.setgid(group)
        if name:
            os.initgroups(name, group)
        else:
            os.setgroups([group])
        os.setuid(user)
    except OSError as error:
        raise UsageError(f"cannot become user '{run_with.user}': {reason(error)}") from error


def _identity(user: str) -> tuple[int, int, str]:
    """User and group number, and the name if *user* is one; it may be UID:GID instead."""
    numbers = re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", user)
    if numbers:
        return int(numbers[1]), int(numbers[2]), ""
    try:
        entry = pwd.getpwnam(user)
    except KeyError:
        raise UsageError(f'User "{user}" doesn\'t exist (and is not <uid>:<gid>)') from None
    return entry.pw_uid, entry.pw_gid, user
