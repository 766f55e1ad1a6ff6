"""A guest of a machine unlike the destination: refused, in words that say why; the guest stays where it is.

The words are one sentence: on stderr where the process ends of it, in `error-desc` where it is told to stay.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest

from qemumig.cli.guest import ALL_CHECKS
from qemumig.cli.vmm import FINAL, MACHINE
from tests.support.host import qemumig_system
from tests.support.plain_stream import read_stream
from tests.support.vmm import MIB, GuestParameters, MachineShape, Stage, Vmm, VmmError, listen, wait_until
from tools.interoplib.peers import real
from tools.interoplib.transports import load, store_by_exec

pytestmark = pytest.mark.usefixtures("no_leaks")

TIMEOUT = 30.0
DISK = ("-blockdev", "driver=null-co,node-name=d0,read-zeroes=on")
DISK += ("-device", "virtio-blk-device,drive=d0,bus=virtio-mmio-bus.0")
SWITCHOVER_START = 11


@dataclass(frozen=True)
class Machine:
    """What is unlike the others; *memory* in MiB."""

    type: str = MACHINE
    memory: int = 64
    cpus: int = 1
    extra: tuple[str, ...] = ()


USUAL = Machine()


class Shape(MachineShape):
    """A machine of another type."""

    def options(self) -> list[str]:
        return super().options()[2:]  # the type is in `extra`


def start(stage: Stage, name: str, system: str, machine: Machine = USUAL, *, incoming: bool = False) -> Vmm:
    """A VMM with such a machine; the source's guest is not started."""
    image = stage.directory / f"{name}.bin"
    image.write_bytes(GuestParameters(flags=ALL_CHECKS, cpus=machine.cpus).image())
    shape = Shape(machine.memory * MIB, machine.cpus, image, ("-M", machine.type, *machine.extra))
    vmm = Vmm(name, system, stage.directory, shape, incoming=incoming, stopped=not incoming)
    stage.vmms.append(vmm)
    vmm.connect()
    return vmm


def log(vmm: Vmm) -> str:
    """Everything the process printed."""
    return (vmm.directory / f"{vmm.name}.log").read_text()


OUR_WORDS = {  # what the source is → what we say
    "pc": (Machine(type="pc"), r"configuration: machine type 'pc-i440fx-[\d.]+' received, this machine is 'microvm'"),
    "q35": (Machine(type="q35"), r"configuration: machine type 'pc-q35-[\d.]+' received, this machine is 'microvm'"),
    "more memory": (
        Machine(memory=128),
        r"RAM section at 0x\w+: block 'microvm.ram' has 0x4000000 bytes here, the stream says 0x8000000",
    ),
    "less memory": (
        Machine(memory=32),
        r"RAM section at 0x\w+: block 'microvm.ram' has 0x4000000 bytes here, the stream says 0x2000000",
    ),
    "more vCPUs": (Machine(cpus=2), r"section '(cpu_common|apic)' instance 1: this machine has \1 instance 0"),
    "a disk": (
        Machine(extra=DISK),
        r"section 'virtio-mmio@00000000feb00000/virtio-blk' instance 0: this machine has no section of that name",
    ),
    "ACPI": (
        Machine(type=MACHINE.replace("acpi=off", "acpi=on")),
        r"RAM section at 0x\w+: block '/rom@etc/acpi/tables' does not exist here, this machine has 'microvm.ram', '.*'",
    ),
}


@pytest.mark.parametrize("source_has", OUR_WORDS)
def test_we_say_why_a_guest_of_a_real_qemu_is_refused(stage: Stage, qemu: str, source_has: str) -> None:
    machine, words = OUR_WORDS[source_has]
    file = stage.directory / "stream"
    store_by_exec(start(stage, "source", qemu, machine), file, TIMEOUT)

    patient = start(stage, "patient", qemumig_system(), incoming=True)
    patient.command("migrate-incoming", uri=f"exec:cat {file}", exit_on_error=False)
    wait_until(lambda: patient.command("query-migrate")["status"] == "failed", "the refusal")
    reason = patient.command("query-migrate")["error-desc"]
    assert re.fullmatch(words, reason), reason
    assert patient.command("query-status")["status"] == "inmigrate"

    strict = start(stage, "strict", qemumig_system(), incoming=True)
    strict.command("migrate-incoming", uri=f"exec:cat {file}")
    wait_until(strict.has_died, "the end of the destination")
    assert strict.process.returncode == 1
    assert log(strict).strip() == f"qemumig-system: load of migration failed: {reason}"


THEIR_WORDS = {  # what the source, ours, is; what the destination is → what a real QEMU says, in any version
    "pc": (USUAL, Machine(type="pc"), r"Machine type received is 'microvm' and local is 'pc-i440fx-[\d.]+'"),
    "less memory": (USUAL, Machine(memory=32), r"Size mismatch: microvm\.ram: 0x4000000 != 0x2000000"),
    "fewer vCPUs": (Machine(cpus=2), USUAL, r"Unknown (savevm )?section or instance 'cpu_common' 1\."),
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
