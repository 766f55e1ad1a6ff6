from __future__ import annotations

import pytest

from kvm.devices.bus import Bus


class Recorder:
    """Answers each read with the next number, and remembers every access."""

    def __init__(self) -> None:
        self.accesses: list[tuple] = []

    def read(self, offset: int, size: int) -> int:
        self.accesses.append(("read", offset, size))
        return len(self.accesses)

    def write(self, offset: int, size: int, value: int) -> None:
        self.accesses.append(("write", offset, size, value))


@pytest.fixture
def device() -> Recorder:
    return Recorder()


@pytest.fixture
def bus(device: Recorder) -> Bus:
    bus = Bus("port", 0xFF)
    bus.register(0x100, 8, device, widest=2)
    return bus


def test_an_access_reaches_its_device_with_the_offset_in_its_range(bus: Bus, device: Recorder) -> None:
    assert bus.read(0x107, 1) == 1
    bus.write(0x102, 2, 0xABCD)
    assert device.accesses == [("read", 7, 1), ("write", 2, 2, 0xABCD)]


@pytest.mark.parametrize("address", [0xFF, 0x108, 0])
def test_nobody_answers_outside_of_the_range(bus: Bus, device: Recorder, address: int) -> None:
    assert bus.read(address, 1) == 0xFF
    bus.write(address, 1, 5)
    assert device.accesses == []


def test_a_wide_access_is_cut_into_what_the_device_takes(bus: Bus, device: Recorder) -> None:
    assert bus.read(0x100, 4) == 1 | 2 << 16
    bus.write(0x104, 4, 0x11223344)
    assert device.accesses == [("read", 0, 2), ("read", 2, 2), ("write", 4, 2, 0x3344), ("write", 6, 2, 0x1122)]


def test_an_access_across_the_end_reaches_the_device_with_its_part(bus: Bus, device: Recorder) -> None:
    assert bus.read(0x107, 2) == 0xFF01
    bus.write(0xFF, 2, 0x2211)
    assert device.accesses == [("read", 7, 1), ("write", 0, 1, 0x22)]


def test_idle_bytes_fill_every_size() -> None:
    assert [Bus("port", 0xFF).read(0x80, size) for size in (1, 2, 4)] == [0xFF, 0xFFFF, 0xFFFFFFFF]
    assert Bus("memory", 0).read(0xD0000000, 8) == 0


@pytest.mark.parametrize(("start", "length"), [(0xFF, 2), (0x107, 1), (0x100, 8), (0x80, 0x1000)])
def test_overlapping_ranges_are_refused(bus: Bus, device: Recorder, start: int, length: int) -> None:
    with pytest.raises(ValueError, match=r"overlaps 0x100\.\.0x108"):
        bus.register(start, length, device, widest=1)


def test_neighbours_do_not_overlap(bus: Bus) -> None:
    below, above = Recorder(), Recorder()
    bus.register(0xF8, 8, below, widest=1)
    bus.register(0x108, 1, above, widest=1)
    bus.read(0xFF, 1)
    bus.read(0x108, 1)
    assert (below.accesses, above.accesses) == ([("read", 7, 1)], [("read", 0, 1)])
