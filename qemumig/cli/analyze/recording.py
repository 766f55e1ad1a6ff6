"""A recorded stream in memory it does not take: the file is mapped, and a pipe becomes a file first.

In    a file name, or `-` for standard input
Out   its bytes as a map, and a bounded cursor over any part of them
"""

from __future__ import annotations

import mmap
import os
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import BinaryIO

from ...errors import StreamError
from ...savevm.reader import Reader

SPOOL_PIECE = 1 << 20


class Recording:
    """The bytes of a file, mapped for reading; *name* is for people."""

    def __init__(self, name: str, file: BinaryIO) -> None:
        self.name = name
        self.size = os.fstat(file.fileno()).st_size
        self.status = os.fstat(file.fileno())
        self.data: bytes | mmap.mmap = b""
        if self.size:
            self.data = mmap.mmap(file.fileno(), self.size, access=mmap.ACCESS_READ)

    def let_go(self) -> None:
        """Drop what reading has brought into this process: the file keeps it, and a touch brings it back."""
        if isinstance(self.data, mmap.mmap):
            self.data.madvise(mmap.MADV_DONTNEED)


@contextmanager
def open_recording(name: str, look_round: Callable[[int, int | None], None]) -> Iterator[Recording]:
    """The recording in the file *name*; `-` and everything that cannot be mapped is spooled to a temporary file.

    *look_round* is told how many bytes have been spooled.  Raises OSError.
    """
    source = os.dup(sys.stdin.fileno()) if name == "-" else os.open(name, os.O_RDONLY | os.O_CLOEXEC)
    with os.fdopen(source, "rb") as file:
        if stat.S_ISREG(os.fstat(source).st_mode) and name != "-":
            yield Recording(name, file)
            return
        with tempfile.TemporaryFile(prefix="qemumig-analyze-") as spool:
            _spool(file, spool, look_round)
            yield Recording("standard input" if name == "-" else name, spool)


def _spool(source: BinaryIO, spool: BinaryIO, look_round: Callable[[int, int | None], None]) -> None:
    count = 0
    while piece := source.read(SPOOL_PIECE):
        spool.write(piece)
        count += len(piece)
        look_round(count, None)
    spool.flush()


class MappedReader(Reader):
    """A Reader (savevm/reader.py) over bytes *start* to *end* of a map; offsets are those of the file."""

    def __init__(self, data: bytes | mmap.mmap, start: int, end: int) -> None:
        self.data = data
        self._offset = start
        self.end = end

    @property
    def offset(self) -> int:
        return self._offset

    @property
    def remaining(self) -> int:
        """Bytes not consumed yet."""
        return self.end - self.offset

    def seek(self, offset: int) -> None:
        """Go on at *offset*, which lies inside."""
        if not 0 <= offset <= self.end:
            raise ValueError(f"offset {offset:#x} lies behind the end, {self.end:#x}")
        self._offset = offset

    def read(self, length: int, what: str = "a field") -> bytes:
        if length > self.remaining:
            raise StreamError(
                f"stream ends inside {what} at offset {self.offset:#x}: {self.remaining} bytes left, {length} expected",
                offset=self.offset,
            )
        start = self._offset
        self._offset += length
        return self.data[start : self.offset]

    def peek(self, length: int) -> bytes:
        return self.data[self.offset : min(self.offset + length, self.end)]
