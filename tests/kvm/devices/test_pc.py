"""kvm.devices.pc, in a machine: it boots a disk's first sector, and has what a microvm has not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvm.block import RawImage
from kvm.config import Chipset, DiskConfig
from kvm.devices.memory import Piece, memory_map
from kvm.devices.pc import FIRMWARE_SIZE, firmware
from kvm.machine import MicroVM
from kvm.machine_types import find_machine
from qemumig.errors import MachineError, StateError
from qemumig.qapi import RunState
from tests.kvm.workshop import Workshop, device_bytes, move
from tests.support import boot_sector
from tests.support.guest import Letters
from tests.support.vmm import wait_until

pytestmark = [pytest.mark.needs("kvm"), pytest.mark.usefixtures("no_leaks")]

PAGES = 16
MIB, GIB = 1 << 20, 1 << 30
# In real mode: print A, then write *value* to *port*, then halt.
RESETS_ITSELF = {0x92: "b003", 0xCF9: "b006"}  # mov al, …
PRINT_A = "baf803 b041 ee"


class Pcs:
    """Minimal PCs with one disk each."""

    def __init__(self, workshop: Workshop) -> None:
        self.workshop = workshop
        self._images: list[RawImage] = []

    def disk(self, *, suspends: bool = False, code: str = "") -> Path:
        """A disk of one sector: the guest, or *code* in hexadecimal."""
        path = self.workshop.folder / "disk"
        if code:
            path.write_bytes(bytes.fromhex(code).ljust(510, b"\0") + b"\x55\xaa")
            return path
        return boot_sector.write_disk(path, PAGES, suspends=suspends)

    def machine(self, letters: Letters, disk: Path | None = None, *, incoming: bool = False, bios: str = "") -> MicroVM:
        disks = []
        if disk is not None:
            self._images.append(RawImage(str(disk)))
            disks = [DiskConfig("d0", self._images[-1], 0, kind="ide-hd")]
        kind = find_machine("q35")
        chipset = Chipset(pit=True, pic=True, rtc=True)
        return self.workshop.machine(
            letters, bios=bios, machine_type=kind, ram_idstr="pc.ram", chipset=chipset, disks=disks, incoming=incoming
        )

    def close(self) -> None:
        self.workshop.close()
        for image in self._images:
            image.close()


@pytest.fixture
def pcs(directory: Path) -> Iterator[Pcs]:
    pcs = Pcs(Workshop(directory))
    yield pcs
    pcs.close()


def test_the_first_sector_runs_and_is_told_its_drive(pcs: Pcs) -> None:
    letters = Letters()
    machine = pcs.machine(letters, pcs.disk())
    assert machine.read_physical(0x7C00, 512) == (pcs.workshop.folder / "disk").read_bytes()
    machine.start()
    letters.wait(2)
    machine.stop(RunState.PAUSED)
    assert letters.text.startswith(b"AB") and set(letters.text) == set(b"AB")
    counts = [machine.read_physical(address, 1)[0] for address in boot_sector.page_addresses(PAGES)]
    assert boot_sector.complaint(counts) == ""


@pytest.mark.parametrize("content", [None, bytes(512), b"\x55\xaa"], ids=["no-disk", "zeroes", "short"])
def test_what_does_not_end_in_55_aa_is_not_run(pcs: Pcs, content: bytes | None) -> None:
    disk = None
    if content is not None:
        disk = pcs.workshop.folder / "disk"
        disk.write_bytes(content)
    letters = Letters()
    pcs.machine(letters, disk).start()
    assert len(pcs.workshop.warnings) == 1 and "no bootable disk" in pcs.workshop.warnings[0]
    assert letters.text == b""


@pytest.mark.parametrize("port", RESETS_ITSELF)
def test_a_guest_resets_itself_by_a_port(pcs: Pcs, port: int) -> None:
    letters = Letters()
    out = f"{RESETS_ITSELF[port]} ba{port.to_bytes(2, 'little').hex()} ee f4"  # mov dx, port; out dx, al; hlt
    pcs.machine(letters, pcs.disk(code=f"{PRINT_A} {out}")).start()
    letters.wait(3, b"A")
    wait_until(lambda: ("RESET", True, "guest-reset") in pcs.workshop.events, "the reset is told")


def test_a_guest_powers_itself_off(pcs: Pcs) -> None:
    pcs.machine(Letters(), pcs.disk(code="ba0406 b80020 ef f4")).start()  # mov dx, 0x604; mov ax, 0x2000; out dx, ax; hlt
    wait_until(lambda: ("SHUTDOWN", True, "guest-shutdown") in pcs.workshop.events, "the end is told")


def test_firmware_that_is_given_takes_the_place_of_ours(pcs: Pcs) -> None:
    letters = Letters()
    machine = pcs.machine(letters, bios=pcs.workshop.image(flags=0))
    machine.start()
    letters.wait(1)
    assert pcs.workshop.warnings == []


def test_its_sections_are_those_that_it_shares_and_its_own(pcs: Pcs) -> None:
    machine = pcs.machine(Letters(), pcs.disk())
    names = [section.idstr for section in machine.sections()]
    assert names[-2:] == ["port92", "qemumig-pm"]
    assert {"timer", "cpu", "apic", "ioapic", "kvmclock", "i8259", "i8254", "mc146818rtc", "serial"} <= set(names)
    assert machine.machine_type == "qemumig-q35"
    assert [block.idstr for block in machine.ram_blocks] == ["pc.ram", "pc.bios"]


def test_a_stop_that_comes_before_the_suspend_keeps_it(pcs: Pcs) -> None:
    """The transition lock is held, so `vm/control` comes too late."""
    letters = Letters()
    machine = pcs.machine(letters, pcs.disk())
    machine.start()
    letters.wait(1)
    with machine._transition:
        machine.physical.write_port(0x604, 2, 0x2401)
        machine.stop(RunState.FINISH_MIGRATE)
    there = Letters()
    destination = pcs.machine(there, pcs.disk(), incoming=True)
    move(machine, destination)
    with pytest.raises(StateError, match="guest is not in suspended state"):
        destination.wake()
    destination.start()
    assert destination.runstate is RunState.SUSPENDED
    assert there.text == b""
    assert ("SUSPEND",) not in pcs.workshop.events


def test_a_guest_that_was_woken_can_tell_and_its_memory_is_there(pcs: Pcs) -> None:
    letters = Letters()
    machine = pcs.machine(letters, pcs.disk(suspends=True))
    machine.start()
    wait_until(lambda: machine.runstate is RunState.SUSPENDED, "it sleeps")
    assert letters.text == b"AB"
    machine.wake()
    letters.wait(2)
    assert letters.text.count(b"A") == 1
    assert machine.physical.read_port(0x600, 2) == 0x8000
    assert pcs.workshop.events == [("RESUME",), ("SUSPEND",), ("WAKEUP",)]
    assert not any(section.idstr == "qemumig-pm" and data[-1] for section, data in stopped(machine))


def stopped(machine: MicroVM) -> list:
    machine.stop(RunState.PAUSED)
    return device_bytes(machine)


def test_an_image_that_another_machine_has_cannot_be_booted_from(pcs: Pcs) -> None:
    first = pcs.machine(Letters(), pcs.disk())
    with pytest.raises(MachineError, match="disk 'd0'"):
        pcs.machine(Letters(), pcs.disk())
    first.stop(RunState.FINISH_MIGRATE)
    pcs.machine(Letters(), pcs.disk())


@pytest.mark.parametrize(
    ("name", "size", "below", "above"),
    [
        ("q35", 0xB000_0000 - MIB, 0xB000_0000 - MIB, 0),
        ("q35", 0xB000_0000, 2 * GIB, 0x3000_0000),
        ("pc", 0xE000_0000 - MIB, 0xE000_0000 - MIB, 0),
        ("pc", 4 * GIB, 3 * GIB, GIB),
    ],
)
def test_memory_is_split_as_in_the_pc_of_that_name(name: str, size: int, below: int, above: int) -> None:
    kind = find_machine(name)
    assert kind is not None
    pieces = [piece for piece in memory_map(size, FIRMWARE_SIZE, kind.low_memory(size)) if not piece.is_firmware]
    assert sum(piece.size for piece in pieces if piece.guest_address < 4 * GIB) == below - FIRMWARE_SIZE
    high = [Piece(4 * GIB, below, above, False)] if above else []
    assert [piece for piece in pieces if piece.guest_address >= 4 * GIB] == high


def test_the_firmware_begins_where_a_processor_does() -> None:
    image = firmware()
    assert len(image) == FIRMWARE_SIZE
    assert image[0xFFF0:0xFFF5] == bytes.fromhex("ea5be000f0")
