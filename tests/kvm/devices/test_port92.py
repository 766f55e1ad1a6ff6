from __future__ import annotations

import pytest

from kvm.devices.bus import Bus
from kvm.devices.port92 import PORTS, RESET_PORTS, Port92, ResetControl
from qemumig.savevm.devices.port92 import Port92State


class Machine:
    """Both ports on a bus, and how often a reset was asked for."""

    def __init__(self) -> None:
        self.resets = 0
        self.port92 = Port92(self.reset)
        self.bus = Bus("port", 0xFF)
        self.bus.register(*PORTS, self.port92, widest=1)
        self.bus.register(*RESET_PORTS, ResetControl(self.reset), widest=1)

    def reset(self) -> None:
        self.resets += 1


@pytest.fixture
def machine() -> Machine:
    return Machine()


def test_address_line_20_is_on_and_remembered(machine: Machine) -> None:
    assert machine.bus.read(0x92, 1) == 2
    machine.bus.write(0x92, 1, 0xFC)
    assert machine.bus.read(0x92, 1) == 0xFC
    assert machine.resets == 0
    machine.port92.reset()
    assert machine.port92.save() == Port92State(2)


def test_bit_0_resets_and_does_not_stay(machine: Machine) -> None:
    machine.bus.write(0x92, 1, 3)
    assert (machine.resets, machine.bus.read(0x92, 1)) == (1, 2)


@pytest.mark.parametrize(("value", "resets"), [(2, 0), (4, 1), (6, 1), (0xE, 1), (0, 0)])
def test_the_reset_control_port_resets_by_bit_2(machine: Machine, value: int, resets: int) -> None:
    machine.bus.write(0xCF9, 1, value)
    assert machine.resets == resets


def test_its_state_moves(machine: Machine) -> None:
    machine.bus.write(0x92, 1, 0x40)
    other = Machine()
    other.port92.load(machine.port92.save())
    assert other.bus.read(0x92, 1) == 0x40
