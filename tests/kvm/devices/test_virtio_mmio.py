from __future__ import annotations

from kvm.devices.virtio_mmio import EmptySlot


def test_an_empty_slot_says_who_it_is_and_that_nobody_is_there() -> None:
    slot = EmptySlot()
    assert [slot.read(offset, 4) for offset in (0, 4, 8, 12)] == [0x74726976, 1, 0, 0x554D4551]


def test_narrow_reads_see_parts_of_the_registers_as_a_real_machine_shows_them() -> None:
    assert (EmptySlot().read(0, 1), EmptySlot().read(0, 2)) == (0x76, 0x6976)


def test_everything_else_reads_as_zero_and_writes_change_nothing() -> None:
    slot = EmptySlot()
    slot.write(0, 4, 0xFFFFFFFF)
    assert all(slot.read(offset, 4) == 0 for offset in range(0x10, 0x200, 4))
    assert slot.read(0, 4) == 0x74726976
