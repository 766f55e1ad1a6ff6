"""The generic event device of ACPI: events for the guest, and the way out for a guest without ACPI hardware.

    0xFEA00000   which events there are, 32 bits; a read takes them all        bit 1: the power button
    0xFEA00200   sleep control: type 5 (bits 2-4) with bit 5 ends the machine
    0xFEA00201   sleep status: zero
    0xFEA00202   reset: 0x42 does it

Events come as an edge on GSI 9.  The registers below 0xFEA00200 are the fixed ones of a hardware-reduced machine; the
tables name them (acpi/tables.py).  Nothing can be plugged in here, so that part of the section says nothing.

Threads   vCPU threads read and write; a monitor presses the button; a migration saves and loads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from qemumig.savevm.devices.acpi_ged import AcpiGedState, GedState, MemoryHotplug

EVENTS = 0xFEA00000, 4
REGISTERS = 0xFEA00200, 3
GSI = 9

EVENT_POWER_BUTTON = 2

SLEEP_CONTROL, SLEEP_STATUS, RESET = range(3)
SLEEP_TYPE_OFF = 5
RESET_VALUE = 0x42
_SLEEP_ENABLE = 0x20


class Ged:
    """The events; *power_off* and *reset_machine* only ask for it, for they are called by a vCPU."""

    def __init__(
        self,
        line: Callable[[bool], None],
        power_off: Callable[[], None],
        reset_machine: Callable[[], None],
    ) -> None:
        # Set before the guest runs.
        self._line = line
        self._power_off = power_off
        self._reset_machine = reset_machine
        # Under lock.
        self._lock = threading.Lock()
        self._events = 0

    def reset(self) -> None:
        """No events."""
        with self._lock:
            self._events = 0

    def press_power_button(self) -> None:
        """Tell the guest; what it does about it is its own affair."""
        with self._lock:
            self._events |= EVENT_POWER_BUTTON
            self._line(True)
            self._line(False)

    def read(self, offset: int, size: int) -> int:
        """All events at once, which are none then; other accesses see nothing."""
        if (offset, size) != (0, 4):
            return 0
        with self._lock:
            events, self._events = self._events, 0
            return events

    def write(self, offset: int, size: int, value: int) -> None:
        """Nothing is writable."""

    def write_register(self, offset: int, size: int, value: int) -> None:
        """A byte of the fixed registers, of which none can be read."""
        if offset == SLEEP_CONTROL and value & _SLEEP_ENABLE and value >> 2 & 7 == SLEEP_TYPE_OFF:
            self._power_off()
        elif offset == RESET and value == RESET_VALUE:
            self._reset_machine()

    def save(self) -> AcpiGedState:
        """The events that wait; nothing is ever plugged in."""
        with self._lock:
            return AcpiGedState(GedState(self._events), memhp=MemoryHotplug())

    def load(self, record: AcpiGedState) -> None:
        """The events that waited there; their interrupt is with the interrupt controllers."""
        with self._lock:
            self._events = record.ged_state.sel


class GedRegisters:
    """The registers at 0xFEA00200 as a device of their own."""

    def __init__(self, ged: Ged) -> None:
        self.write = ged.write_register

    def read(self, offset: int, size: int) -> int:
        """They read as zero."""
        return 0
