"""Physical addresses and ports as a debugger gets at them: memory and devices alike, whether the guest runs or not.

    address ─▶ RAM where there is RAM, else the device that answers, else nothing: reads as zeroes, writes are lost

An access of RAM is a copy of any length.  One that meets a device is cut into the pieces that a processor would use.

Threads   any.  An access may take as long as a device does, or as a page takes to come from a migration's source.
"""

from __future__ import annotations

from collections.abc import Iterator

from .devices.board import DmaMemory
from .devices.bus import Bus
from .devices.memory import GuestMemory

ADDRESSES = 1 << 64
PAGE_SIZE = 4096  # RAM begins and ends at its multiples
WIDEST = 8  # bytes of an access to a device


class PhysicalView:
    """*memory*, and the devices on *mmio* and *ports*."""

    def __init__(self, memory: GuestMemory, mmio: Bus, ports: Bus) -> None:
        self._memory = memory
        self._ram = DmaMemory(memory)
        self._mmio = mmio
        self._ports = ports

    def covers(self, address: int, size: int) -> bool:
        """Whether RAM or a device is at all of these physical addresses."""
        if address + size > ADDRESSES:
            return False
        return all(self._ram.holds(*piece) or self._devices_fill(*piece) for piece in pieces(address, size))

    def _devices_fill(self, address: int, size: int) -> bool:
        return sum(end - start for start, end in self._devices_in(address, size)) == size

    def _devices_in(self, address: int, size: int) -> list[tuple[int, int]]:
        """The parts (start, end) of the range that belong to devices."""
        clipped = ((max(one.start, address), min(one.end, address + size)) for one in self._mmio._ranges)
        return [(start, end) for start, end in clipped if start < end]

    def read(self, address: int, size: int) -> bytes:
        """*size* bytes at physical *address*; what nobody answers for reads as zeroes."""
        if self._ram.holds(address, size):
            return self._memory.read(address, size)
        data = b"".join(self._read_piece(*piece) for piece in pieces(address, size))
        return data.ljust(size, b"\0")  # there is nothing beyond the last address

    def _read_piece(self, address: int, size: int) -> bytes:
        if self._ram.holds(address, size):
            return self._memory.read(address, size)
        if not self._devices_in(address, size):
            return bytes(size)
        accesses = aligned(address, size)
        return b"".join(self._mmio.read(at, width).to_bytes(width, "little") for at, width in accesses)

    def write(self, address: int, data: bytes) -> None:
        """Write *data* to physical *address*; what nobody answers for is lost."""
        if self._ram.holds(address, len(data)):
            self._memory.write(address, data)
            return
        for start, length in pieces(address, len(data)):
            piece = data[start - address : start - address + length]
            if self._ram.holds(start, length):
                self._memory.write(start, piece)
            elif self._devices_in(start, length):
                self._write_devices(start, piece)

    def _write_devices(self, address: int, data: bytes) -> None:
        for at, width in aligned(address, len(data)):
            done = at - address
            self._mmio.write(at, width, int.from_bytes(data[done : done + width], "little"))

    def read_port(self, port: int, size: int) -> int:
        """What IN reads: *size* bytes from *port*."""
        return self._ports.read(port, size)

    def write_port(self, port: int, size: int, value: int) -> None:
        """What OUT writes."""
        self._ports.write(port, size, value)


def pieces(address: int, size: int) -> Iterator[tuple[int, int]]:
    """The range (address, length) page by page; what is beyond the last address is left out."""
    end = min(address + size, ADDRESSES)
    while address < end:
        length = min(end - address, PAGE_SIZE - address % PAGE_SIZE)
        yield address, length
        address += length


def aligned(address: int, size: int) -> Iterator[tuple[int, int]]:
    """The range as naturally aligned accesses, none wider than a processor's."""
    end = address + size
    while address < end:
        width = min(address & -address or WIDEST, WIDEST)
        while width > end - address:
            width //= 2
        yield address, width
        address += width
