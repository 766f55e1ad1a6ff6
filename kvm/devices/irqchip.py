"""Interrupt lines, and the chips that they lead to.

    GSI 0 … 15    pin of that number of the PICs (8 a PIC), if the machine has them    in KVM
    GSI 1 … 23    pin of that number of the first I/O APIC, but not 2                  in KVM
    GSI 0         its pin 2, where the PICs' cascade leaves room
    GSI 24 … 47   pins 0 … 23 of the second I/O APIC, if the machine has it            ioapic.py

KVM makes a pair of PICs together with its I/O APIC.  Without `pic` no line leads to them, so they never ask for
anything; with it they are the machine's: pic.py.  Local APICs belong to their vCPUs: kvm/state/apic.py.

Threads   Lines: the device that owns one, under its lock.  Save and load: a migration, while the machine is stopped.
"""

from __future__ import annotations

from collections.abc import Callable

from qemumig.savevm.devices.ioapic import IOAPIC_PINS, IoapicState

from ..config import Chipset
from ..structs import (
    KVM_IRQ_ROUTING_IRQCHIP,
    KVM_IRQCHIP_IOAPIC,
    KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE,
    kvm_irq_routing_entry,
    kvm_irqchip,
)
from ..vm import Vm
from .ioapic import Ioapic
from .pic import CASCADE, PIC_PINS, Pic, asks

IOAPIC_ADDRESS = 0xFEC00000


class Line:
    """An interrupt line; its owner calls it with the level, the chips are only told of changes."""

    def __init__(self, tell: Callable[[bool], None]) -> None:
        self._tell = tell
        self._level = False

    def __call__(self, level: bool) -> None:
        if level is not self._level:
            self._level = level
            self._tell(level)

    def adopt(self, level: bool) -> None:
        """The line has this level, and the chips know it: their own state came from where it had it too."""
        self._level = level


class InputPins:
    """The pins of the first I/O APIC, for who looks on or plays a device from outside (qtest.md §2)."""

    count = IOAPIC_PINS

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        self._observer: Callable[[int, int], None] | None = None

    def observe(self, observer: Callable[[int, int], None] | None) -> None:
        """Tell *observer*, alone, of every change: pin and level; called in the thread that makes it."""
        self._observer = observer

    def set_level(self, pin: int, level: int) -> None:
        """Drive *pin*, as a device would."""
        self.drive({CASCADE: 0}.get(pin, pin), int(level != 0))

    def drive(self, gsi: int, level: int) -> None:
        """The line *gsi* has a new level."""
        self._vm.irq_line(gsi, level)
        observer = self._observer
        if observer is not None:
            observer(gsi or CASCADE, level)


class Irqchip:
    """The chips of one VM; made before its first vCPU.  `second` is None without a second I/O APIC, `pics` may be empty."""

    def __init__(self, vm: Vm, chipset: Chipset | None = None) -> None:
        chipset = chipset or Chipset()
        self._vm = vm
        vm.create_irqchip()
        routes = [_route(gsi, KVM_IRQCHIP_IOAPIC, gsi or CASCADE) for gsi in range(IOAPIC_PINS) if gsi != CASCADE]
        if chipset.pic:
            routes += [_route(gsi, *_pic_pin(gsi)) for gsi in range(2 * PIC_PINS) if gsi != CASCADE]
        vm.set_gsi_routing(routes)
        self.pins = InputPins(vm)
        self.pics = [Pic(vm, chip) for chip in (KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE)] if chipset.pic else []
        self.second = Ioapic(vm.signal_msi) if chipset.ioapic2 else None

    def line(self, gsi: int) -> Line:
        """The line *gsi*, low; one for each device."""
        if gsi < IOAPIC_PINS:
            return Line(lambda level: self.pins.drive(gsi, int(level)))
        second = self.second
        if second is None or gsi >= 2 * IOAPIC_PINS:
            raise ValueError(f"there is no interrupt line {gsi}: expected one below {IOAPIC_PINS * (1 + bool(second))}")
        return Line(lambda level: second.set_line(gsi - IOAPIC_PINS, level))

    @property
    def pic_asks(self) -> bool:
        """Whether the PICs ask vCPU 0 for something, which need not listen."""
        return bool(self.pics) and asks(self.pics[0].save())

    def reset(self) -> None:
        """Every pin masked, the PICs as after power-on."""
        self.load(IoapicState())
        for pic in self.pics:
            pic.reset()
        if self.second is not None:
            self.second.reset()

    def save(self) -> IoapicState:
        """The first I/O APIC's registers."""
        ioapic = self._vm.get_irqchip(KVM_IRQCHIP_IOAPIC).chip.ioapic
        return IoapicState(
            ioapic.id & 0xFF,
            ioapic.ioregsel & 0xFF,
            ioapic.irr,
            [entry.bits for entry in ioapic.redirtbl],
        )

    def load(self, record: IoapicState) -> None:
        """Set the first I/O APIC's registers."""
        chip = kvm_irqchip(chip_id=KVM_IRQCHIP_IOAPIC)
        ioapic = chip.chip.ioapic
        ioapic.base_address = IOAPIC_ADDRESS
        ioapic.id, ioapic.ioregsel, ioapic.irr = record.id, record.ioregsel, record.irr
        for pin, bits in enumerate(record.ioredtbl):
            ioapic.redirtbl[pin].bits = bits
        self._vm.set_irqchip(chip)


def _pic_pin(gsi: int) -> tuple[int, int]:
    """The PIC and its pin."""
    return (KVM_IRQCHIP_PIC_MASTER, gsi) if gsi < PIC_PINS else (KVM_IRQCHIP_PIC_SLAVE, gsi - PIC_PINS)


def _route(gsi: int, chip: int, pin: int) -> kvm_irq_routing_entry:
    entry = kvm_irq_routing_entry(gsi=gsi, type=KVM_IRQ_ROUTING_IRQCHIP)
    entry.u.irqchip.irqchip = chip
    entry.u.irqchip.pin = pin
    return entry
