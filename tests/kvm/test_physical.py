"""Physical addresses from outside: memory, devices, and where nothing is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvm.devices.bus import Bus
from kvm.devices.memory import GuestMemory
from kvm.memory import HostMemory
from kvm.physical import PhysicalView

MIB = 1 << 20
FIRMWARE = (4 << 30) - 64 * 1024
DEVICE, SIZE = 0xFEB00000, 0x200
END = 1 << 64


class Registers:
    """A device of 4-byte registers, each the number of its own address; a note of every access."""

    def __init__(self) -> None:
        self.accesses: list[tuple[int, ...]] = []

    def read(self, offset: int, size: int) -> int:
        self.accesses.append((offset, size))
        return offset

    def write(self, offset: int, size: int, value: int) -> None:
        self.accesses.append((offset, size, value))


class NoVm:
    """Takes memory slots and does nothing with them."""

    def set_memory_slot(self, *slot: int) -> None:
        pass


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    memory = GuestMemory(NoVm(), HostMemory.anonymous(4 * MIB), "microvm.ram", 64 * 1024)  # type: ignore[arg-type]
    yield memory
    memory.close()


@pytest.fixture
def device() -> Registers:
    return Registers()


@pytest.fixture
def view(memory: GuestMemory, device: Registers) -> PhysicalView:
    mmio, ports = Bus("memory", 0), Bus("port", 0xFF)
    mmio.register(DEVICE, SIZE, device, widest=4)
    ports.register(0x3F8, 8, device, widest=1)
    return PhysicalView(memory, mmio, ports)


def test_memory_is_read_and_written_at_once(view: PhysicalView) -> None:
    view.write(MIB - 2, b"abcd")
    assert view.read(MIB - 3, 6) == b"\0abcd\0"
    assert view.covers(0, 4 * MIB)


def test_the_firmware_is_seen_in_both_places(view: PhysicalView) -> None:
    view.write(FIRMWARE, b"boot")
    assert view.read(FIRMWARE, 4) == view.read(0xF0000, 4) == b"boot"


def test_a_write_is_reported_as_dirty(view: PhysicalView, memory: GuestMemory) -> None:
    dirty: list[tuple[str, int, int]] = []
    memory.report_writes_to(lambda block, offset, length: dirty.append((block.idstr, offset, length)))
    view.write(0x1000, b"xy")
    assert dirty == [("microvm.ram", 0x1000, 2)]


def test_where_nothing_is_reads_are_zero_and_writes_are_lost(view: PhysicalView) -> None:
    view.write(4 * MIB, b"lost")
    assert view.read(4 * MIB, 16) == bytes(16)
    assert view.read(END - 4, 8) == bytes(8)
    view.write(END - 4, b"12345678")
    for address, size in ((4 * MIB, 1), (4 * MIB - 1, 2), (DEVICE - 1, 2), (DEVICE + SIZE - 1, 2), (END - 1, 2)):
        assert not view.covers(address, size)


def test_a_range_that_leaves_memory_keeps_what_is_in_it(view: PhysicalView) -> None:
    view.write(4 * MIB - 2, b"ab")
    assert view.read(4 * MIB - 2, 4) == b"ab\0\0"
    view.write(4 * MIB - 2, b"cdef")
    assert view.read(4 * MIB - 2, 2) == b"cd"


def test_a_device_gets_accesses_as_wide_as_it_takes(view: PhysicalView, device: Registers) -> None:
    assert view.read(DEVICE, 16) == b"".join(n.to_bytes(4, "little") for n in (0, 4, 8, 12))
    view.write(DEVICE + 4, b"\1\0\0\0")
    view.read(DEVICE + 1, 3)
    assert device.accesses == [(0, 4), (4, 4), (8, 4), (12, 4), (4, 4, 1), (1, 1), (2, 2)]
    assert view.covers(DEVICE, SIZE)


def test_a_large_range_with_nothing_in_it_is_quick(view: PhysicalView, device: Registers) -> None:
    assert view.read(1 << 40, 16 * MIB) == bytes(16 * MIB)
    assert device.accesses == []


def test_ports_are_reached_as_the_guest_reaches_them(view: PhysicalView, device: Registers) -> None:
    view.write_port(0x3F9, 1, 5)
    assert view.read_port(0x3FC, 1) == 4
    assert view.read_port(0x80, 2) == 0xFFFF
    assert device.accesses == [(1, 1, 5), (4, 1)]
