"""The machine as a whole, with the self-checking guest inside: it runs, stops, resets, fails, ends."""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path
from typing import Any

import pytest

from kvm.block import RawImage
from kvm.boot import FirmwareError
from kvm.config import Chipset, DiskConfig
from kvm.cpuid import CpuModelError
from kvm.machine import MicroVM
from kvm.machine_types import find_machine
from kvm.memory import HostMemory
from kvm.runstates import NEXT
from qemumig.cli.guest import CLOCK_PAGE
from qemumig.errors import MachineError, StateError
from qemumig.qapi import RunState
from qemumig.savevm.rehearsal import rehearse
from tests.support import guest
from tests.support.guest import Letters

from .test_memory import resident
from .workshop import MIB, PAGE, Workshop, all_ticked, clock_of, running_guest, wait_for_all

pytestmark = [pytest.mark.needs("kvm"), pytest.mark.usefixtures("no_leaks")]


# -- the guest runs


@pytest.mark.parametrize("cpus", [1, 2, 4])
def test_the_guest_boots_and_all_its_checks_pass(workshop: Workshop, cpus: int) -> None:
    machine, letters = running_guest(workshop, cpus)
    assert letters.wait_for(lambda text: all_ticked(machine, cpus))
    machine.stop(RunState.PAUSED)
    assert letters.text.startswith(b"A") and letters.text.count(b"A") == 1
    for cpu in range(cpus):
        status = guest.status(machine.read_physical, cpu)
        assert status.error == 0 and status.passes >= 40
        assert status.ticks > 0 and status.clock > 0
    assert workshop.events == [("RESUME",), ("STOP",)]
    assert workshop.warnings == []


@pytest.mark.parametrize("model", ["host", "max"])
def test_the_guest_boots_with_all_that_the_host_has(workshop: Workshop, model: str) -> None:
    letters = Letters()
    bios = workshop.image(flags=guest.ALL_CHECKS, ncpus=2, xcr0_mask=0xE7)
    machine = workshop.machine(letters, bios=bios, cpus=2, max_cpus=2, cpu_model=model, cpu_features={})
    machine.start()
    wait_for_all(letters, 2)
    assert workshop.warnings == []


def test_where_the_vcpus_go_on_is_told_once_they_stand(workshop: Workshop) -> None:
    """Code, stack, data, tables and the clock's page of each vCPU: small numbers of pages, all of them in RAM."""
    machine, _ = running_guest(workshop, 2)
    with pytest.raises(StateError, match="must be stopped to be looked at"):
        machine.first_touched()
    machine.stop(RunState.PAUSED)
    places = [(block.idstr, offset) for block, offset in machine.first_touched()]
    assert len(set(places)) == len(places) and 8 < len(places) < 40
    assert all(offset % PAGE == 0 for _, offset in places)
    expected = {("microvm.ram", CLOCK_PAGE)}
    for processor in machine._processors:
        regs, sregs = processor.vcpu.get_regs(), processor.vcpu.get_sregs()
        expected |= {("microvm.ram", address & ~(PAGE - 1)) for address in (sregs.cr3, regs.rsp, sregs.idt.base)}
        pointers = [value for value in (getattr(regs, f"r{n}") for n in range(8, 16)) if MIB <= value < 64 * MIB]
        expected |= {("microvm.ram", address & ~(PAGE - 1)) for address in pointers}  # what the guest works on
    assert expected <= set(places)


@pytest.mark.parametrize("kind", ["smallest", "largest", "pc"])
def test_the_devices_of_every_machine_can_be_rehearsed(workshop: Workshop, kind: str) -> None:
    path = workshop.folder / "disk"
    path.write_bytes(bytes(512))
    with RawImage(str(path)) as image:
        config: dict[str, Any] = {
            "smallest": {},
            "largest": {
                "chipset": Chipset(acpi=True, ioapic2=True, pit=True, pic=True, rtc=True),
                "disks": [DiskConfig("d0", image, 0)],
            },
            "pc": {
                "bios": "",
                "machine_type": find_machine("q35"),
                "ram_idstr": "pc.ram",
                "disks": [DiskConfig("d0", image, 0, kind="ide-hd")],
            },
        }[kind]
        rehearse(workshop.machine(incoming=True, **config).sections())


@pytest.mark.parametrize("cpus", [1, 3])
def test_a_load_that_was_rehearsed_leaves_nothing_behind(workshop: Workshop, cpus: int) -> None:
    machine = workshop.machine(incoming=True, cpus=cpus)
    machine.rehearse_load()
    before = without_time(machine)
    machine.rehearse_load()
    assert without_time(machine) == before and before
    assert all(block.fresh for block in machine.ram_blocks)
    assert resident(machine.ram_blocks[0]) == 0


def without_time(machine: MicroVM) -> list[tuple[str, Any]]:
    """Device state, but for what changes all the time."""
    return [(one.idstr, record) for one, record in machine.save_device_state() if one.idstr not in ("timer", "kvmclock")]


def test_only_a_machine_that_stands_can_rehearse_a_load(workshop: Workshop) -> None:
    machine, _ = running_guest(workshop)
    with pytest.raises(StateError, match="must be stopped to be loaded"):
        machine.rehearse_load()


def test_ram_above_3_gib_is_at_4_gib(workshop: Workshop) -> None:
    letters = Letters()
    bios = workshop.image(dirty_base=4 << 30, dirty_pages=64, map_gib=5)
    machine = workshop.machine(letters, bios=bios, ram_size=(3 << 30) + 8 * MIB)
    machine.start()
    letters.wait(3)
    machine.stop(RunState.PAUSED)
    assert int.from_bytes(machine.read_physical(4 << 30, 8), "little") >= 60
    ram = machine.ram_blocks[0]
    assert ram.owner.read(3 << 30, 8) == machine.read_physical(4 << 30, 8)  # type: ignore[attr-defined]


def test_200_stops_and_starts_leave_a_busy_guest_intact(workshop: Workshop) -> None:
    machine, letters = running_guest(workshop, 2)
    for _ in range(200):
        machine.stop(RunState.PAUSED)
        frozen = machine.read_physical(guest.STATUS_ADDRESS, 128)
        assert machine.read_physical(guest.STATUS_ADDRESS, 128) == frozen
        machine.start()
    wait_for_all(letters, 2)
    assert workshop.events == [("RESUME",), *[("STOP",), ("RESUME",)] * 200]


def test_stops_and_starts_from_several_threads_leave_the_guest_intact(workshop: Workshop) -> None:
    machine, letters = running_guest(workshop)

    def toggle() -> None:
        for _ in range(40):
            machine.stop(RunState.PAUSED)
            machine.start()

    threads = [threading.Thread(target=toggle) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wait_for_all(letters, 1)
    states = [name for name, *_ in workshop.events]
    assert states == [("RESUME", "STOP")[number % 2] for number in range(len(states))]


def test_the_paravirtual_clock_stands_still_while_the_guest_does(workshop: Workshop) -> None:
    machine, letters = running_guest(workshop)
    machine.stop(RunState.PAUSED)
    stopped = clock_of(machine)
    assert clock_of(machine) == stopped
    machine.start()
    letters.wait(1)
    machine.stop(RunState.PAUSED)
    assert clock_of(machine) > stopped
    assert letters.errors == b""


# -- reset and failure


def firmware(folder: Path, code: bytes) -> str:
    """An image whose reset vector jumps to *code* in it."""
    image = bytearray(65536)
    image[: len(code)] = code
    image[0xFFF0:0xFFF5] = bytes.fromhex("ea 00 00 00 f0")  # jmp f000:0000
    path = folder / "code.bin"
    path.write_bytes(image)
    return str(path)


TRIPLE_FAULT = bytes.fromhex(
    "ba f8 03  b0 41  ee"  # mov dx, 0x3f8; mov al, 'A'; out dx, al
    "2e 66 0f 01 1e 40 00"  # lidtl cs:[0x40]: base and limit are 0
    "0f 20 c0  0c 01  0f 22 c0"  # cr0.PE
    "b8 10 00  8e d8"  # mov ax, 0x10; mov ds, ax: no such descriptor, no gate for that, no gate for that either
).ljust(0x46, b"\0")
JUMP_INTO_A_HOLE = bytes.fromhex("ea 00 00 00 90")  # jmp 9000:0000


def test_a_triple_fault_resets_the_machine(workshop: Workshop) -> None:
    letters = Letters()
    machine = workshop.machine(letters, bios=firmware(workshop.folder, TRIPLE_FAULT))
    machine.start()
    letters.wait(3, b"A")
    assert machine.running
    machine.stop(RunState.PAUSED)
    resets = [event for event in workshop.events if event[0] == "RESET"]
    assert len(resets) >= 2 and set(resets) == {("RESET", True, "guest-reset")}


def test_a_guest_that_may_not_reboot_is_shut_down_instead(workshop: Workshop) -> None:
    ended = threading.Event()
    letters = Letters()
    machine = workshop.machine(letters, bios=firmware(workshop.folder, TRIPLE_FAULT))
    machine.reboots = False
    machine.on_shutdown = lambda guest, reason: ended.set()
    machine.start()
    assert ended.wait(30)
    assert machine.runstate is RunState.SHUTDOWN
    assert workshop.events == [("RESUME",), ("SHUTDOWN", True, "guest-reset"), ("STOP",)]
    with pytest.raises(StateError):
        machine.start()


def test_a_reset_starts_a_running_guest_anew(workshop: Workshop) -> None:
    machine, letters = running_guest(workshop, 2)
    for resets in (1, 2):
        machine.reset()
        assert letters.wait_for(lambda text, resets=resets: text.count(b"A") > resets)
        wait_for_all(letters, 2)
    assert letters.text.count(b"A") == 3
    assert machine.running
    assert workshop.events == [("RESUME",)]


@pytest.mark.parametrize(
    ("state", "after"),
    [
        (RunState.PAUSED, RunState.PRELAUNCH),
        (RunState.POSTMIGRATE, RunState.PRELAUNCH),
        (RunState.FINISH_MIGRATE, RunState.FINISH_MIGRATE),
    ],
)
def test_a_reset_of_a_stopped_machine_brings_it_back_before_its_launch(
    workshop: Workshop, state: RunState, after: RunState
) -> None:
    machine, letters = running_guest(workshop)
    machine.stop(RunState.FINISH_MIGRATE)
    machine.set_runstate(state)
    machine.reset()
    assert machine.runstate is after
    machine.start()
    letters.wait(1, b"A")
    wait_for_all(letters, 1)


def test_a_reset_brings_the_firmware_back_also_where_the_stream_brought_another(workshop: Workshop) -> None:
    letters = Letters()
    machine = workshop.machine(letters, incoming=True)
    image = machine.ram_blocks[1].owner
    assert image.read(0, 65536) == bytes(65536)  # type: ignore[attr-defined]
    machine.reset()
    assert machine.runstate is RunState.INMIGRATE
    assert image.read(0, 8) == guest.MAGIC  # type: ignore[attr-defined]


def test_code_that_kvm_cannot_run_stops_the_machine_with_one_line(workshop: Workshop) -> None:
    stopped = threading.Event()
    bios = firmware(workshop.folder, JUMP_INTO_A_HOLE)
    machine = workshop.machine(bios=bios, ram_size=MIB // 2, on_event={"STOP": stopped.set})
    machine.start()
    assert stopped.wait(30)
    assert machine.runstate is RunState.INTERNAL_ERROR
    assert len(workshop.warnings) == 1
    assert re.fullmatch(r"vCPU 0: KVM internal error, suberror 1, data \[.*\] at RIP 0x0", workshop.warnings[0])
    machine.stop(RunState.FINISH_MIGRATE)
    with pytest.raises(MachineError, match="has failed and cannot be saved: vCPU 0: KVM internal error"):
        machine.save_device_state()
    with pytest.raises(MachineError, match="has failed and has to be reset first"):
        machine.start()


def test_an_error_in_an_exit_stops_the_machine_and_is_told(workshop: Workshop) -> None:
    class Broken(Letters):
        def write(self, data: bytes) -> int:
            raise RuntimeError("the back end fell over")

    stopped = threading.Event()
    machine = workshop.machine(Broken(), on_event={"STOP": stopped.set})
    machine.start()
    assert stopped.wait(30)
    assert machine.runstate is RunState.INTERNAL_ERROR
    assert workshop.warnings == ["vCPU 0: RuntimeError: the back end fell over"]
    with pytest.raises(StateError, match="internal-error and cannot become running"):
        machine.start()
    machine.reset()
    assert machine.runstate is RunState.PRELAUNCH


# -- run states


def test_a_machine_is_made_stopped(workshop: Workshop) -> None:
    assert workshop.machine().runstate is RunState.PRELAUNCH
    assert workshop.machine(incoming=True).runstate is RunState.INMIGRATE
    assert workshop.events == []


def test_stopping_a_stopped_machine_renames_its_state_in_silence(workshop: Workshop) -> None:
    machine = workshop.machine()
    machine.stop(RunState.FINISH_MIGRATE)
    machine.set_runstate(RunState.POSTMIGRATE)
    assert (machine.runstate, workshop.events) == (RunState.POSTMIGRATE, [])


def test_only_a_stopped_machine_is_renamed_and_never_to_running(workshop: Workshop) -> None:
    machine, _ = running_guest(workshop)
    with pytest.raises(StateError, match="is running, only a stopped one"):
        machine.set_runstate(RunState.PAUSED)
    machine.stop(RunState.PAUSED)
    with pytest.raises(StateError):
        machine.set_runstate(RunState.RUNNING)
    with pytest.raises(StateError, match="paused and cannot become inmigrate"):
        machine.set_runstate(RunState.INMIGRATE)


def test_a_stop_that_is_not_legal_does_not_stop(workshop: Workshop) -> None:
    machine, letters = running_guest(workshop)
    with pytest.raises(StateError, match="running and cannot become prelaunch"):
        machine.stop(RunState.PRELAUNCH)
    assert machine.running
    wait_for_all(letters, 1)


def test_every_state_but_the_dead_may_run_and_running_leads_to_every_stop() -> None:
    may_run = {state for state, following in NEXT.items() if RunState.RUNNING in following}
    assert may_run == set(RunState) - {
        RunState.RUNNING,
        RunState.PRECONFIG,
        RunState.INTERNAL_ERROR,
        RunState.SHUTDOWN,
        RunState.GUEST_PANICKED,
    }
    assert {RunState.PAUSED, RunState.FINISH_MIGRATE, RunState.SAVE_VM, RunState.SHUTDOWN} <= NEXT[RunState.RUNNING]
    assert all(RunState.INMIGRATE not in NEXT[state] for state in NEXT if state is not RunState.INMIGRATE)


# -- memory, and the end


def test_memory_is_fresh_until_somebody_may_have_written(workshop: Workshop) -> None:
    incoming = workshop.machine(incoming=True)
    assert all(block.fresh for block in incoming.ram_blocks)
    machine = workshop.machine()
    assert [block.fresh for block in machine.ram_blocks] == [True, False]
    machine.start()
    assert not any(block.fresh for block in machine.ram_blocks)
    incoming.load_device_state(incoming.save_device_state())
    assert not any(block.fresh for block in incoming.ram_blocks)


def test_discarded_ram_is_empty_and_fresh(workshop: Workshop) -> None:
    machine = workshop.machine(incoming=True)
    machine.ram_blocks[0].owner.write(0x5000, b"half a guest")  # type: ignore[attr-defined]
    machine.discard_ram()
    assert machine.read_physical(0x5000, 12) == bytes(12)
    assert all(block.fresh for block in machine.ram_blocks)


def test_reading_physical_memory_sees_zeroes_where_there_is_none(workshop: Workshop) -> None:
    machine = workshop.machine()
    assert machine.read_physical(0xF0000, 8) == machine.read_physical(0xFFFF0000, 8) == guest.MAGIC
    assert machine.read_physical(64 * MIB - 4, 8) == bytes(8)
    assert machine.read_physical((1 << 64) - 4, 8) == bytes(8)


def test_a_backend_gives_the_ram_and_its_name(workshop: Workshop) -> None:
    backend = HostMemory.memfd(32 * MIB)
    machine = workshop.machine(ram_backend=backend, ram_size=32 * MIB, ram_idstr="mem0")
    block = machine.ram_blocks[0]
    assert (block.idstr, block.shared, block.owner) == ("mem0", True, backend)


def test_odd_ram_sizes_are_rounded_up_to_pages(workshop: Workshop) -> None:
    machine = workshop.machine(ram_size=32 * MIB + 1)
    assert machine.ram_blocks[0].used_length == 32 * MIB + PAGE


def test_vcpu_threads_have_their_names_and_numbers(workshop: Workshop) -> None:
    machine = workshop.machine(cpus=2, max_cpus=2)
    names = [Path(f"/proc/self/task/{number}/comm").read_text().strip() for number in machine.vcpu_thread_ids()]
    assert names == ["CPU 0/KVM", "CPU 1/KVM"]


def test_features_that_are_not_to_be_had_are_warned_of(workshop: Workshop) -> None:
    workshop.machine(cpu_features={"pni": False, "vmx": True})
    assert workshop.warnings == ["warning: host doesn't support requested feature: CPUID.01H:ECX.vmx [bit 5]"]


def test_a_processor_whose_clock_cannot_change_bars_migration(workshop: Workshop) -> None:
    assert workshop.machine().migration_blockers == []
    blockers = workshop.machine(cpu_features={"pni": False, "invtsc": True}).migration_blockers
    is_missing = any("invtsc" in warning for warning in workshop.warnings)
    assert blockers == ([] if is_missing else ["State blocked by non-migratable CPU device (invtsc flag)"])


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ({"bios": "/does/not/exist"}, FirmwareError),
        ({"cpu_model": "foo"}, CpuModelError),
        ({"cpu_features": {"foo": True}}, CpuModelError),
        ({"ram_size": 1 << 60}, OSError),
    ],
)
def test_a_machine_that_cannot_be_made_leaves_nothing(workshop: Workshop, config: dict, error: type) -> None:
    before = sorted(os.listdir("/proc/self/fd")), threading.enumerate()
    with pytest.raises(error):
        workshop.machine(**config)
    assert (sorted(os.listdir("/proc/self/fd")), threading.enumerate()) == before


def test_closing_a_running_machine_ends_all_its_threads(workshop: Workshop) -> None:
    before = threading.active_count()
    machine, _ = running_guest(workshop, 2)
    assert threading.active_count() == before + 3
    machine.close()
    machine.close()
    assert threading.active_count() == before
    assert machine.read_physical(0, 4) == bytes(4)
