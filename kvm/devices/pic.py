"""The legacy interrupt controllers, an i8259 pair in the kernel: their state, in QEMU's record and back.

What KVM's model lacks (single mode, level triggering of all lines at once) is kept for the next migration.

Threads   A migration saves and loads while the machine is stopped.
"""

from __future__ import annotations

from dataclasses import replace

from qemumig.savevm.devices.i8259 import I8259State

from ..structs import KVM_IRQCHIP_PIC_MASTER
from ..vm import Vm

PIC_PINS = 8
CASCADE = 2  # the master's pin that the slave asks at
_MAY_BE_LEVEL = {True: 0xF8, False: 0xDE}  # lines whose trigger mode the guest may choose: of the master, of the slave

_IN_KVM = [name for name in vars(I8259State()) if name not in ("single_mode", "ltim")]


class Pic:
    """KVM's PIC number *chip* of the machine."""

    def __init__(self, vm: Vm, chip: int) -> None:
        self._vm = vm
        self._chip = chip
        self._kept = I8259State()

    def reset(self) -> None:
        """As after power-on: nothing is asked for and nothing masked."""
        self.load(I8259State())

    def save(self) -> I8259State:
        """The registers."""
        pic = self._vm.get_irqchip(self._chip).chip.pic
        return replace(self._kept, **{name: getattr(pic, name) for name in _IN_KVM})

    def load(self, record: I8259State) -> None:
        """Set the registers; an interrupt that they ask for is asked for here."""
        self._kept = replace(record)
        chip = self._vm.get_irqchip(self._chip)
        for name in _IN_KVM:
            setattr(chip.chip.pic, name, getattr(record, name))
        chip.chip.pic.elcr_mask = _MAY_BE_LEVEL[self._chip == KVM_IRQCHIP_PIC_MASTER]
        self._vm.set_irqchip(chip)


def asks(pic: I8259State) -> bool:
    """Whether a master with these registers has its output up: a request that outranks what is in service."""
    in_service = pic.isr & ~pic.imr if pic.special_mask else pic.isr
    if pic.special_fully_nested_mode:
        in_service &= ~(1 << CASCADE)
    return _rank(pic, pic.irr & ~pic.imr) < _rank(pic, in_service)


def _rank(pic: I8259State, lines: int) -> int:
    """That of the highest of *lines*, from 0; the lowest of all when there is none."""
    ranks = (rank for rank in range(PIC_PINS) if lines >> (rank + pic.priority_add) % PIC_PINS & 1)
    return next(ranks, PIC_PINS)
