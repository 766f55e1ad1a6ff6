"""`acpi-ged`: the generic event device (machine.md §4, acpi=on only); version 1, instance 0.

The hotplug subsections hold one record for each slot the machine was built with.  That number is never on the wire:
it is the length of `devs` in the fresh record that is loaded into; the minimal machine has none.

11.1 knows two more, `acpi-ged/pcihp` and `acpi-ged/hest`, which no microvm can send: it does not start when its event
device is told to plug PCI devices, and it has no error injection, whose records the other is about.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..fields import boolean, struct, uint8, uint32, uint64
from ..kinds import Count
from ..vmstate import Subsection, VMState, plain_subsection

_MAX_SLOTS = 256  # memory slots of a machine
_MAX_CPUS = 4096


@dataclass
class GedState:
    """Which events wait to be handled."""

    sel: int = 0


@dataclass
class MemorySlot:
    """A memory slot in the eyes of ACPI."""

    is_enabled: bool = False
    is_inserting: bool = False
    ost_event: int = 0
    ost_status: int = 0


@dataclass
class MemoryHotplug:
    """The memory slots."""

    selector: int = 0
    devs: list[MemorySlot] = field(default_factory=list)

    @property
    def dev_count(self) -> int:
        return len(self.devs)


@dataclass
class CpuSlot:
    """A CPU slot in the eyes of ACPI."""

    is_inserting: bool = False
    is_removing: bool = False
    ost_event: int = 0
    ost_status: int = 0


@dataclass
class CpuHotplug:
    """The CPU slots (since 10.0)."""

    selector: int = 0
    command: int = 0
    devs: list[CpuSlot] = field(default_factory=list)

    @property
    def dev_count(self) -> int:
        return len(self.devs)


@dataclass
class ErrorRecords:
    """Where the error records lie in guest memory; only with error injection."""

    hw_error_le: int = 0


@dataclass
class AcpiGedState:
    """The event device."""

    ged_state: GedState = field(default_factory=GedState)
    memhp: MemoryHotplug | None = None
    cpuhp: CpuHotplug | None = None
    ghes: ErrorRecords | None = None


_MEMORY_SLOT = VMState(
    "memory hotplug device state",
    1,
    (boolean("is_enabled"), boolean("is_inserting"), uint32("ost_event"), uint32("ost_status")),
    record=MemorySlot,
)

_MEMORY_HOTPLUG = VMState(
    "memory hotplug state",
    1,
    (uint32("selector"), struct("devs", _MEMORY_SLOT, count=Count("dev_count", _MAX_SLOTS))),
    record=MemoryHotplug,
)

_CPU_SLOT = VMState(
    "CPU hotplug device state",
    1,
    (boolean("is_inserting"), boolean("is_removing"), uint32("ost_event"), uint32("ost_status")),
    record=CpuSlot,
)

_CPU_HOTPLUG = VMState(
    "CPU hotplug state",
    1,
    (uint32("selector"), uint8("command"), struct("devs", _CPU_SLOT, count=Count("dev_count", _MAX_CPUS))),
    record=CpuHotplug,
)

_GHES = VMState("acpi-ghes", 1, (uint64("hw_error_le"),), record=ErrorRecords)

_GED_STATE = VMState("acpi-ged-state", 1, (uint32("sel"),), record=GedState)


def _nested(attr: str, member: str, vmstate: VMState) -> Subsection:
    """A subsection `acpi-ged/attr` that is one structure."""
    return plain_subsection(attr, f"acpi-ged/{attr}", lambda name, value: struct(name, vmstate, value), member)


ACPI_GED = VMState(
    "acpi-ged",
    1,
    (struct("ged_state", _GED_STATE),),
    subsections=(
        _nested("memhp", "memhp_state", _MEMORY_HOTPLUG),
        _nested("cpuhp", "cpuhp_state", _CPU_HOTPLUG),
        _nested("ghes", "ghes_state", _GHES),
    ),
    record=AcpiGedState,
)
