from __future__ import annotations

import pytest

from kvm.devices.bus import Bus
from kvm.devices.ged import EVENTS, REGISTERS, Ged, GedRegisters
from qemumig.savevm.devices.acpi_ged import ACPI_GED, AcpiGedState, GedState, MemoryHotplug
from qemumig.savevm.reader import BytesReader
from tests.kvm.devices.lines import RecordedLine

SLEEP, STATUS, RESET = range(REGISTERS[0], REGISTERS[0] + 3)


class Machine:
    """An event device on a memory bus, and what it asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.line = RecordedLine()
        self.ged = Ged(self.line, lambda: self.asked.append("off"), lambda: self.asked.append("reset"))
        self.bus = Bus("memory", 0)
        self.bus.register(*EVENTS, self.ged, widest=4)
        self.bus.register(*REGISTERS, GedRegisters(self.ged), widest=1)


@pytest.fixture
def machine() -> Machine:
    return Machine()


@pytest.mark.parametrize(
    ("address", "size", "value", "asked"),
    [
        (SLEEP, 1, 0x34, ["off"]),
        (SLEEP, 2, 0x34, ["off"]),
        (SLEEP, 4, 0x34, ["off"]),
        (SLEEP, 4, 0x420034, ["off", "reset"]),
        (SLEEP, 1, 0x14, []),  # not enabled
        (SLEEP, 1, 0x20, []),
        (SLEEP, 1, 0x28, []),
        (SLEEP, 1, 0x3C, []),
        (SLEEP, 1, 0xFF, []),
        (STATUS, 1, 0x34, []),
        (STATUS, 2, 0x4200, ["reset"]),
        (RESET, 1, 0x42, ["reset"]),
        (RESET, 2, 0x42, ["reset"]),
        (RESET, 1, 0x41, []),
    ],
)
def test_the_fixed_registers_do_what_they_do_in_a_real_qemu(
    machine: Machine, address: int, size: int, value: int, asked: list[str]
) -> None:
    machine.bus.write(address, size, value)
    assert machine.asked == asked
    assert machine.bus.read(SLEEP, 4) == 0


def test_the_power_button_is_an_edge_and_an_event_that_is_read_once(machine: Machine) -> None:
    machine.ged.press_power_button()
    assert machine.line.moves == [True, False]
    assert [machine.bus.read(EVENTS[0], 4) for _ in range(2)] == [2, 0]


def test_only_a_whole_read_takes_the_events_and_nothing_writes_them(machine: Machine) -> None:
    machine.ged.press_power_button()
    assert [machine.bus.read(EVENTS[0] + offset, size) for offset, size in ((0, 1), (0, 2), (2, 2), (1, 1))] == [0] * 4
    machine.bus.write(EVENTS[0], 4, 0xFF)
    assert machine.bus.read(EVENTS[0], 4) == 2


def test_events_travel_and_a_reset_forgets_them(machine: Machine) -> None:
    machine.ged.press_power_button()
    record = machine.ged.save()
    assert record == AcpiGedState(GedState(2), memhp=MemoryHotplug())
    data, _ = ACPI_GED.save(record)
    there = Machine()
    there.ged.load(ACPI_GED.load(BytesReader(data), 1))
    assert there.line.moves == []
    assert there.bus.read(EVENTS[0], 4) == 2
    machine.ged.reset()
    assert machine.bus.read(EVENTS[0], 4) == 0
