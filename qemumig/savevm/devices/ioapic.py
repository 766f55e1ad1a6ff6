"""`ioapic`: the I/O APIC (machine.md §4); version 3, instance 0 (1 is the second one that comes with ACPI)."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..fields import uint8, uint32, uint64, unused
from ..vmstate import VMState

IOAPIC_PINS = 24
_MASKED = 0x10000


@dataclass
class IoapicState:
    """The registers of an I/O APIC."""

    id: int = 0
    ioregsel: int = 0
    irr: int = 0  # bit i: pin i asks for an interrupt
    ioredtbl: list[int] = field(default_factory=lambda: [_MASKED] * IOAPIC_PINS)


IOAPIC = VMState(
    "ioapic",
    3,
    (
        uint8("id"),
        uint8("ioregsel"),
        unused(8, version=2),
        uint32("irr", version=2),
        uint64("ioredtbl", count=IOAPIC_PINS),
    ),
    minimum_version_id=1,
    record=IoapicState,
)
