from __future__ import annotations

import pytest

from kvm.devices.acpi_pm import PORTS, TIMER_HZ, PmBlock
from kvm.devices.bus import Bus
from qemumig.savevm.devices.qemumig_pm import QEMUMIG_PM, PmState
from qemumig.savevm.reader import BytesReader
from tests.kvm.devices.lines import RecordedLine

STATUS, ENABLE, CONTROL, TIMER = 0x600, 0x602, 0x604, 0x608
BUTTON, WOKEN = 0x100, 0x8000


class Machine:
    """The block on a port bus, and what it asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.line = RecordedLine()
        self.now = 0
        off, suspend = lambda: self.asked.append("off"), lambda: self.asked.append("suspend")
        self.pm = PmBlock(self.line, off, suspend, lambda: self.now)
        self.bus = Bus("port", 0xFF)
        self.bus.register(*PORTS, self.pm, widest=4)


@pytest.fixture
def machine() -> Machine:
    return Machine()


@pytest.mark.parametrize(
    ("address", "size", "value", "asked"),
    [
        (CONTROL, 2, 0x2000, ["off"]),
        (CONTROL, 2, 0x2001, ["off"]),
        (CONTROL, 2, 0x2400, ["suspend"]),
        (CONTROL, 2, 0x2401, ["suspend"]),
        (CONTROL, 4, 0x2401, ["suspend"]),
        (CONTROL + 1, 1, 0x24, ["suspend"]),
        (CONTROL, 2, 0x0401, []),  # the type alone
        (CONTROL, 2, 0x3C01, []),  # no such type
        (CONTROL, 1, 0x20, []),
        (STATUS, 4, 0x24012401, []),
    ],
)
def test_sleep_is_a_type_and_a_bit(machine: Machine, address: int, size: int, value: int, asked: list[str]) -> None:
    machine.bus.write(address, size, value)
    assert machine.asked == asked


def test_the_bit_that_begins_to_sleep_reads_as_zero(machine: Machine) -> None:
    assert machine.bus.read(CONTROL, 2) == 1  # ACPI mode, as firmware leaves it
    machine.bus.write(CONTROL, 2, 0x2401)
    assert machine.bus.read(CONTROL, 2) == 0x0401


def test_the_power_button_interrupts_whoever_enabled_it_until_he_clears_it(machine: Machine) -> None:
    machine.pm.press_power_button()
    assert (machine.bus.read(STATUS, 2), machine.line.level) == (BUTTON, False)
    machine.bus.write(ENABLE, 2, BUTTON)
    assert machine.line.level
    machine.bus.write(CONTROL, 2, 0)
    assert not machine.line.level
    machine.bus.write(CONTROL, 2, 1)
    machine.bus.write(STATUS, 2, BUTTON)
    assert (machine.bus.read(STATUS, 2), machine.line.moves) == (0, [True, False, True, False])


def test_who_was_woken_can_tell(machine: Machine) -> None:
    machine.pm.asleep = True
    machine.pm.wake()
    assert (machine.bus.read(STATUS, 2), machine.pm.asleep) == (WOKEN, False)
    machine.pm.reset()
    assert machine.bus.read(STATUS, 2) == 0


def test_the_timer_counts_24_bits_of_the_virtual_clock(machine: Machine) -> None:
    machine.now = 10**9
    assert machine.bus.read(TIMER, 4) == TIMER_HZ
    machine.now = 10 * 10**9
    assert machine.bus.read(TIMER, 4) == (10 * TIMER_HZ) & 0xFFFFFF
    assert machine.bus.read(TIMER + 1, 1) == (10 * TIMER_HZ) >> 8 & 0xFF
    machine.bus.write(TIMER, 4, 0)
    assert machine.bus.read(TIMER, 4) == (10 * TIMER_HZ) & 0xFFFFFF


def test_its_state_moves_and_is_what_the_section_says(machine: Machine) -> None:
    machine.bus.write(ENABLE, 2, BUTTON)
    machine.pm.press_power_button()
    machine.pm.asleep = True
    record = machine.pm.save()
    assert record == PmState(BUTTON, BUTTON, 1, True)
    data, _ = QEMUMIG_PM.save(record)
    assert data == bytes.fromhex("0100 0100 0001 01")
    other = Machine()
    other.pm.load(QEMUMIG_PM.load(BytesReader(data), 1))
    assert (other.pm.save(), other.line.level) == (record, True)
