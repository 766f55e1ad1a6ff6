"""The interrupt controllers, all in the kernel: the I/O APIC's state, and lines for devices to raise.

Every GSI leads to the I/O APIC's pin of that number and nowhere else: this machine has no PICs, though KVM makes a pair
together with the I/O APIC.  Local APICs belong to their vCPUs: kvm/state/apic.py.

Threads   Lines: the device that owns one, under its lock.  Save and load: a migration, while the machine is stopped.
"""

from __future__ import annotations

from collections.abc import Callable

from qemumig.savevm.devices.ioapic import IOAPIC_PINS, IoapicState

from ..structs import (
    KVM_IRQ_ROUTING_IRQCHIP,
    KVM_IRQCHIP_IOAPIC,
    kvm_irq_routing_entry,
    kvm_irqchip,
)
from ..vm import Vm

IOAPIC_ADDRESS = 0xFEC00000


class Irqchip:
    """The chips of one VM; made before its first vCPU."""

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        vm.create_irqchip()
        vm.set_gsi_routing([_route(pin) for pin in range(IOAPIC_PINS)])

    def line(self, gsi: int) -> Callable[[bool], None]:
        """A function that raises and lowers *gsi*; KVM is only told of changes."""
        level = False

        def set_level(new: bool) -> None:
            nonlocal level
            if new is not level:
                level = new
                self._vm.irq_line(gsi, int(new))

        return set_level

    def reset(self) -> None:
        """Every pin masked."""
        self.load(IoapicState())

    def save(self) -> IoapicState:
        """The I/O APIC's registers."""
        ioapic = self._vm.get_irqchip(KVM_IRQCHIP_IOAPIC).chip.ioapic
        return IoapicState(
            ioapic.id & 0xFF,
            ioapic.ioregsel & 0xFF,
            ioapic.irr,
            [entry.bits for entry in ioapic.redirtbl],
        )

    def load(self, record: IoapicState) -> None:
        """Set the I/O APIC's registers."""
        chip = kvm_irqchip(chip_id=KVM_IRQCHIP_IOAPIC)
        ioapic = chip.chip.ioapic
        ioapic.base_address = IOAPIC_ADDRESS
        ioapic.id, ioapic.ioregsel, ioapic.irr = record.id, record.ioregsel, record.irr
        for pin, bits in enumerate(record.ioredtbl):
            ioapic.redirtbl[pin].bits = bits
        self._vm.set_irqchip(chip)


def _route(pin: int) -> kvm_irq_routing_entry:
    entry = kvm_irq_routing_entry(gsi=pin, type=KVM_IRQ_ROUTING_IRQCHIP)
    entry.u.irqchip.irqchip = KVM_IRQCHIP_IOAPIC
    entry.u.irqchip.pin = pin
    return entry
