"""The registers of a virtio-mmio slot, empty or with a disk, as a real machine shows them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvm.devices.virtio_mmio import EmptySlot
from tests.kvm.devices.disks import Bench
from tests.kvm.devices.virtio_driver import (
    CONFIG,
    DRIVER_FEATURES,
    DRIVER_FEATURES_SEL,
    GUEST_PAGE_SIZE,
    OK,
    QUEUE_ALIGN,
    QUEUE_DESC,
    QUEUE_NUM,
    QUEUE_NUM_MAX,
    QUEUE_PFN,
    QUEUE_READY,
    QUEUE_SEL,
    STATUS,
)


@pytest.fixture
def legacy(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path / "disk.img", modern=False)
    yield bench
    bench.close()


@pytest.fixture
def modern(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path / "disk.img", modern=True)
    yield bench
    bench.close()


# -- an empty slot


@pytest.mark.parametrize(("is_legacy", "version"), [(True, 1), (False, 2)])
def test_an_empty_slot_says_who_it_is_and_that_nobody_is_there(is_legacy: bool, version: int) -> None:
    slot = EmptySlot(is_legacy)
    assert [slot.read(offset, 4) for offset in (0, 4, 8, 12)] == [0x74726976, version, 0, 0x554D4551]


def test_narrow_reads_of_an_empty_slot_see_parts_of_the_registers() -> None:
    assert (EmptySlot().read(0, 1), EmptySlot().read(0, 2), EmptySlot().read(1, 1)) == (0x76, 0x6976, 0)


def test_everything_else_reads_as_zero_and_writes_change_nothing() -> None:
    slot = EmptySlot()
    slot.write(0, 4, 0xFFFFFFFF)
    assert all(slot.read(offset, 4) == 0 for offset in range(0x10, 0x200, 4))
    assert slot.read(0, 4) == 0x74726976


# -- a slot with a disk


def test_registers_want_32_bits(legacy: Bench) -> None:
    legacy.write(STATUS, 3, 1)
    legacy.write(STATUS, 3, 2)
    assert (legacy.read(STATUS), legacy.read(0, 1), legacy.read(0, 2)) == (0, 0, 0)


def test_there_is_one_queue(legacy: Bench) -> None:
    sizes = []
    for queue in (0, 1, 1023, 1024, 0xFFFFFFFF):
        legacy.write(QUEUE_SEL, queue)
        sizes.append(legacy.read(QUEUE_NUM_MAX))
    assert sizes == [256, 0, 0, 0, 0]
    assert legacy.disk.save().virtio.queue_sel == 1023  # what cannot be selected changes nothing


@pytest.mark.parametrize("size", [0, 257, 1 << 31])
def test_sizes_that_cannot_be_are_ignored(legacy: Bench, modern: Bench, size: int) -> None:
    for bench in (legacy, modern):
        bench.write(QUEUE_NUM, 8)
        bench.write(QUEUE_NUM, size)
        assert bench.disk.save().virtio.queues[0].num == 8


@pytest.mark.parametrize(("page_size", "shift"), [(4096, 12), (0x3000, 12), (1, 0), (0, 0), (1 << 31, 31)])
def test_a_legacy_queue_lies_at_a_page_of_the_drivers_size(legacy: Bench, page_size: int, shift: int) -> None:
    legacy.write(GUEST_PAGE_SIZE, page_size)
    legacy.write(QUEUE_PFN, 0xFFFFFFFF)
    assert legacy.read(QUEUE_PFN) == 0xFFFFFFFF
    assert legacy.disk.save().virtio.queues[0].desc == 0xFFFFFFFF << shift


def test_page_number_zero_resets_a_legacy_device(legacy: Bench) -> None:
    legacy.driver.start()
    legacy.write(QUEUE_SEL, 4)
    legacy.write(QUEUE_PFN, 0)
    assert (legacy.read(STATUS), legacy.disk.save().virtio.queue_sel) == (0, 0)


def test_a_reset_by_the_driver_leaves_what_only_selects(legacy: Bench, modern: Bench) -> None:
    legacy.write(QUEUE_ALIGN, 8192)
    legacy.write(STATUS, 0)
    assert legacy.disk.save().virtio.queues[0].align == 8192
    modern.driver.start()
    modern.write(STATUS, 0)
    extra = modern.disk.save().virtio.extra_state
    assert extra is not None and extra.state is not None
    assert (extra.state.guest_features, extra.state.queues[0].enabled) == ((0, 1), False)
    assert extra.state.queues[0].desc_low == modern.driver.desc


def test_features_are_settled_once_the_driver_has_said_so(modern: Bench) -> None:
    modern.driver.negotiate(0)
    modern.write(DRIVER_FEATURES_SEL, 0)
    modern.write(DRIVER_FEATURES, 1 << 9)
    modern.write(STATUS, 0xF)
    assert modern.disk.save().virtio.guest_features == 1 << 32


def test_a_driver_gets_no_feature_that_was_not_offered(legacy: Bench, modern: Bench) -> None:
    for bench in (legacy, modern):
        bench.driver.start((1 << 64) - 1 - (1 << 32))
        accepted = bench.disk.save().virtio.guest_features
        assert accepted is not None and accepted & ~bench.transport.offered == 0
        assert bench.driver.flush() == OK


def test_queues_that_are_not_there_keep_what_is_written_about_them_and_do_nothing(modern: Bench) -> None:
    modern.driver.start()
    modern.write(QUEUE_SEL, 7)
    modern.write(QUEUE_DESC, 0x1234000)
    modern.write(QUEUE_READY, 1)
    assert modern.read(QUEUE_READY) == 1
    extra = modern.disk.save().virtio.extra_state
    assert extra is not None and extra.state is not None
    assert (extra.state.queues[7].desc_low, extra.state.queues[7].enabled) == (0x1234000, True)
    assert modern.driver.flush() == OK


def test_a_hard_reset_is_a_new_device(legacy: Bench, modern: Bench, tmp_path: Path) -> None:
    for bench in (legacy, modern):
        new = bench.disk.save()
        bench.driver.start(1 << 29)
        bench.driver.flush()
        bench.read(CONFIG, 4)
        bench.disk.hard_reset()
        assert bench.disk.save() == new
