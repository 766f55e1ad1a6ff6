from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvm.config import Chipset
from kvm.devices.irqchip import Irqchip
from kvm.devices.pic import asks
from kvm.system import Kvm
from kvm.vm import Vm
from qemumig.savevm.devices.cpu_common import CpuCommonState
from qemumig.savevm.devices.i8259 import I8259State
from qemumig.savevm.devices.ioapic import IoapicState
from tests.qemumig.savevm import recorded


@pytest.fixture
def vm() -> Iterator[Vm]:
    with Kvm() as kvm, kvm.create_vm() as vm:
        yield vm


@pytest.mark.needs("kvm")
class TestInKvm:
    def test_a_machine_without_them_has_none(self, vm: Vm) -> None:
        irqchip = Irqchip(vm)
        assert irqchip.pics == [] and not irqchip.pic_asks

    def test_they_come_out_of_reset_as_a_real_qemus(self, vm: Vm) -> None:
        irqchip = Irqchip(vm, Chipset(pic=True))
        irqchip.reset()
        assert [pic.save() for pic in irqchip.pics] == [I8259State(), I8259State()]

    def test_every_register_comes_out_as_it_went_in(self, vm: Vm) -> None:
        names = [name for name in vars(I8259State()) if name != "ltim"]
        for pic in Irqchip(vm, Chipset(pic=True)).pics:
            record = I8259State(**{name: number + 1 for number, name in enumerate(names)}, ltim=1)
            record.irr = record.isr = 0  # else the chip goes on from there at once
            pic.load(record)
            assert pic.save() == record

    @pytest.mark.parametrize(("gsi", "chip", "pin"), [(0, 0, 0), (4, 0, 4), (8, 1, 0), (15, 1, 7)])
    def test_a_line_asks_at_its_pin(self, vm: Vm, gsi: int, chip: int, pin: int) -> None:
        irqchip = Irqchip(vm, Chipset(pic=True))
        irqchip.reset()
        irqchip.line(gsi)(True)
        assert irqchip.pics[chip].save().irr == 1 << pin
        assert irqchip.pic_asks

    def test_the_timer_asks_at_the_ioapics_second_pin(self, vm: Vm) -> None:
        irqchip = Irqchip(vm)
        irqchip.load(IoapicState(ioredtbl=[1 << 15 | 1 << 16] * 24))
        irqchip.line(0)(True)
        assert irqchip.save().irr == 1 << 2

    def test_lines_beyond_the_chips_are_refused(self, vm: Vm) -> None:
        with pytest.raises(ValueError, match="no interrupt line 24: expected one below 24"):
            Irqchip(vm).line(24)


@pytest.mark.parametrize("name", [name for name in recorded.names() if "legacy-devices" in name])
def test_a_recorded_master_asks_as_its_vcpu_was_told(name: str) -> None:
    records = [section.record for section in recorded.load(name).devices]
    master = next(record for record in records if isinstance(record, I8259State))
    vcpu = next(record for record in records if isinstance(record, CpuCommonState))
    assert asks(master) and vcpu.interrupt_request == 2


@pytest.mark.parametrize(
    ("registers", "up"),
    [
        ({}, False),
        ({"irr": 1}, True),
        ({"irr": 1, "imr": 1}, False),
        ({"irr": 1, "isr": 1}, False),
        ({"irr": 2, "isr": 1}, False),
        ({"irr": 1, "isr": 2}, True),
        ({"irr": 1, "isr": 2, "priority_add": 1}, False),  # line 1 is the highest now
        ({"irr": 2, "isr": 1, "imr": 1, "special_mask": 1}, True),
        ({"irr": 4, "isr": 4}, False),
        ({"irr": 4, "isr": 4, "special_fully_nested_mode": 1}, True),  # the slave may interrupt itself
    ],
)
def test_a_request_must_outrank_what_is_in_service(registers: dict[str, int], up: bool) -> None:
    assert asks(I8259State(**registers)) is up
