"""A guest of a machine unlike the destination: refused, in words that say why; the guest stays where it is.

The words are one sentence: on stderr where the process ends of it, in `error-desc` where it is told to stay.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from qemumig.cli.guest import ALL_CHECKS
from qemumig.cli.vmm import FINAL, MACHINE
from tests.support.host import qemumig_system
from tests.support.plain_stream import read_stream
from tests.support.vmm import (
    MIB,
    GuestParameters,
    MachineShape,
    Stage,
    Vmm,
    VmmError,
    listen,
    wait_until,
    with_capabilities,
)
from tools.interoplib.peers import real
from tools.interoplib.transports import load, store_by_exec

pytestmark = pytest.mark.usefixtures("no_leaks")

TIMEOUT = 30.0
IMAGE = "driver=file,node-name=d0,filename=IMAGE"
UUID = "00112233-4455-6677-8899-aabbccddeeff"
OTHER_UUID = "ffeeddcc-bbaa-9988-7766-554433221100"
SWITCHOVER_START = 11


@dataclass(frozen=True)
class Machine:
    """What is unlike the others; *memory* in MiB."""

    type: str = MACHINE
    memory: int = 64
    cpus: int = 1
    extra: tuple[str, ...] = ()
    capabilities: tuple[str, ...] = ()


USUAL = Machine()


def with_switch(switch: str) -> Machine:
    """A machine with a device that the usual one leaves out."""
    name = switch.partition("=")[0]
    return Machine(type=MACHINE.replace(f"{name}=off", switch))


def with_disk(slot: int) -> Machine:
    return Machine(extra=("-blockdev", IMAGE, "-device", f"virtio-blk-device,drive=d0,bus=virtio-mmio-bus.{slot}"))


def with_property(name: str) -> Machine:
    return Machine(extra=("-global", f"{name}=off"))


class Shape(MachineShape):
    """A machine of another type."""

    def options(self) -> list[str]:
        return super().options()[2:]  # the type is in `extra`


def start(stage: Stage, name: str, system: str, machine: Machine = USUAL, *, incoming: bool = False) -> Vmm:
    """A VMM with such a machine; the source's guest is not started."""
    image = stage.directory / f"{name}.bin"
    image.write_bytes(GuestParameters(flags=ALL_CHECKS, cpus=machine.cpus).image())
    disk = stage.directory / f"{name}.disk"
    disk.write_bytes(bytes(MIB))
    extra = [word.replace("IMAGE", str(disk)) for word in machine.extra]
    shape = Shape(machine.memory * MIB, machine.cpus, image, ("-M", machine.type, *extra))
    vmm = Vmm(name, system, stage.directory, shape, incoming=incoming, stopped=not incoming)
    stage.vmms.append(vmm)
    vmm.connect()
    if machine.capabilities:
        with_capabilities([vmm], **dict.fromkeys(machine.capabilities, True))
    return vmm


def log(vmm: Vmm) -> str:
    """Everything the process printed."""
    return (vmm.directory / f"{vmm.name}.log").read_text()


@dataclass(frozen=True)
class Refusal:
    """A guest of *there* that *here* does not take: *words* say why, before the remedy, and *remedy* what would help.

    *pasted*: the remedy is a command line, and with it the guest is taken.
    """

    there: Machine
    words: str
    remedy: str
    here: Machine = USUAL
    pasted: bool = False


def no_section(idstr: str) -> str:
    return rf"section '{idstr}' instance 0 at offset 0x\w+: this machine has no section of that name, it has 'ram', .*"


def no_device(device: str) -> str:
    return f"no option adds {device} to this machine: start the guest without it"


def another_type(name: str) -> str:
    return (
        f"a guest keeps its machine type: give it to a QEMU started with -M {name}, or start it anew with -M microvm; "
        "'qemumig analyze --for microvm FILE' lists what else of a recording this machine lacks"
    )


def off_at_the_source(capability: str) -> str:
    return f"say 'migrate_set_capability {capability} off' at the source"


CONFIGURATION = "configuration at offset 0x8"
BLOCK = r"section 'ram' instance 0 at offset 0x\w+: block"
PC, Q35 = r"pc-i440fx-[\d.]+", r"pc-q35-[\d.]+"

OUR_WORDS = {  # what the source has
    "pc": Refusal(
        Machine(type="pc"), f"{CONFIGURATION}: machine type '{PC}' received, this machine is 'microvm'", another_type(PC)
    ),
    "q35": Refusal(
        Machine(type="q35"), f"{CONFIGURATION}: machine type '{Q35}' received, this machine is 'microvm'", another_type(Q35)
    ),
    "more memory": Refusal(
        Machine(memory=128),
        f"{BLOCK} 'microvm.ram' has 0x4000000 bytes here, the stream says 0x8000000",
        "-m 128M",
        pasted=True,
    ),
    "less memory": Refusal(
        Machine(memory=32),
        f"{BLOCK} 'microvm.ram' has 0x4000000 bytes here, the stream says 0x2000000",
        "-m 32M",
        pasted=True,
    ),
    "memory of another name": Refusal(
        Machine(type=f"{MACHINE},memory-backend=m0", extra=("-object", "memory-backend-ram,id=m0,size=64M")),
        f"{BLOCK} 'm0' does not exist here, this machine has 'microvm.ram', 'pc.bios'",
        "-m 64M -object memory-backend-ram,id=m0,size=64M -M memory-backend=m0",
        pasted=True,
    ),
    "more vCPUs": Refusal(
        Machine(cpus=2),
        r"section '(cpu_common|apic)' instance 1 at offset 0x\w+: this machine has \1 instance 0",
        r"-smp 2 \(or more: as many vCPUs as the source has\)",
        pasted=True,
    ),
    "a disk": Refusal(
        with_disk(0),
        no_section("virtio-mmio@00000000feb00000/virtio-blk"),
        "-blockdev driver=file,node-name=disk0,filename=IMAGE -device virtio-blk-device,drive=disk0,bus=virtio-mmio-bus.0"
        r" \(with the source's own -blockdev options and image\)",
        pasted=True,
    ),
    "a disk in another slot": Refusal(
        with_disk(3),
        no_section("virtio-mmio@00000000feb00600/virtio-blk"),
        r"-blockdev .* -device virtio-blk-device,drive=disk3,bus=virtio-mmio-bus.3 \(.*\)",
        here=with_disk(7),
    ),
    "a network card": Refusal(
        Machine(extra=("-device", "virtio-net-device,bus=virtio-mmio-bus.1")),
        no_section("virtio-mmio@00000000feb00200/virtio-net"),
        no_device("a virtio-net"),
    ),
    "another serial port": Refusal(
        Machine(extra=("-chardev", "null,id=nul", "-device", "isa-serial,iobase=0x2f8,irq=3,chardev=nul")),
        r"section 'serial' instance 1 at offset 0x\w+: this machine has serial instance 0",
        no_device("another serial port"),
    ),
    "a PIT": Refusal(with_switch("pit=on"), no_section("i8254"), "-M pit=on"),
    "PICs": Refusal(with_switch("pic=on"), no_section("i8259"), "-M pic=on"),
    "an RTC": Refusal(with_switch("rtc=on"), no_section("mc146818rtc"), "-M rtc=on"),
    "ACPI": Refusal(
        with_switch("acpi=on"),
        f"{BLOCK} '/rom@etc/acpi/tables' does not exist here, this machine has 'microvm.ram', 'pc.bios'",
        "-M acpi=on",
    ),
    "the vAPIC helper": Refusal(
        USUAL,
        no_section("kvm-tpr-opt"),
        "-global apic-common.vapic=on",
        here=with_property("apic-common.vapic"),
        pasted=True,
    ),
    "no footers": Refusal(
        with_property("migration.send-section-footer"),
        r"section 'ram' at offset 0x\w+: 0x0\w found, expected its footer \(0x7e\)",
        r"-global migration.send-section-footer=off \(if the source has that option\)",
        pasted=True,
    ),
    "footers": Refusal(
        USUAL,
        r"section at offset 0x\w+: type 0x7e found, expected START .*",
        "start the destination without -global migration.send-section-footer=off",
        here=with_property("migration.send-section-footer"),
    ),
    "another UUID": Refusal(
        Machine(extra=("-uuid", UUID), capabilities=("validate-uuid",)),
        f"{CONFIGURATION}: UUID {UUID} received, this machine has {OTHER_UUID}",
        rf"-uuid {UUID} \(or say 'migrate_set_capability validate-uuid off' at the source\)",
        here=Machine(extra=("-uuid", OTHER_UUID)),
        pasted=True,
    ),
    "x-ignore-shared": Refusal(
        Machine(capabilities=("x-ignore-shared",)),
        f"{CONFIGURATION}: capability 'x-ignore-shared' is on at the source and off here, expected the same",
        off_at_the_source("x-ignore-shared"),
    ),
    "dirty-bitmaps": Refusal(
        Machine(capabilities=("dirty-bitmaps",)),
        r"MIG_CMD_POSTCOPY_ADVISE at offset 0x\w+: the source has capability 'dirty-bitmaps' on, which is not built in .*",
        off_at_the_source("dirty-bitmaps"),
    ),
}
START = "start the destination with "


def refusal(stage: Stage, name: str, machine: Machine, file: Path) -> str:
    """What a destination of ours says of the stream in *file*."""
    patient = start(stage, name, qemumig_system(), machine, incoming=True)
    patient.command("migrate-incoming", uri=f"exec:cat {file}", exit_on_error=False)
    wait_until(lambda: patient.command("query-migrate")["status"] == "failed", "the refusal")
    assert patient.command("query-status")["status"] == "inmigrate"
    reason: str = patient.command("query-migrate")["error-desc"]
    return reason


@pytest.mark.parametrize("source_has", OUR_WORDS)
def test_we_say_why_a_guest_of_a_real_qemu_is_refused_and_what_would_help(stage: Stage, qemu: str, source_has: str) -> None:
    expected = OUR_WORDS[source_has]
    file = stage.directory / "stream"
    store_by_exec(start(stage, "source", qemu, expected.there), file, TIMEOUT)
    reason = refusal(stage, "patient", expected.here, file)
    remedy = START + expected.remedy if expected.remedy.startswith("-") else expected.remedy
    assert re.fullmatch(f"{expected.words}; {remedy}", reason), reason
    if expected.pasted:
        options = reason.partition(START)[2].partition(" (")[0]
        helped = replace(expected.here, extra=(*expected.here.extra, *shlex.split(options)))
        destination = start(stage, "helped", qemumig_system(), helped, incoming=True)
        load(destination, f"exec:cat {file}", TIMEOUT)


def test_the_reason_is_the_last_word_of_a_destination_that_ends_of_it(stage: Stage, qemu: str) -> None:
    file = stage.directory / "stream"
    store_by_exec(start(stage, "source", qemu, Machine(memory=32)), file, TIMEOUT)
    reason = refusal(stage, "patient", USUAL, file)
    strict = start(stage, "strict", qemumig_system(), incoming=True)
    strict.command("migrate-incoming", uri=f"exec:cat {file}")
    wait_until(strict.has_died, "the end of the destination")
    assert strict.process.returncode == 1
    assert log(strict).strip() == f"qemumig-system: load of migration failed: {reason}"


NO_CHANNEL_SEEN = (
    "stream ends inside .*; the source was gone before it had sent any contents, .* 'migrate_set_capability .*"
)
ASKED_FOR_TOO_MUCH = {  # a capability of the source that needs an answer → what we say
    "postcopy-ram": r"MIG_CMD_POSTCOPY_ADVISE at offset 0x\w+: the source has capability 'postcopy-ram' on, .*",
    "multifd": "capability 'multifd' is on at the source and off here, expected the same; "
    f"{off_at_the_source('multifd')}|{NO_CHANNEL_SEEN}",  # where all was over before a channel had said what it is
}


@pytest.mark.parametrize("capability", ASKED_FOR_TOO_MUCH)
def test_a_capability_that_only_the_source_has_on_is_named_and_its_guest_runs_on(
    stage: Stage, qemu: str, capability: str
) -> None:
    source = start(stage, "source", qemu, Machine(capabilities=(capability,)))
    source.command("cont")
    destination = start(stage, "destination", qemumig_system(), incoming=True)
    destination.command("migrate-incoming", uri="tcp:127.0.0.1:0", exit_on_error=False)
    (address,) = destination.command("query-migrate")["socket-address"]
    source.command("migrate", uri=f"tcp:{address['host']}:{address['port']}")
    wait_until(lambda: destination.command("query-migrate")["status"] == "failed", "the refusal")
    reason = destination.command("query-migrate")["error-desc"]
    assert re.fullmatch(ASKED_FOR_TOO_MUCH[capability], reason), reason
    wait_until(lambda: source.command("query-migrate")["status"] == "failed", "the end of the migration")
    source.wait_runstate("running")
    stage.assert_guest_is_well(source, arrived=False)


UNKNOWN = r"Unknown (savevm )?section or instance"
THEIR_WORDS = {  # what the source, ours, is; what the destination is → what a real QEMU says, in any version
    "pc": (USUAL, Machine(type="pc"), r"Machine type received is 'microvm' and local is 'pc-i440fx-[\d.]+'"),
    "less memory": (USUAL, Machine(memory=32), r"Size mismatch: microvm\.ram: 0x4000000 != 0x2000000"),
    "memory of another name": (
        USUAL,
        Machine(type=f"{MACHINE},memory-backend=m0", extra=("-object", "memory-backend-ram,id=m0,size=64M")),
        'Unknown ramblock "microvm.ram"',
    ),
    "fewer vCPUs": (Machine(cpus=2), USUAL, rf"{UNKNOWN} 'cpu_common' 1\."),
    "no disk": (with_disk(0), USUAL, rf"{UNKNOWN} 'virtio-mmio@00000000feb00000/virtio-blk' 0"),
    "its disk in another slot": (with_disk(3), with_disk(7), rf"{UNKNOWN} 'virtio-mmio@00000000feb00600/virtio-blk' 0"),
    "no vAPIC helper": (USUAL, with_property("apic-common.vapic"), rf"{UNKNOWN} 'kvm-tpr-opt' 0"),
    "footers": (with_property("migration.send-section-footer"), USUAL, "Missing section footer for ram"),
    "a configuration": (with_property("migration.send-configuration"), USUAL, "Configuration section missing"),
    "another UUID": (
        Machine(extra=("-uuid", UUID), capabilities=("validate-uuid",)),
        Machine(extra=("-uuid", OTHER_UUID)),
        f"UUID received is {UUID} and local is {OTHER_UUID}",
    ),
    "x-ignore-shared": (USUAL, Machine(capabilities=("x-ignore-shared",)), "Capability x-ignore-shared is on"),
}


@pytest.mark.parametrize("destination_has", THEIR_WORDS)
def test_real_qemu_says_why_our_guest_is_refused(stage: Stage, qemu: str, destination_has: str) -> None:
    ours, theirs, words = THEIR_WORDS[destination_has]
    source = start(stage, "source", qemumig_system(), ours)
    destination = start(stage, "destination", qemu, theirs, incoming=True)
    source.command("migrate", uri=listen(destination))
    wait_until(lambda: source.command("query-migrate")["status"] in FINAL, "the refusal")
    assert source.command("query-migrate")["status"] == "failed"
    assert source.command("query-migrate")["error-desc"]
    wait_until(destination.has_died, "the end of the destination")
    assert destination.process.returncode == 1
    assert re.search(words, log(destination)), log(destination)
    source.command("cont")
    stage.assert_guest_is_well(source, arrived=False)


@pytest.mark.parametrize("direction", ["to-qemu", "from-qemu"])
def test_refused_guest_runs_on_at_its_source(stage: Stage, qemu: str, direction: str) -> None:
    systems = [qemumig_system(), qemu]
    there, here = systems if direction == "to-qemu" else reversed(systems)
    source = stage.vmm("source", there, guest=GuestParameters(flags=ALL_CHECKS), memory=128 * MIB)
    destination = start(stage, "destination", here, incoming=True)
    source.command("migrate", uri=listen(destination))
    wait_until(lambda: source.command("query-migrate")["status"] in FINAL, "the refusal")
    assert source.command("query-migrate")["status"] == "failed"
    source.wait_runstate("running")
    stage.assert_guest_is_well(source, arrived=False)
    wait_until(destination.has_died, "the end of the destination")


# --- SWITCHOVER_START, a command of QEMU 10.0 on (stream.md §9)


def switchover_setting(setting: str) -> Machine:
    return Machine(extra=("-global", f"migration.send-switchover-start={setting}"))


def says_switchover_start(stream: bytes) -> bool:
    return SWITCHOVER_START in [number for number, _ in read_stream(stream).commands]


@pytest.mark.parametrize("setting", ["on", "off", "default"])
def test_we_take_a_stream_with_switchover_start_and_one_without(stage: Stage, qemu: str, setting: str) -> None:
    """A QEMU that is too old to have the setting says so, and never sends the command."""
    is_new = real(qemu).is_since(10)
    if setting != "default" and not is_new:
        with pytest.raises(VmmError, match="send-switchover-start"):
            start(stage, "source", qemu, switchover_setting(setting))
        return
    source = start(stage, "source", qemu, USUAL if setting == "default" else switchover_setting(setting))
    source.command("cont")
    assert source.serial.wait_more(4, TIMEOUT)
    file = stage.directory / "stream"
    store_by_exec(source, file, TIMEOUT)
    assert says_switchover_start(file.read_bytes()) == (is_new and setting != "off")
    destination = start(stage, "destination", qemumig_system(), incoming=True)
    load(destination, f"exec:cat {file}", TIMEOUT)
    destination.wait_runstate("running")
    stage.assert_guest_is_well(destination)


@pytest.mark.parametrize("setting", ["on", "off"])
def test_real_qemu_takes_our_switchover_start_if_it_knows_it(stage: Stage, qemu: str, setting: str) -> None:
    source = start(stage, "source", qemumig_system(), switchover_setting(setting))
    file = stage.directory / "stream"
    store_by_exec(source, file, TIMEOUT)
    assert says_switchover_start(file.read_bytes()) == (setting == "on")
    destination = start(stage, "destination", qemu, incoming=True)
    if setting == "off" or real(qemu).is_since(10):
        load(destination, f"exec:cat {file}", TIMEOUT)
        destination.wait_runstate("prelaunch")  # as at the source, where it was never started
        destination.command("cont")
        stage.assert_guest_is_well(destination, arrived=False)
    else:
        destination.command("migrate-incoming", uri=f"exec:cat {file}")
        wait_until(destination.has_died, "the end of the destination")
        assert "MIG_CMD 0xb unknown" in log(destination)
