"""The guest that touches its memory at random (toucher.S): its image, and what it says of itself.

It counts its touches by how many cycles each took, in buckets a sixteenth of an octave wide.  Every page is touched once
before any is touched again, so the words that it counts in differ by one at the most: a page that was lost, or came twice,
shows.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qemumig.cli.guest import IMAGE_SIZE, PAGE_SIZE
from qemumig.cli.vmm import Vmm, VmmError

CODE = Path(__file__).with_name("toucher.bin")
PARAMETERS_AT = 8
RESET_VECTOR = b"\xea\x00\x00\x00\xf0"  # jmp 0xF000:0, where the code is
BASE = 16 << 20  # below it: the guest's own tables
STATUS, HISTOGRAM, BUCKETS = 0x1000, 0x2000, 512
FIRST_OCTAVE, BUCKET_BITS = 10, 4
CALIBRATION_S = 0.5


def image(memory: int, cycles_a_letter: int) -> bytes:
    """The firmware, for a machine with *memory* bytes."""
    pages = (memory - BASE) // PAGE_SIZE
    bits = (pages - 1).bit_length()
    code = bytearray(CODE.read_bytes())
    struct.pack_into("<5Q", code, PARAMETERS_AT, BASE, pages, (1 << bits) - 1, (bits + 1) // 2, cycles_a_letter)
    return bytes(code).ljust(IMAGE_SIZE - 16, b"\0") + RESET_VECTOR.ljust(16, b"\0")


@dataclass(frozen=True)
class Touches:
    """What the guest had counted at one moment."""

    count: int
    cycles: int  # the time stamp of the last one
    buckets: tuple[int, ...]

    def since(self, before: Touches) -> list[int]:
        """Buckets of what came after *before*."""
        return [b - a for a, b in zip(before.buckets, self.buckets, strict=True)]


def touches(vmm: Vmm) -> Touches:
    """Read out of guest memory."""
    data = bytearray()
    vmm.save_memory(STATUS, PAGE_SIZE + BUCKETS * 8, data.extend)
    count, _, cycles, _ = struct.unpack_from("<4Q", data)
    return Touches(count, cycles, struct.unpack_from(f"<{BUCKETS}Q", data, HISTOGRAM - STATUS))


def cycles_a_second(vmm: Vmm) -> float:
    """How fast the guest's time stamp counter counts."""
    first, start = touches(vmm).cycles, time.monotonic()
    time.sleep(CALIBRATION_S)
    return (touches(vmm).cycles - first) / (time.monotonic() - start)


def longest(buckets: list[int], count: int) -> list[int]:
    """Of the *count* longest touches, how many fell into each bucket."""
    kept = [0] * len(buckets)
    for index in reversed(range(len(buckets))):
        kept[index] = min(buckets[index], count)
        count -= kept[index]
    return kept


def percentile(buckets: list[int], share: float) -> float:
    """Cycles within which *share* of the touches fell: the middle of their bucket."""
    wanted, seen = share * sum(buckets), 0
    for index, count in enumerate(buckets):
        seen += count
        if count and seen >= wanted:
            octave, part = divmod(index, 1 << BUCKET_BITS)
            return (1 << (FIRST_OCTAVE + octave)) * (1 + (part + 0.5) / (1 << BUCKET_BITS))
    return 0.0


def check(vmm: Vmm, memory: int) -> None:
    """The guest, which is stopped, has lost no touch; VmmError tells of the first page that has."""
    words: list[int] = []
    vmm.save_memory(BASE, memory - BASE, _first_words(words))
    least = min(words)
    wrong = next((index for index, word in enumerate(words) if word > least + 1), None)
    if wrong is not None:
        raise VmmError(f"page {BASE + wrong * PAGE_SIZE:#x} was touched {words[wrong]} times, another one {least} times")
    counted = touches(vmm).count
    if not 0 <= sum(words) - counted <= 1:  # it may have been stopped between a touch and its count
        raise VmmError(f"the guest has touched {counted} pages, and its memory knows of {sum(words)}")


def _first_words(words: list[int]) -> Callable[[memoryview], None]:
    """Takes memory piece by piece, and keeps the first word of each page."""
    rest = bytearray()

    def take(piece: memoryview) -> None:
        rest.extend(piece)
        whole = len(rest) // PAGE_SIZE * PAGE_SIZE
        words.extend(memoryview(bytes(rest[:whole])).cast("Q")[:: PAGE_SIZE // 8].tolist())
        del rest[:whole]

    return take
