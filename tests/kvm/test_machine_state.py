"""The machine as migration sees it: device state that goes elsewhere and comes back, and the dirty log."""

from __future__ import annotations

import dataclasses
from array import array

import pytest

from kvm.machine import MicroVM
from qemumig.errors import MachineError, StateError
from qemumig.qapi import RunState
from qemumig.ram.block import RAMBlock
from qemumig.savevm.devices.cpu import CPU
from qemumig.savevm.devices.kvmclock import KVMCLOCK
from tests.qemumig.savevm import recorded
from tests.support import guest
from tests.support.guest import Letters
from tests.support.plain_stream import read_stream

from .workshop import MIB, PAGE, Workshop, clock_of, device_bytes, move, over_the_wire, running_guest, wait_for_all

pytestmark = [pytest.mark.needs("kvm"), pytest.mark.usefixtures("no_leaks")]


def test_sections_come_in_the_order_of_a_real_machine(workshop: Workshop) -> None:
    machine = workshop.machine(cpus=2, max_cpus=2)
    sections = [(section.idstr, section.instance_id) for section in machine.sections()]
    stream = recorded.load("q100-2cpu-checks")
    real = [(one.header.idstr, one.header.instance_id) for one in stream.devices if one.header.idstr != "globalstate"]
    assert sections == real
    assert [section for section, _ in machine.save_device_state()] == list(machine.sections())


def test_sections_have_the_size_of_a_real_machine_s(workshop: Workshop) -> None:
    machine, _ = running_guest(workshop, 2)
    machine.stop(RunState.PAUSED)
    ours = {(section.idstr, section.instance_id): len(data) for section, data in device_bytes(machine)}
    stream = recorded.load("q100-2cpu-checks")
    real = {(one.header.idstr, one.header.instance_id): len(one.payload) for one in stream.devices}
    del real["globalstate", 0]
    assert ours == real


def test_without_vapic_and_serial_port_their_sections_are_missing(workshop: Workshop) -> None:
    machine = workshop.machine(vapic=False, isa_serial=False)
    assert not {"kvm-tpr-opt", "serial"} & {section.idstr for section in machine.sections()}


@pytest.mark.parametrize("cpus", [1, 2, 4])
def test_a_guest_goes_on_in_a_second_machine_and_back(workshop: Workshop, cpus: int) -> None:
    machine, letters = running_guest(workshop, cpus)
    for _ in range(3):
        machine.stop(RunState.FINISH_MIGRATE)
        before = [guest.status(machine.read_physical, cpu).passes for cpu in range(cpus)]
        letters = Letters()
        bios = workshop.image(flags=guest.ALL_CHECKS, ncpus=cpus)
        destination = workshop.machine(letters, bios=bios, cpus=cpus, max_cpus=cpus, incoming=True)
        move(machine, destination)
        machine.set_runstate(RunState.POSTMIGRATE)
        destination.start()
        wait_for_all(letters, cpus)
        assert b"A" not in letters.text
        machine = destination
    machine.stop(RunState.PAUSED)
    assert all(guest.status(machine.read_physical, cpu).passes > before[cpu] for cpu in range(cpus))


def test_vector_registers_survive_the_move(workshop: Workshop) -> None:
    config = {"cpu_model": "host", "cpu_features": {}}
    letters = Letters()
    bios = workshop.image(flags=guest.FPU, xcr0_mask=0xE7)
    machine = workshop.machine(letters, bios=bios, **config)
    machine.start()
    letters.wait(3)
    machine.stop(RunState.FINISH_MIGRATE)
    cpu = next(record for section, record in machine.save_device_state() if section.vmstate is CPU)
    if not cpu.xcr0 & 0xE0:
        pytest.skip("this host's guests have no AVX-512")
    assert all(map(any, cpu.ymm_high)) and all(map(any, cpu.avx512.zmm_high)) and all(map(any, cpu.avx512.zmm_hi16))
    letters = Letters()
    destination = workshop.machine(letters, bios=bios, incoming=True, **config)
    move(machine, destination)
    destination.start()
    letters.wait(3)
    assert letters.errors == b""


def test_state_that_was_loaded_is_saved_byte_identical(workshop: Workshop) -> None:
    machine, _ = running_guest(workshop, 2)
    machine.stop(RunState.PAUSED)
    first = device_bytes(machine)
    assert device_bytes(machine) == first
    destination = workshop.machine(bios=workshop.image(), cpus=2, max_cpus=2, incoming=True)
    destination.load_device_state(over_the_wire(machine))
    again = device_bytes(destination)
    assert [data for _, data in again] == [data for _, data in first]


@pytest.mark.parametrize("name", ["q72-1cpu-checks", "q100-1cpu-checks", "q100-2cpu-checks", "q102-2cpu-checks"])
def test_a_guest_recorded_in_a_real_machine_goes_on_here(workshop: Workshop, name: str) -> None:
    recording = recorded.load(name)
    cpus = sum(one.vmstate is CPU for one in recording.devices)
    letters = Letters()
    machine = workshop.machine(letters, ram_size=32 * MIB, cpus=cpus, max_cpus=cpus, incoming=True)
    stream = read_stream(recording.data)
    for block in machine.ram_blocks:
        block.owner.write(0, stream.blocks[block.idstr].memory)  # type: ignore[attr-defined]
    ours = {(section.idstr, section.instance_id): section for section in machine.sections()}
    machine.load_device_state(
        [
            (ours[one.header.idstr, one.header.instance_id], one.record)
            for one in recording.devices
            if one.header.idstr != "globalstate"
        ]
    )
    machine.start()
    wait_for_all(letters, cpus)
    assert b"A" not in letters.text


def test_of_a_section_that_comes_twice_the_last_counts(workshop: Workshop) -> None:
    machine = workshop.machine(incoming=True)
    loaded = machine.save_device_state()
    section, clock = next((section, record) for section, record in loaded if section.vmstate is KVMCLOCK)
    machine.load_device_state([*loaded, (section, dataclasses.replace(clock, clock=123))])
    assert clock_of(machine) == 123


def test_a_section_of_another_machine_is_refused(workshop: Workshop) -> None:
    machine, larger = workshop.machine(), workshop.machine(cpus=2, max_cpus=2)
    with pytest.raises(MachineError, match="no section 'cpu_common' instance 1"):
        machine.load_device_state(larger.save_device_state())


def test_what_kvm_refuses_fails_the_load(workshop: Workshop) -> None:
    machine = workshop.machine(incoming=True)
    records = {section.idstr: (section, record) for section, record in machine.save_device_state()}
    section, cpu = records["cpu"]
    with pytest.raises(MachineError, match=r"vCPU 0: .*XCR0 to 0x0"):
        machine.load_device_state([(section, dataclasses.replace(cpu, xcr0=0))])


def test_a_running_machine_is_neither_saved_nor_loaded_nor_emptied(workshop: Workshop) -> None:
    machine, _ = running_guest(workshop)
    for act in (machine.save_device_state, lambda: machine.load_device_state([]), machine.discard_ram):
        with pytest.raises(StateError, match="the machine is running"):
            act()


# -- dirty log


def dirty_pages(machine: MicroVM, block: RAMBlock) -> set[int]:
    words = memoryview(array("Q", bytes(8 * ((block.pages + 63) // 64))))
    machine.dirty_log.fetch(block, words)
    return {64 * index + bit for index, word in enumerate(words) if word for bit in range(64) if word >> bit & 1}


@pytest.mark.parametrize("manual", [True, False], ids=["manual", "automatic"])
def test_the_dirty_log_finds_exactly_what_the_guest_wrote(workshop: Workshop, manual: bool) -> None:
    letters = Letters()
    bios = workshop.image(dirty_pages=300)
    machine = workshop.machine(letters, bios=bios, manual_dirty_log=manual)
    ram, firmware = machine.ram_blocks
    machine.start()
    letters.wait(1)
    assert machine.dirty_log.manual_clear in (manual, False)
    machine.dirty_log.start()
    machine.stop(RunState.PAUSED)
    for block in machine.ram_blocks:  # with manual clearing, everything is dirty at first
        dirty_pages(machine, block)
        machine.dirty_log.clear(block, 0, block.pages)
    assert (dirty_pages(machine, ram), dirty_pages(machine, firmware)) == (set(), set())
    passes = guest.status(machine.read_physical).passes
    machine.start()
    letters.wait(2)
    machine.stop(RunState.PAUSED)
    assert guest.status(machine.read_physical).passes > passes
    written = dirty_pages(machine, ram)
    counted = set(range(0x1000000 // PAGE, 0x1000000 // PAGE + 300))
    assert counted | {guest.STATUS_ADDRESS // PAGE} <= written
    assert written - counted <= set(range(0x1000 // PAGE, 0x80000 // PAGE))  # its tables, stacks and status
    assert dirty_pages(machine, firmware) == set()
    machine.dirty_log.stop()


def test_pages_the_guest_does_not_touch_again_stay_clean_once_cleared(workshop: Workshop) -> None:
    machine, _ = running_guest(workshop, flags=0)
    ram = machine.ram_blocks[0]
    machine.dirty_log.start()
    seen: set[int] = set()
    for _ in range(30):  # while it runs
        seen |= dirty_pages(machine, ram)
        machine.dirty_log.clear(ram, 0, ram.pages)
    machine.stop(RunState.PAUSED)
    assert dirty_pages(machine, ram) <= set(range(0x80)) | set(range(0x1000, 0x1100))
    machine.dirty_log.stop()


def test_writes_through_the_firmware_s_low_alias_are_dirty_in_its_block(workshop: Workshop) -> None:
    machine = workshop.machine()
    _, firmware = machine.ram_blocks
    machine.dirty_log.start()
    dirty_pages(machine, firmware)
    machine.dirty_log.clear(firmware, 0, firmware.pages)
    machine.reset()  # loads the firmware anew: our own write
    assert dirty_pages(machine, firmware) == set(range(16))
    assert dirty_pages(machine, firmware) == set()
    machine.dirty_log.stop()
