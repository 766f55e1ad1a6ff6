"""RAM blocks over anonymous memory, and channels over a socket pair: what tests of RAM need."""

from __future__ import annotations

import ctypes
import mmap
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from qemumig.channels.channel import QuitEvent, SocketChannel
from qemumig.ram.block import RAMBlock


class Memory:
    """Anonymous memory of *size* bytes as a RAMBlock; *block* says more about that."""

    def __init__(self, idstr: str, size: int, *, fresh: bool = True, flags: int = mmap.MAP_SHARED, **block: Any) -> None:
        self.map = mmap.mmap(-1, size, flags=flags)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        self.block = RAMBlock(idstr, self._address, size, fresh=fresh, owner=self, **block)

    def read(self, offset: int, length: int) -> bytes:
        return self.map[offset : offset + length]

    def write(self, offset: int, data: bytes) -> None:
        self.map[offset : offset + len(data)] = data

    def contents(self) -> bytes:
        return self.map[:]


class QuietLog:
    """A dirty log of a guest that writes nothing."""

    manual_clear = False

    def start(self) -> None: ...
    def fetch(self, block: RAMBlock, words: memoryview) -> None: ...
    def clear(self, block: RAMBlock, first_page: int, page_count: int) -> None: ...
    def stop(self) -> None: ...


@contextmanager
def channel_pair() -> Iterator[tuple[SocketChannel, SocketChannel]]:
    """Two connected channels over a unix socket pair, with a quit event each; closed at the end."""
    events = QuitEvent(), QuitEvent()
    channels = [
        SocketChannel(name, sock, event.fd)
        for name, sock, event in zip(("left", "right"), socket.socketpair(), events, strict=True)
    ]
    try:
        yield channels[0], channels[1]
    finally:
        for channel, event in zip(channels, events, strict=True):
            channel.close()
            event.close()
