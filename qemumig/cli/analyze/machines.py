"""Whether a recording fits a machine of this package: what it has that the machine lacks, and what can be done.

lacks   what no option of the machine provides
needs   what an option provides: the machine is to be started with it
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from ...options import CAPABILITIES
from ...savevm import commands, remedies
from ...savevm.devices.acpi_ged import ACPI_GED
from ...savevm.devices.apic import APIC
from ...savevm.devices.cpu import CPU
from ...savevm.devices.cpu_common import CPU_COMMON
from ...savevm.devices.fw_cfg import FW_CFG
from ...savevm.devices.globalstate import GLOBALSTATE
from ...savevm.devices.i8254 import I8254
from ...savevm.devices.i8259 import I8259
from ...savevm.devices.ioapic import IOAPIC
from ...savevm.devices.kvm_tpr_opt import KVM_TPR_OPT
from ...savevm.devices.kvmclock import KVMCLOCK
from ...savevm.devices.mc146818rtc import MC146818RTC
from ...savevm.devices.serial import SERIAL
from ...savevm.devices.timer import TIMER
from ...savevm.devices.virtio_mmio import VIRTIO_BLK
from ...savevm.remedies import Remedy
from ...savevm.vmstate import VMState
from .model import Block, CommandElement, Section, Stream
from .values import printable

_PER_CPU = 255  # instances of a section that every vCPU has, at most
_VIRTIO_BLK = r"virtio-mmio@00000000feb0[0-2][02468ace]00/virtio-blk"
_BUILT = frozenset(one.name for one in CAPABILITIES if one.built)


@dataclass(frozen=True)
class KnownSection:
    """Sections that a machine takes: instances 0 to *instances* − 1 of everything that matches *idstr*.

    The first *always* of them it has in any case, the others with an option.
    """

    idstr: str  # a regular expression
    vmstate: VMState
    instances: int = 1
    always: int = 1


@dataclass(frozen=True)
class MachineModel:
    """What a machine takes from a stream; *optional_blocks* are there with an option."""

    machine_type: str
    sections: tuple[KnownSection, ...]
    blocks: tuple[str, ...]
    optional_blocks: str  # a regular expression


MICROVM = MachineModel(
    "microvm",
    (
        *(KnownSection(re.escape(one.name), one) for one in (TIMER, FW_CFG, KVM_TPR_OPT, KVMCLOCK, SERIAL, GLOBALSTATE)),
        *(KnownSection(re.escape(one.name), one, _PER_CPU) for one in (CPU_COMMON, CPU, APIC)),
        KnownSection("ioapic", IOAPIC, instances=2),
        *(KnownSection(re.escape(one.name), one, always=0) for one in (ACPI_GED, I8254, MC146818RTC)),
        KnownSection("i8259", I8259, instances=2, always=0),
        KnownSection(_VIRTIO_BLK, VIRTIO_BLK, always=0),
    ),
    ("microvm.ram", "pc.bios"),
    r"/rom@etc/(acpi/tables|table-loader|acpi/rsdp)",
)
MACHINES = {MICROVM.machine_type: MICROVM}


@dataclass(frozen=True)
class Lack:
    """Something that the recording has and the machine does not take."""

    what: str
    why: str
    advice: str


@dataclass(frozen=True)
class Need:
    """Something that the machine takes when it is started with *options*; *note* is about them."""

    what: str
    options: str
    note: str


@dataclass
class Fit:
    """How a recording and a machine go together."""

    machine: str
    recorded: str | None
    lacks: list[Lack] = field(default_factory=list)
    needs: list[Need] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        return not self.lacks

    def as_json(self) -> dict[str, Any]:
        return {"fits": self.fits, **asdict(self)}

    def lines(self) -> Iterator[str]:
        """The answer, for people."""
        yield f"{self.machine} {'takes' if self.fits else 'does not take'} it" + (":" if self.lacks or self.needs else "")
        for (why, advice), what in _grouped((one.what, (one.why, one.advice)) for one in self.lacks):
            yield f"  {what}: {why}"
            if advice:
                yield f"      {advice}"
        for (options, note), what in _grouped((one.what, (one.options, one.note)) for one in self.needs):
            yield f"  {what}: start it with {options}" + (f" ({note})" if note else "")


Reason = tuple[str, str]


def _grouped(found: Iterable[tuple[str, Reason]]) -> Iterator[tuple[Reason, str]]:
    """Each reason once, with all that it holds for."""
    groups: dict[Reason, list[str]] = {}
    for what, reason in found:
        groups.setdefault(reason, []).append(what)
    return ((reason, ", ".join(several)) for reason, several in groups.items())


def fit(stream: Stream, machine: MachineModel) -> Fit:
    """What *machine* would refuse of *stream*, as far as names, versions and lengths tell."""
    result = Fit(machine.machine_type, stream.machine_type)
    if stream.machine_type != machine.machine_type:
        recorded = "no machine name" if stream.machine_type is None else printable(stream.machine_type)
        why = f"the recording is of {recorded}, this machine is {machine.machine_type}"
        advice = str(remedies.for_machine_type(stream.machine_type or "", machine.machine_type))
        result.lacks.append(Lack("machine type", why, advice if stream.machine_type else ""))
    for name in _capabilities(stream):
        why = "the source had it on, and it is not built in this version of qemumig"
        result.lacks.append(Lack(f"capability {printable(name)}", why, str(remedies.for_capability(name, on_here=False))))
    sections = {one.identity: one for one in stream.sections if one.idstr != "ram"}
    for section in sections.values():
        _fit_section(result, section, machine)
    _need_processors(result, list(sections.values()))
    for block in stream.blocks:
        _fit_block(result, block, machine)
    return result


def _capabilities(stream: Stream) -> list[str]:
    """The capabilities of the source that show in the recording and are not built here; records of pages need none."""
    shown = list(stream.configuration.enabled_capabilities) if stream.configuration else []
    for element in stream.elements:
        if isinstance(element, CommandElement) and not isinstance(element.command, commands.TAKEN_IN_PRECOPY):
            shown.append(remedies.capability_of(element.command.type, len(element.command.payload())))
    return [name for name in dict.fromkeys(shown) if name not in _BUILT]


def _fit_section(result: Fit, section: Section, machine: MachineModel) -> None:
    what = f"section {printable(section.idstr)} instance {section.instance_id}"
    remedy = remedies.for_section(section.idstr, section.instance_id)
    known = next((one for one in machine.sections if re.fullmatch(one.idstr, section.idstr)), None)
    if known is None or section.instance_id >= known.instances:
        had = "no such section" if known is None else f"{known.instances} of them, counted from 0"
        result.lacks.append(Lack(what, f"{machine.machine_type} has {had}", printable(str(remedy))))
        return
    if not known.vmstate.accepts(section.version_id):
        oldest, newest = known.vmstate.oldest_version, known.vmstate.version_id
        why = f"version {section.version_id} recorded, {machine.machine_type} takes {oldest} to {newest}"
        result.lacks.append(Lack(what, why, str(remedies.for_version(section.version_id, newest))))
    for name in _unknown_subsections(section, known.vmstate):
        why = f"{machine.machine_type} does not know its subsection {printable(name)}"
        result.lacks.append(Lack(what, why, str(remedies.for_subsection(name))))
    if section.instance_id >= known.always and section.idstr not in remedies.PER_CPU:
        result.needs.append(_need(what, remedy))


def _unknown_subsections(section: Section, vmstate: VMState) -> list[str]:
    recorded = [one.path.rpartition(">>")[2] for one in section.fields if one.type == "subsection"]
    known = set(_subsection_names(vmstate))
    return [name for name in dict.fromkeys(recorded) if name not in known]


def _subsection_names(vmstate: VMState) -> Iterator[str]:
    """The names of all subsections of a state and of the states inside."""
    for subsection in vmstate.subsections:
        yield subsection.vmstate.name
        yield from _subsection_names(subsection.vmstate)
    for one in vmstate.fields:
        inner = getattr(one.kind, "vmstate", None)
        if inner is not None:
            yield from _subsection_names(inner)


def _need_processors(result: Fit, sections: list[Section]) -> None:
    count = max((one.instance_id + 1 for one in sections if one.idstr in remedies.PER_CPU), default=1)
    if 1 < count <= _PER_CPU:
        result.needs.append(Need(f"{count} vCPUs", f"-smp {count}", ""))


def _fit_block(result: Fit, block: Block, machine: MachineModel) -> None:
    what = f"RAM block {printable(block.name)}"
    here = dict.fromkeys(machine.blocks, 0) | {machine.blocks[0]: 1}
    if block.name in machine.blocks:
        if block.length is not None:
            result.needs.append(_need(what, remedies.for_block_length(block.name, block.length)))
        return
    is_main = block.index == 0
    remedy = remedies.for_block(block.name, block.length, here, is_main=is_main)
    if remedy.options and (is_main or re.fullmatch(machine.optional_blocks, block.name)):
        result.needs.append(_need(what, remedy))
    else:
        why = f"{machine.machine_type} has {' and '.join(machine.blocks)}"
        result.lacks.append(Lack(what, why, printable(str(remedy))))


def _need(what: str, remedy: Remedy) -> Need:
    return Need(what, remedy.options, remedy.words)
