"""A file as the other side (channels.md §6): bytes before the offset are kept, the rest is written anew.

A path may mean a set of descriptors that a monitor client passed in (`/dev/fdset/N`); who keeps those opens it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable

from ..errors import ChannelError
from .address import FileAddress
from .channel import Channel

OpenPath = Callable[[str, int], int | None]
"""Path and open(2) flags → a descriptor of our own; None when the path is an ordinary one."""


def no_path(path: str, flags: int) -> int | None:
    """An opener that knows no special paths."""
    return None


def open_outgoing_file(address: FileAddress, quit_fd: int, open_path: OpenPath = no_path) -> Channel:
    """Create or cut the file at the offset; ChannelError when that fails."""
    return _open(address, os.O_WRONLY | os.O_CREAT, quit_fd, "create", open_path)


def open_incoming_file(address: FileAddress, quit_fd: int, open_path: OpenPath = no_path) -> Channel:
    """Open the file for reading from the offset on; ChannelError when that fails."""
    return _open(address, os.O_RDONLY, quit_fd, "open", open_path)


def _open(address: FileAddress, flags: int, quit_fd: int, verb: str, open_path: OpenPath) -> Channel:
    fd = open_path(address.path, flags)
    try:
        if fd is None:
            fd = os.open(address.path, flags | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
    except (OSError, ValueError) as error:  # a path with a zero byte never gets as far as the kernel
        number = getattr(error, "errno", None)
        text = f"Could not {verb} '{address.path}': {os.strerror(number) if number else error}"
        raise ChannelError(text, channel=address.path, errno=number) from error
    try:
        if flags & os.O_WRONLY:
            os.ftruncate(fd, address.offset)
        os.lseek(fd, address.offset, os.SEEK_SET)
    except OSError as error:
        os.close(fd)
        text = f"Could not go to offset {address.offset} of '{address.path}': {os.strerror(error.errno or 0)}"
        raise ChannelError(text, channel=address.path, errno=error.errno) from error
    channel = Channel("file", address.path, fd, fd, quit_fd, can_return=False)
    channel.stored = stat.S_ISREG(os.fstat(fd).st_mode)
    return channel
