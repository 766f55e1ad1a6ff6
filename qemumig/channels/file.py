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


class FileChannel(Channel):
    """A file, open for one direction; more descriptors of it can be had, each with a position of its own."""

    def __init__(self, path: str, fd: int, mode: int, quit_fd: int, open_path: OpenPath) -> None:
        super().__init__("file", path, fd, fd, quit_fd, can_return=False)
        self._mode = mode
        self._open_path = open_path

    def open_again(self, flags: int = 0) -> int:
        """Another descriptor for the same direction, opened with *flags* as well; it belongs to the caller."""
        return _descriptor(self.name, self._mode | flags, "open", self._open_path)


def _descriptor(path: str, flags: int, verb: str, open_path: OpenPath) -> int:
    """Open *path*, or take a descriptor out of the set that it means; ChannelError when that fails."""
    try:
        fd = open_path(path, flags)
        return os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK, 0o600) if fd is None else fd
    except (OSError, ValueError) as error:  # a path with a zero byte never gets as far as the kernel
        number = getattr(error, "errno", None)
        text = f"Could not {verb} '{path}': {os.strerror(number) if number else error}"
        raise ChannelError(text, channel=path, errno=number) from error


def _has_length(fd: int, length: int) -> bool:
    found = os.fstat(fd)
    return stat.S_ISREG(found.st_mode) and found.st_size == length


def _open(address: FileAddress, flags: int, quit_fd: int, verb: str, open_path: OpenPath) -> FileChannel:
    fd = _descriptor(address.path, flags, verb, open_path)
    try:
        # a file that was cut is written to the disk when it is closed (ext4), so none is that has the length already
        if flags & os.O_WRONLY and not _has_length(fd, address.offset):
            os.ftruncate(fd, address.offset)
        os.lseek(fd, address.offset, os.SEEK_SET)
    except OSError as error:
        os.close(fd)
        text = f"Could not go to offset {address.offset} of '{address.path}': {os.strerror(error.errno or 0)}"
        raise ChannelError(text, channel=address.path, errno=error.errno) from error
    channel = FileChannel(address.path, fd, flags & os.O_ACCMODE, quit_fd, open_path)
    channel.stored = stat.S_ISREG(os.fstat(fd).st_mode)
    return channel
