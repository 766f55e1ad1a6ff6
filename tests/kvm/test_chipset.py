"""The machine with its optional devices, and a guest that counts their interrupts."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvm.block import RawImage
from kvm.config import Chipset, DiskConfig
from kvm.devices import ged
from kvm.devices.virtio_mmio import SLOT_SIZE, slot_address
from kvm.errors import KvmError
from kvm.machine import MicroVM
from qemumig.qapi import RunState
from tests.kvm.devices.virtio_driver import Driver
from tests.kvm.workshop import Workshop, device_bytes, move
from tests.qemumig.savevm import recorded
from tests.support import guest, ticker
from tests.support.guest import Letters
from tests.support.vmm import wait_until

pytestmark = [pytest.mark.needs("kvm"), pytest.mark.usefixtures("no_leaks")]

ALL = Chipset(acpi=True, ioapic2=True, pit=True, pic=True, rtc=True)
CHIPSETS = {
    "acpi": Chipset(acpi=True, ioapic2=True),
    "acpi-one-ioapic": Chipset(acpi=True),
    "pit-pic": Chipset(pit=True, pic=True),
    "rtc": Chipset(rtc=True),
    "all": ALL,
}
SECTIONS = {
    "acpi": {("ioapic", 1), ("acpi-ged", 0)},
    "acpi-one-ioapic": {("acpi-ged", 0)},
    "pit-pic": {("i8259", 0), ("i8259", 1), ("i8254", 0)},
    "rtc": {("mc146818rtc", 0)},
    "all": {("ioapic", 1), ("acpi-ged", 0), ("i8259", 0), ("i8259", 1), ("i8254", 0), ("mc146818rtc", 0)},
}


def ticking(workshop: Workshop, flags: int, chipset: Chipset = ALL, **config: Any) -> tuple[MicroVM, Letters]:
    """A stopped machine with the counting guest."""
    letters = Letters()
    bios = str(ticker.write_image(workshop.folder, flags))
    return workshop.machine(letters, bios=bios, chipset=chipset, **config), letters


def wait_for(holds: Callable[[ticker.Ticks], bool], machine: MicroVM) -> ticker.Ticks:
    wait_until(lambda: holds(ticker.ticks(machine.read_physical)), f"{ticker.ticks(machine.read_physical)}")
    return ticker.ticks(machine.read_physical)


@pytest.mark.parametrize("name", CHIPSETS)
def test_the_checking_guest_goes_on_in_another_machine_of_the_same_kind(workshop: Workshop, name: str) -> None:
    chipset, letters = CHIPSETS[name], Letters()
    source = workshop.machine(letters, bios=workshop.image(flags=guest.ALL_CHECKS), chipset=chipset)
    source.start()
    letters.wait(2)
    source.stop(RunState.FINISH_MIGRATE)
    there = Letters()
    destination = workshop.machine(there, bios=workshop.image(), chipset=chipset, incoming=True)
    move(source, destination)
    assert device_bytes(destination) == device_bytes(source) or name in ("rtc", "all")  # the time goes on
    destination.start()
    there.wait(2)
    assert there.errors == b"" and b"A" not in there.text


@pytest.mark.parametrize("name", CHIPSETS)
def test_each_device_has_its_sections(workshop: Workshop, name: str) -> None:
    def identities(chipset: Chipset) -> list[tuple[str, int]]:
        machine = workshop.machine(chipset=chipset)
        return [(section.idstr, section.instance_id) for section in machine.sections()]

    with_it, without = identities(CHIPSETS[name]), identities(Chipset())
    assert set(with_it) - set(without) == SECTIONS[name]
    assert [one for one in with_it if one in without] == without


@pytest.mark.parametrize("name", ["q100-acpi", "q72-acpi", "q100-legacy-devices", "q72-legacy-devices"])
def test_sections_and_blocks_are_those_of_a_real_qemu_in_its_order(workshop: Workshop, name: str) -> None:
    acpi = "acpi" in name
    chipset = Chipset(acpi=acpi, ioapic2=acpi, pit=not acpi, pic=not acpi, rtc=not acpi)
    machine = workshop.machine(chipset=chipset, ram_size=32 << 20)
    recording = recorded.load(name)
    real = [(section.header.idstr, section.header.instance_id) for section in recording.devices]
    ours = [(section.idstr, section.instance_id) for section in machine.sections()]
    assert [*ours, ("globalstate", 0)] == real
    assert {block.idstr: block.used_length for block in machine.ram_blocks} == recording.blocks
    assert [block.idstr for block in machine.ram_blocks] == list(recording.blocks)


class TestTimers:
    def test_pit_and_rtc_tick_through_the_pics(self, workshop: Workshop) -> None:
        machine, letters = ticking(workshop, ticker.USE_PIT | ticker.USE_RTC)
        machine.start()
        first = wait_for(lambda ticks: ticks.pit > 5 and ticks.rtc > 5, machine)
        started = time.monotonic()
        last = wait_for(lambda ticks: ticks.pit > first.pit + 50, machine)
        took = time.monotonic() - started
        assert last.pit - first.pit <= took * ticker.PIT_HZ + 5  # never faster than time
        assert last.rtc - first.rtc <= took * ticker.RTC_HZ + 5
        assert last.no_cause == 0 and b"X" not in letters.text

    def test_they_stand_still_with_the_machine_and_go_on_in_another(self, workshop: Workshop) -> None:
        source, _ = ticking(workshop, ticker.USE_PIT | ticker.USE_RTC)
        source.start()
        wait_for(lambda ticks: ticks.pit > 5 and ticks.rtc > 5, source)
        source.stop(RunState.FINISH_MIGRATE)
        stopped = ticker.ticks(source.read_physical)
        destination, there = ticking(workshop, ticker.USE_PIT | ticker.USE_RTC, incoming=True)
        move(source, destination)
        assert ticker.ticks(destination.read_physical) == stopped
        destination.start()
        moved = wait_for(lambda ticks: ticks.pit > stopped.pit + 20 and ticks.rtc > stopped.rtc + 20, destination)
        assert ticker.ticks(source.read_physical) == stopped
        assert moved.no_cause <= 1 and b"X" not in there.text
        hour, minute, second = moved.time
        now = time.gmtime()
        late = (now.tm_hour * 60 + now.tm_min) * 60 + now.tm_sec - (hour * 60 + minute) * 60 - second
        assert late % 86400 <= 5

    def test_a_request_that_the_vcpu_does_not_take_is_told_as_a_real_qemu_wants_it(self, workshop: Workshop) -> None:
        machine, letters = ticking(workshop, 0)  # the guest leaves PIT and PICs as they are after power-on
        machine.start()
        letters.wait(1, b"A")
        wait_until(lambda: machine._board.pic_asks, "the first tick of the PIT")
        machine.stop(RunState.PAUSED)
        records = {(s.idstr, s.instance_id): record for s, record in machine.save_device_state()}
        assert records["apic", 0].lvt[3] == 0x10000
        assert records["cpu_common", 0].interrupt_request == 2
        assert (records["i8259", 0].irr, records["i8259", 0].last_irr) == (1, 1)

    def test_a_timer_that_fails_stops_the_machine(self, workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
        machine, letters = ticking(workshop, 0)
        machine.start()
        letters.wait(1, b"A")

        def refuse(gsi: int, level: int) -> None:
            raise KvmError(errno.EIO, f"KVM_IRQ_LINE (GSI {gsi})")

        monkeypatch.setattr(machine._vm, "irq_line", refuse)
        wait_until(lambda: machine.runstate is RunState.INTERNAL_ERROR, "the machine to stop")
        assert workshop.warnings == ["a timer: KvmError: [Errno 5] KVM_IRQ_LINE (GSI 0): Input/output error"]

    def test_without_a_pic_nothing_ticks(self, workshop: Workshop) -> None:
        machine, letters = ticking(workshop, 0, Chipset(pit=True, rtc=True))
        machine.start()
        letters.wait(1, b"A")
        machine.stop(RunState.PAUSED)
        assert not any(section.idstr == "i8259" for section in machine.sections())
        assert letters.text == b"A"


class SlotOfMachine:
    """The way of a driver outside of the guest to slot 0."""

    def __init__(self, machine: MicroVM) -> None:
        self._board = machine._board

    def read(self, offset: int, size: int = 4) -> int:
        return self._board.mmio.read(slot_address(0) + offset, size)

    def write(self, offset: int, value: int, size: int = 4) -> None:
        self._board.mmio.write(slot_address(0) + offset, size, value)

    def get(self, address: int, length: int) -> bytes:
        return self._board.memory.read(address, length)

    def put(self, address: int, data: bytes) -> None:
        self._board.memory.write(address, data)


class TestSecondIoapic:
    @pytest.fixture
    def disk(self, directory: Path, workshop: Workshop) -> Iterator[DiskConfig]:
        path = directory / "disk.img"
        path.write_bytes(bytes(1 << 20))
        image = RawImage(str(path), locks=False)
        yield DiskConfig("d0", image, 0)
        workshop.close()
        image.close()

    def test_every_answer_of_a_disk_interrupts_the_guest_once(self, workshop: Workshop, disk: DiskConfig) -> None:
        machine, letters = ticking(workshop, ticker.USE_VIRTIO, disks=[disk])
        machine.start()
        letters.wait(1, b"A")
        driver = Driver(SlotOfMachine(machine), modern=False)
        driver.start()
        for number in range(20):
            assert driver.write(8 * number, bytes([number]) * 512) == 0
            letters.wait_for(lambda text, wanted=number + 1: text.count(b"v") >= wanted)  # it has acknowledged by then
        machine.stop(RunState.PAUSED)
        assert ticker.ticks(machine.read_physical).virtio == 20
        assert letters.text == b"A" + b"v" * 20

    def test_an_interrupt_that_was_asked_for_at_the_stop_comes_in_the_next_machine(
        self, workshop: Workshop, disk: DiskConfig
    ) -> None:
        source, letters = ticking(workshop, ticker.USE_VIRTIO, disks=[disk])
        source.start()
        letters.wait(1, b"A")
        driver = Driver(SlotOfMachine(source), modern=False)
        driver.start()
        source._pause()  # the disk goes on without the vCPU
        assert driver.write(0, bytes(512)) == 0
        source.stop(RunState.FINISH_MIGRATE)
        assert ticker.ticks(source.read_physical).virtio == 0
        destination, there = ticking(workshop, ticker.USE_VIRTIO, disks=[disk], incoming=True)
        move(source, destination)
        destination.start()
        wait_for(lambda ticks: ticks.virtio >= 1, destination)
        assert b"X" not in there.text

    def test_there_are_as_many_slots_as_the_chipset_says(self, workshop: Workshop) -> None:
        for chipset, slots in ((ALL, 24), (Chipset(acpi=True), 8), (Chipset(), 8)):
            board = workshop.machine(chipset=chipset)._board
            magics = [board.mmio.read(slot_address(0) + SLOT_SIZE * slot, 4) for slot in range(25)]
            assert magics == [0x74726976] * slots + [0] * (25 - slots)


class TestEvents:
    def test_the_sleep_register_ends_the_machine(self, workshop: Workshop) -> None:
        machine, letters = ticking(workshop, 0)
        machine.start()
        letters.wait(1, b"A")
        machine._board.mmio.write(ged.REGISTERS[0] + ged.SLEEP_CONTROL, 1, 0x34)
        wait_until(lambda: machine.runstate is RunState.SHUTDOWN, "the machine to end")
        assert ("SHUTDOWN", True, "guest-shutdown") in workshop.events

    def test_the_reset_register_starts_the_guest_anew(self, workshop: Workshop) -> None:
        machine, letters = ticking(workshop, 0)
        machine.start()
        letters.wait(1, b"A")
        machine._board.mmio.write(ged.REGISTERS[0] + ged.RESET, 1, ged.RESET_VALUE)
        letters.wait(1, b"A")
        wait_until(lambda: ("RESET", True, "guest-reset") in workshop.events, "the event")
        assert machine.running

    def test_the_power_button_needs_acpi(self, workshop: Workshop) -> None:
        machine = workshop.machine(chipset=ALL)
        assert machine.press_power_button()
        assert machine._board.mmio.read(ged.EVENTS[0], 4) == ged.EVENT_POWER_BUTTON
        assert not workshop.machine().press_power_button()


def test_a_reset_while_blobs_are_logged_sends_them_again(workshop: Workshop) -> None:
    machine = workshop.machine(chipset=ALL)
    tables = next(block for block in machine.ram_blocks if block.idstr == "/rom@etc/acpi/tables")
    words = memoryview(bytearray(8)).cast("Q")
    machine.dirty_log.start()
    machine.reset()
    machine.dirty_log.fetch(tables, words)
    machine.dirty_log.stop()
    assert words[0] == 1


def test_an_incoming_machine_has_no_tables_before_the_stream_brings_them(workshop: Workshop) -> None:
    machine = workshop.machine(chipset=ALL, incoming=True)
    blobs = [block for block in machine.ram_blocks if block.idstr.startswith("/rom@")]
    assert len(blobs) == 3
    assert all(block.fresh and not any(block.owner.read(0, block.used_length)) for block in blobs)
