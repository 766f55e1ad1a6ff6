"""A file as the other side (channels.md §6): bytes before the offset are kept, the rest is written anew."""

from __future__ import annotations

import os
import stat

from ..errors import ChannelError
from .address import FileAddress
from .channel import Channel


def open_outgoing_file(address: FileAddress, quit_fd: int) -> Channel:
    """Create or cut the file at the offset; ChannelError when that fails."""
    return _open(address, os.O_WRONLY | os.O_CREAT, quit_fd, "create")


def open_incoming_file(address: FileAddress, quit_fd: int) -> Channel:
    """Open the file for reading from the offset on; ChannelError when that fails."""
    return _open(address, os.O_RDONLY, quit_fd, "open")


def _open(address: FileAddress, flags: int, quit_fd: int, verb: str) -> Channel:
    try:
        fd = os.open(address.path, flags | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
    except OSError as error:
        text = f"Could not {verb} '{address.path}': {os.strerror(error.errno or 0)}"
        raise ChannelError(text, channel=address.path, errno=error.errno) from error
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
