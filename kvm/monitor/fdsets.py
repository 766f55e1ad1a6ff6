"""Sets of descriptors that clients pass in, to be opened as files by number: /dev/fdset/N (qmp.md §13).

    add-fd ─▶ set N: descriptor, descriptor, …  ─▶ open("/dev/fdset/N", flags): a duplicate of the one that fits

A set is there while it has a descriptor.  It belongs to the program, not to a monitor, and outlives every client.

Threads   `open_path` any; the rest the loop's.
"""

from __future__ import annotations

import fcntl
import os
import re
import threading
from dataclasses import dataclass
from typing import Any

from qemumig.commands.command import INT, STR, Argument, Command, CommandError, ListOf, Struct
from qemumig.errors import ChannelError

from ..keyval import UsageError
from .session import current_session

PREFIX = "/dev/fdset/"
NUMBER = re.compile(r"[0-9]{1,18}")
MAX_DESCRIPTORS = 256  # in all sets together
MATTERS = os.O_ACCMODE | os.O_DIRECT  # what a descriptor must have in common with the flags of an open

_IDS = Struct(Argument("fdset-id", INT), Argument("fd", INT))
_FDS = ListOf(Struct(Argument("fd", INT), Argument("opaque", STR, optional=True)))


@dataclass
class Member:
    """A descriptor, and what its owner wants to be reminded of."""

    descriptor: int
    opaque: str | None

    def describe(self) -> dict[str, Any]:
        return {"fd": self.descriptor} | ({} if self.opaque is None else {"opaque": self.opaque})


class FdSets:
    """All sets of one program."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sets: dict[int, list[Member]] = {}

    def add(self, descriptor: int, set_id: int | None = None, opaque: str | None = None) -> dict[str, int]:
        """Put *descriptor*, which belongs here from now on, into a set; the lowest free one unless *set_id* says which."""
        try:
            with self._lock:
                if set_id is not None and set_id < 0:
                    raise CommandError("Parameter 'fdset-id' expects a non-negative value")
                if sum(map(len, self._sets.values())) >= MAX_DESCRIPTORS:
                    raise CommandError(f"The fd sets hold {MAX_DESCRIPTORS} file descriptors already, no more are taken")
                if set_id is None:
                    set_id = next(number for number in range(len(self._sets) + 1) if number not in self._sets)
                self._sets.setdefault(set_id, []).append(Member(descriptor, opaque))
        except CommandError:
            os.close(descriptor)
            raise
        return {"fdset-id": set_id, "fd": descriptor}

    def inherit(self, descriptor: int, set_id: int, opaque: str | None) -> None:
        """What -add-fd does: a descriptor that the program was started with; UsageError."""
        option = f"-add-fd fd={descriptor},set={set_id}"
        try:
            if fcntl.fcntl(descriptor, fcntl.F_GETFD) & fcntl.FD_CLOEXEC:
                raise UsageError("fd is not valid or already in use").during(option)
            ours = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 3)
        except OSError:
            raise UsageError("fd is not valid or already in use").during(option) from None
        os.close(descriptor)
        self.add(ours, set_id, opaque)

    def remove(self, set_id: int, descriptor: int | None = None) -> None:
        """Close *descriptor* of a set, or all of them; CommandError when there is none."""
        with self._lock:
            members = self._sets.get(set_id, [])
            going = [member for member in members if descriptor in (None, member.descriptor)]
            if not going:
                which = f"fdset-id:{set_id}" if descriptor is None else f"fdset-id:{set_id}, fd:{descriptor}"
                raise CommandError(f"File descriptor named '{which}' not found")
            for member in going:
                os.close(member.descriptor)
            self._sets[set_id] = [member for member in members if member not in going]
            if not self._sets[set_id]:
                del self._sets[set_id]

    def describe(self) -> list[dict[str, Any]]:
        """What query-fdsets shows, the highest number first."""
        with self._lock:
            return [
                {"fdset-id": set_id, "fds": [member.describe() for member in self._sets[set_id]]}
                for set_id in sorted(self._sets, reverse=True)
            ]

    def open_path(self, path: str, flags: int) -> int | None:
        """A duplicate of the descriptor that /dev/fdset/N means when opened with *flags*; None for another kind of path.

        Raises ChannelError when there is no such set, or it has none that fits.
        """
        if not path.startswith(PREFIX):
            return None
        number = path.removeprefix(PREFIX)
        if not NUMBER.fullmatch(number):
            raise ChannelError(f"Could not parse fdset {path}", channel=path)
        with self._lock:
            members = self._sets.get(int(number))
            if members is None:
                raise ChannelError(f"Failed to find fdset {path}", channel=path)
            for member in members:
                if not (fcntl.fcntl(member.descriptor, fcntl.F_GETFL) ^ flags) & MATTERS:
                    return fcntl.fcntl(member.descriptor, fcntl.F_DUPFD_CLOEXEC, 3)
        shown = flags & ~os.O_CLOEXEC
        raise ChannelError(f"Failed to find file descriptor with matching flags=0x{shown:x}", channel=path)

    def close(self) -> None:
        """Close every descriptor."""
        for entry in self.describe():
            self.remove(entry["fdset-id"])

    def commands(self) -> list[Command]:
        """What a monitor may do with the sets."""
        set_id, fd = Argument("fdset-id", INT), Argument("fd", INT, optional=True)
        new = (Argument("fdset-id", INT, optional=True), Argument("opaque", STR, optional=True))
        shown = ListOf(Struct(Argument("fdset-id", INT), Argument("fds", _FDS)))
        return [
            Command("add-fd", self._add_from_client, new, returns=_IDS),
            Command("remove-fd", lambda fdset_id, fd=None: self.remove(fdset_id, fd), (set_id, fd)),
            Command("query-fdsets", self.describe, returns=shown),
        ]

    def _add_from_client(self, fdset_id: int | None = None, opaque: str | None = None) -> dict[str, int]:
        return self.add(current_session.get().take_loose_descriptor(), fdset_id, opaque)
