"""A bus: which device answers at an address, and what an access becomes that hits none, or two.

    guest access (address, size) ─▶ range that holds it ─▶ device.read(offset, size) / device.write(…)

An access wider than a device's widest is cut into pieces, low address first, as an ISA bus does with a word at a
byte-wide port; each piece is looked up by itself.  Where nothing answers, reads give the bus's idle value and
writes are lost.

Threads   Ranges are registered before the guest runs; after that any thread may read and write.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from typing import Protocol


class Device(Protocol):
    """What sits behind a range: *offset* from its start, *size* in bytes, values little-endian as the guest's."""

    def read(self, offset: int, size: int) -> int: ...

    def write(self, offset: int, size: int, value: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Range:
    """Addresses start … end - 1, and the widest access in bytes that the device takes in one piece."""

    start: int
    end: int
    device: Device
    widest: int


class Bus:
    """Ranges in the order of their addresses; *idle* is the byte that reads as where nobody answers."""

    def __init__(self, name: str, idle: int) -> None:
        self.name = name
        self._idle = idle
        self._starts: list[int] = []
        self._ranges: list[Range] = []

    def register(self, start: int, length: int, device: Device, *, widest: int) -> None:
        """Let *device* answer in [start, start + length); ValueError when something does already."""
        new = Range(start, start + length, device, widest)
        at = bisect.bisect_left(self._starts, start)
        for other in self._ranges[max(at - 1, 0) : at + 1]:
            if other.start < new.end and start < other.end:
                raise ValueError(f"{self.name} range {start:#x}..{new.end:#x} overlaps {other.start:#x}..{other.end:#x}")
        self._starts.insert(at, start)
        self._ranges.insert(at, new)

    def read(self, address: int, size: int) -> int:
        """The value of *size* bytes at *address*."""
        found = self._find(address)
        if found is not None and size <= found.widest and address + size <= found.end:
            return found.device.read(address - found.start, size)
        if size == 1:
            return self._idle
        value, piece = 0, self._piece(found, address, size)
        for done in range(0, size, piece):
            value |= self.read(address + done, piece) << 8 * done
        return value

    def write(self, address: int, size: int, value: int) -> None:
        """Write the low *size* bytes of *value* to *address*."""
        found = self._find(address)
        if found is not None and size <= found.widest and address + size <= found.end:
            found.device.write(address - found.start, size, value)
        elif size > 1:
            piece = self._piece(found, address, size)
            mask = (1 << 8 * piece) - 1
            for done in range(0, size, piece):
                self.write(address + done, piece, value >> 8 * done & mask)

    def _find(self, address: int) -> Range | None:
        at = bisect.bisect_right(self._starts, address) - 1
        if at >= 0 and address < self._ranges[at].end:
            return self._ranges[at]
        return None

    @staticmethod
    def _piece(found: Range | None, address: int, size: int) -> int:
        """Bytes of the pieces that an access is cut into: never more than half of it, so that it ends."""
        if found is None or address + size > found.end:
            return 1
        return min(found.widest, size // 2) or 1
