"""What every target watches: the kind of an error, the pages around a block, and what is left when it is over."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import re
import threading
from collections.abc import Callable
from typing import Any

from qemumig.errors import StreamError
from qemumig.ram.block import RAMBlock

PAGE = 4096
TAKEN, REFUSED = "taken", "refused"
PATTERN = b"\xa5" * PAGE
PLACE = re.compile(r"at offset 0x[0-9a-f]+|multifd channels? ")

_PROCESS = ctypes.CDLL(None)
_poison = getattr(_PROCESS, "__asan_poison_memory_region", None)
"""In a sanitized process: makes every access to a range a finding of its own, with its place."""


def is_sanitized() -> bool:
    """Whether AddressSanitizer watches this process."""
    return _poison is not None


class Fault(Exception):
    """The code under test did what it must not."""


def outcome_of(load: Callable[[], object]) -> str:
    """Whether *load* took its input or refused it, which must be a StreamError that says where: an offset, or a channel."""
    try:
        load()
    except StreamError as error:
        if error.offset is None and not PLACE.search(str(error)):
            raise Fault(f"a refusal without a place: {error}") from error
        return REFUSED
    return TAKEN


class Guarded:
    """Memory of *pages* pages for one block after the other, between two pages that nobody may touch."""

    def __init__(self, pages: int) -> None:
        self.size = pages * PAGE
        self._map = mmap.mmap(-1, self.size + 2 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self.address = start + PAGE
        self._guards = [slice(0, PAGE), slice(PAGE + self.size, None)]
        for guard in self._guards:
            self._map[guard] = PATTERN
        if _poison is not None:
            for place in (start, self.address + self.size):
                _poison(ctypes.c_void_p(place), ctypes.c_size_t(PAGE))

    def block(self, idstr: str, *, filled: int = 0, **more: Any) -> RAMBlock:
        """The memory as a block, each byte *filled*; fresh if that is 0."""
        ctypes.memset(self.address, filled, self.size)
        used = more.pop("used_length", self.size)
        return RAMBlock(idstr, self.address, used, fresh=filled == 0, owner=self, **more)

    def forget(self) -> None:
        """Give the memory back to the kernel: all of it is missing."""
        self._map.madvise(mmap.MADV_DONTNEED, PAGE, self.size)

    def contents(self) -> memoryview:
        """What the memory holds now, and from now on."""
        return memoryview(self._map)[PAGE : PAGE + self.size]

    def compare(self, plain: bytearray, name: str) -> None:
        """Fault when the memory is not *plain*, which is what an independent reader makes of it."""
        here = self.contents()
        if plain != here:
            page = next(n for n in range(0, self.size, PAGE) if plain[n : n + PAGE] != here[n : n + PAGE]) // PAGE
            raise Fault(f"page {page} of block {name!r} is not what the input says")

    def check(self) -> None:
        """Fault when a page beside the memory was written to."""
        if _poison is None and any(self._map[guard] != PATTERN for guard in self._guards):
            raise Fault("a page beside the block was written to")


class Leftovers:
    """The threads and descriptors there are; `check` compares with a later moment."""

    def __init__(self) -> None:
        self._threads, self._files = self._list()

    @staticmethod
    def _list() -> tuple[list[str], list[str]]:
        files = [os.readlink(entry) for entry in _existing("/proc/self/fd")]
        return [thread.name for thread in threading.enumerate()], files

    def check(self) -> None:
        gc.collect()  # what an error holds in a circle is not left behind
        threads, files = self._list()
        if len(threads) > len(self._threads):
            raise Fault(f"threads left behind, of {threads}")
        if len(files) > len(self._files):
            raise Fault(f"descriptors left behind, of {files}; at first there were {self._files}")


def _existing(folder: str) -> list[str]:
    """What is still there of *folder* when it has been listed: not the descriptor that listed it."""
    return [path for name in os.listdir(folder) if os.path.lexists(path := f"{folder}/{name}")]
