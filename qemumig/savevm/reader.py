"""Where state is read from: one bounded cursor, over a stream or over bytes in memory.

In    a compiled `qemumig.wire.stream.InputStream`, or the bytes of a package (BytesReader)
Out   exact reads: all the bytes asked for, or a StreamError that names the offset

Peeking never consumes.  It exists for subsections alone, which are recognised by looking ahead (vmstate.md §3).
"""

from __future__ import annotations

from typing import Protocol

from ..errors import StreamError


class Reader(Protocol):
    """A byte stream as this room sees it; every number is big-endian (stream.md §1).

    Readers in Python inherit the numbers, the compiled one has its own.
    """

    @property
    def offset(self) -> int:
        """Bytes consumed so far."""

    def read(self, length: int, what: str = "a field") -> bytes:
        """Exactly *length* bytes; StreamError when the stream ends before, naming *what* was being read."""

    def peek(self, length: int) -> bytes:
        """Up to *length* bytes (at most 4096) without consuming them; fewer only at the end of the stream."""

    def read_u8(self, what: str = "a field") -> int:
        return self.read(1, what)[0]

    def read_be16(self, what: str = "a field") -> int:
        return int.from_bytes(self.read(2, what), "big")

    def read_be32(self, what: str = "a field") -> int:
        return int.from_bytes(self.read(4, what), "big")

    def read_be64(self, what: str = "a field") -> int:
        return int.from_bytes(self.read(8, what), "big")


class BytesReader(Reader):
    """A Reader over *data*; *base_offset* is where in the whole stream its first byte lies."""

    def __init__(self, data: bytes | bytearray | memoryview, base_offset: int = 0) -> None:
        self._data = bytes(data)
        self._position = 0
        self._base_offset = base_offset

    @property
    def offset(self) -> int:
        return self._base_offset + self._position

    @property
    def remaining(self) -> int:
        """Bytes not consumed yet."""
        return len(self._data) - self._position

    def read(self, length: int, what: str = "a field") -> bytes:
        if length < 0:
            raise ValueError(f"cannot read {length} bytes")
        if length > self.remaining:
            raise StreamError(
                f"stream ends inside {what} at offset {self.offset:#x}: {self.remaining} bytes left, {length} expected",
                offset=self.offset,
            )
        start = self._position
        self._position += length
        return self._data[start : self._position]

    def peek(self, length: int) -> bytes:
        return self._data[self._position : self._position + length]


def read_counted_string(reader: Reader, what: str) -> str:
    """A string behind its length byte (stream.md §1).

    Raises StreamError when it is not UTF-8: every name QEMU puts on the wire is plain text.
    """
    place = reader.offset
    data = reader.read(reader.read_u8(what), what)
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise StreamError(f"{what} at offset {place:#x} is {data!r}, expected UTF-8 text", offset=place) from None


def counted_string(text: str) -> bytes:
    """*text* behind its length byte; ValueError when it is longer than 255 bytes."""
    data = text.encode()
    if len(data) > 255:
        raise ValueError(f"{text!r} is {len(data)} bytes long, a counted string holds 255")
    return bytes([len(data)]) + data
