"""A microvm's optional devices between qemumig and a real QEMU: the guest moves there and back with its checks on.

Two guests: one checks its memory, its registers and its disk; the other counts what PIT and RTC ask for, through the PICs.
Both machines get the same options, which add to those that turn everything off.
"""

from __future__ import annotations

import struct
import time
from pathlib import Path

import pytest

from kvm.devices.virtio_mmio import slot_address
from qemumig.cli.guest import ALL_CHECKS, FILL_HALF_RANDOM
from qemumig.cli.vmm import MachineShape
from tests.support import ticker
from tests.support.elf import elf_file
from tests.support.host import qemumig_system
from tests.support.vmm import MIB, GuestParameters, Stage, Vmm, VmmError, migrate, wait_until

pytestmark = pytest.mark.usefixtures("no_leaks")

CHECK_DISK = 16
CHIPSETS = {
    "acpi": "acpi=on",
    "acpi-one-ioapic": "acpi=on,ioapic2=off",
    "pit-pic": "pit=on,pic=on",
    "rtc": "rtc=on",
    "all": "acpi=on,pit=on,pic=on,rtc=on",
}
SLOTS = {"acpi": 24, "acpi-one-ioapic": 8}
DAY_S = 86400
_DISK_REGISTERS_AT = 0x54  # in the guest's parameters


def options(chipset: str) -> tuple[str, ...]:
    return "-M", CHIPSETS[chipset]


def disk(directory: Path, bus: str) -> tuple[str, ...]:
    """A disk of 1 MiB; without *bus* both ends choose its slot."""
    image = directory / "disk.img"
    if not image.exists():
        image.write_bytes(bytes(MIB))
    device = f"virtio-blk-device,drive=d0{bus}"
    return "-blockdev", f"driver=file,node-name=d0,filename={image},locking=off", "-device", device


def guest_with_disk(slot: int) -> GuestParameters:
    """The checking guest, with its disk in *slot*."""

    class Guest(GuestParameters):
        def image(self) -> bytes:
            image = bytearray(super().image())
            struct.pack_into("<I", image, _DISK_REGISTERS_AT, slot_address(slot))
            return bytes(image)

    return Guest(dirty_pages=64, print_every=20, flags=CHECK_DISK)


def move_stopped(source: Vmm, destination: Vmm) -> None:
    """Migrate a guest that stands still, and compare all of its memory."""
    source.command("stop")
    status = source.guest_status()
    migrate(source, destination)
    destination.wait_runstate("paused")
    assert destination.memory_digest() == source.memory_digest()
    assert destination.guest_status() == status
    destination.command("cont")


@pytest.mark.parametrize("chipset", ["acpi-one-ioapic", "pit-pic", "all"])
def test_the_checking_guest_goes_there_and_back_with_its_memory_equal(stage: Stage, qemu: str, chipset: str) -> None:
    parameters = GuestParameters(fill_pages=256, fill_mode=FILL_HALF_RANDOM, flags=ALL_CHECKS, cpus=2)
    more = options(chipset)
    first = stage.vmm("first", qemumig_system(), guest=parameters, memory=64 * MIB, extra=more)
    second = stage.vmm("second", qemu, memory=64 * MIB, incoming=True, extra=more)
    move_stopped(first, second)
    stage.assert_guest_is_well(second)
    first.close()
    third = stage.vmm("third", qemumig_system(), memory=64 * MIB, incoming=True, extra=more)
    migrate(second, third)  # while it runs
    stage.assert_guest_is_well(third)


@pytest.mark.needs("kvm")
def test_the_machine_without_options_moves_to_another_one(stage: Stage) -> None:
    more = ("-M", "acpi=auto,pit=auto,pic=auto,rtc=auto", *disk(stage.directory, ",bus=virtio-mmio-bus.23"))
    source = stage.vmm("source", qemumig_system(), guest=GuestParameters(flags=ALL_CHECKS), extra=more)
    destination = stage.vmm("destination", qemumig_system(), incoming=True, extra=more)
    move_stopped(source, destination)
    stage.assert_guest_is_well(destination)


@pytest.mark.needs("kvm")
def test_a_machine_with_another_chipset_is_refused_by_the_section_that_it_lacks(stage: Stage) -> None:
    source = stage.vmm("source", qemumig_system(), guest=GuestParameters(), extra=options("rtc"))
    destination = stage.vmm("destination", qemumig_system(), incoming=True)
    with pytest.raises(VmmError):
        migrate(source, destination)
    assert destination.process.wait(30) == 1
    assert "mc146818rtc" in destination.last_words()
    stage.assert_guest_is_well(source, arrived=False)


@pytest.mark.parametrize(
    ("chipset", "bus"),
    [("acpi", ""), ("acpi-one-ioapic", ",bus=virtio-mmio-bus.0")],
    ids=["last-of-24-slots", "first-of-8-slots"],
)
def test_a_disk_behind_another_interrupt_line_goes_there_and_back(stage: Stage, qemu: str, chipset: str, bus: str) -> None:
    parameters = guest_with_disk(0 if bus else SLOTS[chipset] - 1)
    more = (*options(chipset), *disk(stage.directory, bus))
    vmm = stage.vmm("first", qemu, guest=parameters, extra=more)
    for name, system in (("second", qemumig_system()), ("third", qemu)):
        following = stage.vmm(name, system, incoming=True, extra=more)
        migrate(vmm, following)
        vmm = following
        assert vmm.serial.wait_more(70, 30), f"{name}: the guest printed only {vmm.serial.output()[-40:]!r}"
        stage.assert_guest_is_well(vmm)


class TickingVmm:
    """A VMM with the counting guest; its serial port tells what comes."""

    def __init__(self, stage: Stage, name: str, system: str, chipset: str, *, incoming: bool = False) -> None:
        image = ticker.write_image(stage.directory, ticker.USE_PIT | ticker.USE_RTC)
        shape = MachineShape(64 * MIB, 1, image, options(chipset))
        self.vmm = Vmm(name, system, stage.directory, shape, incoming=incoming)
        stage.vmms.append(self.vmm)
        self.vmm.connect()
        self.vmm.command("migrate-set-parameters", max_bandwidth=0)
        self._path = stage.directory / f"{name}.status"

    def ticks(self) -> ticker.Ticks:
        def read(address: int, size: int) -> bytes:
            self.vmm.command("pmemsave", val=address, size=size, filename=str(self._path))
            return self._path.read_bytes()

        return ticker.ticks(read)

    def wait(self, pit: int, rtc: int) -> ticker.Ticks:
        """Until there were so many ticks."""

        def enough() -> bool:
            now = self.ticks()
            return now.pit >= pit and now.rtc >= rtc

        wait_until(enough, f"{self.vmm.name}: {self.ticks()}, expected {pit} ticks of the PIT, {rtc} of the RTC")
        return self.ticks()


@pytest.mark.parametrize(("chipset", "direction"), [("all", "to-qemu"), ("all", "from-qemu"), ("pit-pic", "from-qemu")])
def test_pit_and_rtc_tick_on_through_the_pics(stage: Stage, qemu: str, direction: str, chipset: str) -> None:
    uses_rtc = chipset == "all"
    systems = [qemumig_system(), qemu] if direction == "to-qemu" else [qemu, qemumig_system()]
    source = TickingVmm(stage, "source", systems[0], chipset)
    source.wait(20, 20 * uses_rtc)
    destination = TickingVmm(stage, "destination", systems[1], chipset, incoming=True)
    migrate(source.vmm, destination.vmm)
    left = source.ticks()
    arrived = time.monotonic()
    came = destination.wait(left.pit + 50, left.rtc + 30 * uses_rtc)
    took = time.monotonic() - arrived
    assert came.pit - left.pit <= (took + 5) * ticker.PIT_HZ  # what it counted while it was asked is not known so exactly
    assert came.no_cause <= 1
    assert b"A" not in destination.vmm.serial.output() and b"X" not in destination.vmm.serial.output()
    if uses_rtc:
        hour, minute, second = came.time
        now = time.gmtime()
        late = (now.tm_hour * 60 + now.tm_min) * 60 + now.tm_sec - (hour * 60 + minute) * 60 - second
        assert min(late % DAY_S, -late % DAY_S) <= 5


# ---- bytes that a loader puts into memory ----


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "cut-off"])
def test_an_elf_file_is_in_the_same_places(stage: Stage, qemu: str, bits: int, whole: bool) -> None:
    contents = elf_file([(0x40010000, 0x10000, b"first", 32), (0, 0x20000, b"second", 6)], entry=0x40010004, bits=bits)
    file = stage.directory / "program"
    file.write_bytes(contents if whole else contents[:100])  # within the program headers
    found = []
    for name, system in (("theirs", qemu), ("ours", qemumig_system())):
        extra = ("-device", f"loader,file={file},addr=0x8000,cpu-num=0")
        vmm = stage.vmm(name, system, memory=64 * MIB, stopped=True, extra=extra)
        vmm.command("pmemsave", val=0, size=256 << 10, filename=str(stage.directory / name))
        memory = (stage.directory / name).read_bytes()
        found.append([memory[start : start + 64] for start in (0x8000, 0x10000, 0x20000)])
    assert found[0] == found[1]
    assert found[0][1].startswith(b"first") == whole
