from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvm.devices.irqchip import Irqchip
from kvm.system import Kvm
from kvm.vm import Vm
from qemumig.savevm.devices.ioapic import IoapicState

pytestmark = pytest.mark.needs("kvm")

EDGE, LEVEL, MASKED = 0, 1 << 15, 1 << 16


@pytest.fixture
def vm() -> Iterator[Vm]:
    with Kvm() as kvm, kvm.create_vm() as vm:
        yield vm


def test_a_fresh_chip_is_in_reset_state(vm: Vm) -> None:
    assert Irqchip(vm).save() == IoapicState()


def test_every_register_comes_out_as_it_went_in(vm: Vm) -> None:
    irqchip = Irqchip(vm)
    record = IoapicState(3, 0x10, 0, [0x0100000000000000 * pin | MASKED | LEVEL | 0x30 + pin for pin in range(24)])
    irqchip.load(record)
    assert irqchip.save() == record
    irqchip.reset()
    assert irqchip.save() == IoapicState()


def test_a_raised_line_asks_at_its_pin_and_at_no_other(vm: Vm) -> None:
    irqchip = Irqchip(vm)
    irqchip.load(IoapicState(ioredtbl=[MASKED | LEVEL] * 24))
    line = irqchip.line(4)
    line(True)
    assert irqchip.save().irr == 1 << 4
    line(False)
    assert irqchip.save().irr == 0


def test_a_level_that_was_adopted_is_not_told_but_its_end_is(vm: Vm, monkeypatch: pytest.MonkeyPatch) -> None:
    moves: list[tuple[int, int]] = []
    irqchip = Irqchip(vm)
    monkeypatch.setattr(vm, "irq_line", lambda gsi, level: moves.append((gsi, level)))
    line = irqchip.line(8)
    line.adopt(True)
    for level in (True, False):
        line(level)
    assert moves == [(8, 0)]


def test_kvm_hears_only_of_changes(vm: Vm, monkeypatch: pytest.MonkeyPatch) -> None:
    moves: list[tuple[int, int]] = []
    irqchip = Irqchip(vm)
    monkeypatch.setattr(vm, "irq_line", lambda gsi, level: moves.append((gsi, level)))
    line = irqchip.line(7)
    for level in (False, True, True, False, False, True):
        line(level)
    assert moves == [(7, 1), (7, 0), (7, 1)]
