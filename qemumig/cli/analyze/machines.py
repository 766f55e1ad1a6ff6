"""Whether a recording fits a machine of this package: what it has that the machine lacks, and what can be done."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from typing import Any

from ...savevm.devices.apic import APIC
from ...savevm.devices.cpu import CPU
from ...savevm.devices.cpu_common import CPU_COMMON
from ...savevm.devices.fw_cfg import FW_CFG
from ...savevm.devices.globalstate import GLOBALSTATE
from ...savevm.devices.ioapic import IOAPIC
from ...savevm.devices.kvm_tpr_opt import KVM_TPR_OPT
from ...savevm.devices.kvmclock import KVMCLOCK
from ...savevm.devices.serial import SERIAL
from ...savevm.devices.timer import TIMER
from ...savevm.devices.virtio_mmio import VIRTIO_BLK
from ...savevm.vmstate import VMState
from .model import Section, Stream
from .values import printable

_PER_CPU = 255  # instances of a section that every vCPU has, at most


@dataclass(frozen=True)
class KnownSection:
    """A section that a machine takes: instances 0 to *instances* − 1 of everything that matches *idstr*."""

    idstr: str  # a regular expression
    vmstate: VMState
    instances: int = 1


@dataclass(frozen=True)
class MachineModel:
    """What a machine takes from a stream."""

    machine_type: str
    sections: tuple[KnownSection, ...]
    blocks: tuple[str, ...]
    ram_block: str  # the one whose name a memory backend changes
    advice: dict[str, str]  # section name → how the source leaves it out


MICROVM = MachineModel(
    "microvm",
    (
        *(KnownSection(re.escape(one.name), one) for one in (TIMER, FW_CFG, KVM_TPR_OPT, IOAPIC, KVMCLOCK, SERIAL)),
        *(KnownSection(re.escape(one.name), one, _PER_CPU) for one in (CPU_COMMON, CPU, APIC)),
        KnownSection("globalstate", GLOBALSTATE),
        KnownSection(r"virtio-mmio@00000000feb00[0-9a-e]00/virtio-blk", VIRTIO_BLK),
    ),
    ("microvm.ram", "pc.bios"),
    "microvm.ram",
    {
        "acpi-ged": "start the source with -M microvm,acpi=off",
        "ioapic": "a second I/O APIC comes with ACPI: start the source with -M microvm,acpi=off",
        "i8254": "start the source with -M microvm,pit=off",
        "i8259": "start the source with -M microvm,pic=off",
        "mc146818rtc": "start the source with -M microvm,rtc=off",
        "serial": "leave out all serial ports but the first",
        "dirty-bitmap": "switch the capability dirty-bitmaps off on the source",
        "block": "switch the capability block off on the source, and copy the disk by other means",
    },
)
MACHINES = {MICROVM.machine_type: MICROVM}


@dataclass(frozen=True)
class Lack:
    """Something that the recording has and the machine does not take."""

    what: str
    why: str
    advice: str


@dataclass
class Fit:
    """How a recording and a machine go together."""

    machine: str
    recorded: str | None
    lacks: list[Lack] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        return not self.lacks

    def as_json(self) -> dict[str, Any]:
        return {"fits": self.fits, **asdict(self)}


def fit(stream: Stream, machine: MachineModel) -> Fit:
    """What *machine* would refuse of *stream*, as far as names and versions tell."""
    result = Fit(machine.machine_type, stream.machine_type)
    if stream.machine_type != machine.machine_type:
        recorded = "no machine name" if stream.machine_type is None else printable(stream.machine_type)
        result.lacks.append(
            Lack(
                "machine type",
                f"the recording is of {recorded}, this machine is {machine.machine_type}",
                f"a guest keeps its machine type for life: start it anew with -M {machine.machine_type}",
            )
        )
    for section in {one.identity: one for one in stream.sections if one.idstr != "ram"}.values():
        result.lacks += _section_lacks(section, machine)
    result.lacks += _block_lacks(stream, machine)
    return result


def _section_lacks(section: Section, machine: MachineModel) -> list[Lack]:
    what = f"section {printable(section.idstr)} instance {section.instance_id}"
    advice = machine.advice.get(section.idstr, "start the source without that device")
    known = next((one for one in machine.sections if re.fullmatch(one.idstr, section.idstr)), None)
    if known is None:
        return [Lack(what, f"{machine.machine_type} has no such section", advice)]
    if section.instance_id >= known.instances:
        return [Lack(what, f"{machine.machine_type} has {known.instances} of them, counted from 0", advice)]
    if not known.vmstate.accepts(section.version_id):
        return [
            Lack(
                what,
                f"version {section.version_id} recorded, {machine.machine_type} takes "
                f"{known.vmstate.oldest_version} to {known.vmstate.version_id}",
                "record it with a machine version that both sides know",
            )
        ]
    return []


def _block_lacks(stream: Stream, machine: MachineModel) -> list[Lack]:
    names = [one.name for one in stream.blocks]
    result = []
    for position, name in enumerate(names):
        if name in machine.blocks:
            continue
        what = f"RAM block {printable(name)}"
        if machine.ram_block not in names and position == 0:
            advice = f"give the destination a memory backend with id={printable(name)} and -M …,memory-backend=…"
            result.append(Lack(what, f"the main memory of {machine.machine_type} is {machine.ram_block}", advice))
        else:
            acpi = name.startswith("/rom@etc/")
            advice = "start the source with -M microvm,acpi=off" if acpi else "start the source without that device"
            result.append(Lack(what, f"{machine.machine_type} has {' and '.join(machine.blocks)}", advice))
    return result
