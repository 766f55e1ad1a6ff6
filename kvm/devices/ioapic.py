"""The second I/O APIC, a model of our own: KVM has only one (machine.md §3).

    0x00  select a register     0x10  the selected one     0x40  end of interrupt: a vector

    register    0 id   1 version and highest pin   2 arbitration id   0x10 + 2 n, 0x11 + 2 n: entry of pin n, low, high half

    line of a pin ─▶ irr ─▶ not masked, not in service ─▶ message to the local APICs (KVM_SIGNAL_MSI)

An edge is sent once.  A level is sent and in service (remote IRR) until the guest is done with it.  When that is, only
the local APIC knows, and KVM, which holds all local APICs, does not tell while it holds an I/O APIC too.  But every
device here is a virtio-mmio slot, which lowers its line when the guest acknowledges, even if only to raise it again at
once for what is left.  So service ends when the line falls, or with the register at 0x40; a line that rises is
always sent.  What this does not cover: a guest that ends a level interrupt without acknowledging it at the device is not
interrupted again, where hardware would go on for ever.

Threads   vCPU threads read and write, devices move their lines under their own locks; a migration saves and loads.
Holds     (1) bit n of `irr` follows a level-triggered line n; of an edge-triggered one it is an edge that was not sent yet
          (2) messages are sent with the lock held: KVM takes no lock of ours
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from qemumig.savevm.devices.ioapic import IOAPIC_PINS, IoapicState

ADDRESS = 0xFEC10000, 0x1000

_SELECT, _WINDOW, _END_OF_INTERRUPT = 0x00, 0x10, 0x40
_ID, _VERSION, _ARBITRATION, _TABLE = 0, 1, 2, 0x10
_VERSION_WITH_EOI = 0x20  # the first version that has the register at 0x40

_VECTOR, _LOW, _HIGH = 0xFF, 0xFFFFFFFF, 0xFFFFFFFF << 32
_LOGICAL, _DELIVERY_STATUS, _REMOTE_IRR, _LEVEL, _MASKED = 1 << 11, 1 << 12, 1 << 14, 1 << 15, 1 << 16
_READ_ONLY = _DELIVERY_STATUS | _REMOTE_IRR
_DELIVERY_MODE = 7 << 8  # at the same place in an entry and in a message
_EXTINT = 7 << 8

_MESSAGE_ADDRESS = 0xFEE00000
_MESSAGE_LOGICAL = 1 << 2
_MESSAGE_ASSERT, _MESSAGE_LEVEL = 1 << 14, 1 << 15


class Ioapic:
    """24 pins; *send* delivers a message (address, data) to the local APICs."""

    def __init__(self, send: Callable[[int, int], object]) -> None:
        # Set before the guest runs.
        self._send = send
        # Under lock.
        self._lock = threading.Lock()
        self._lines = 0  # bit n: line n is up
        self._id = self._selected = self._irr = 0
        self._table: list[int] = []
        self._set(IoapicState())

    def reset(self) -> None:
        """Every pin masked; lines stay where they are."""
        with self._lock:
            self._set(IoapicState())

    # -- lines

    def set_line(self, pin: int, level: bool) -> None:
        """Line *pin* has risen or fallen."""
        bit = 1 << pin
        with self._lock:
            rises = level and not self._lines & bit
            self._lines = self._lines | bit if level else self._lines & ~bit
            if self._table[pin] & _LEVEL:
                self._irr = self._irr & ~bit | self._lines & bit
                if rises or not level:
                    self._table[pin] &= ~_REMOTE_IRR
            elif rises:
                self._irr |= bit
            self._serve(pin)

    def _serve(self, pin: int) -> None:
        """Send what the pin asks for, if it may; under lock."""
        entry, bit = self._table[pin], 1 << pin
        if not self._irr & bit or entry & _MASKED:
            return
        if entry & _LEVEL:
            if entry & _REMOTE_IRR:
                return
            self._table[pin] |= _REMOTE_IRR
        else:
            self._irr &= ~bit
        if entry & _DELIVERY_MODE != _EXTINT:  # which would ask a PIC for the vector
            self._send(*_message(entry))

    # -- the guest's side

    def read(self, offset: int, size: int) -> int:
        """The select register, or the one that it selects; 32 bits wide, a narrower access sees its low part."""
        with self._lock:
            if offset == _SELECT:
                return self._selected
            return self._read_selected() & (1 << 8 * size) - 1 if offset == _WINDOW else 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Select, write what is selected, or end an interrupt."""
        with self._lock:
            if offset == _SELECT:
                self._selected = value & 0xFF
            elif offset == _WINDOW and size == 4:
                self._write_selected(value)
            elif offset == _END_OF_INTERRUPT and size == 4:
                self._end_of_interrupt(value & _VECTOR)

    def _read_selected(self) -> int:
        if self._selected in (_ID, _ARBITRATION):
            return self._id << 24
        if self._selected == _VERSION:
            return (IOAPIC_PINS - 1) << 16 | _VERSION_WITH_EOI
        pin, high = divmod(self._selected - _TABLE, 2)
        return self._table[pin] >> 32 * high & _LOW if 0 <= pin < IOAPIC_PINS else 0

    def _write_selected(self, value: int) -> None:
        if self._selected == _ID:
            self._id = value >> 24 & 0x0F
        pin, high = divmod(self._selected - _TABLE, 2)
        if not 0 <= pin < IOAPIC_PINS:
            return
        old = self._table[pin]
        new = old & _LOW | value << 32 if high else old & (_HIGH | _READ_ONLY) | value & ~_READ_ONLY
        if new & _LEVEL:
            self._irr = self._irr & ~(1 << pin) | self._lines & 1 << pin
        else:
            new &= ~_REMOTE_IRR
        self._table[pin] = new
        self._serve(pin)

    def _end_of_interrupt(self, vector: int) -> None:
        for pin, entry in enumerate(self._table):
            if entry & _LEVEL and entry & _VECTOR == vector:
                self._table[pin] &= ~_REMOTE_IRR
                self._serve(pin)

    # -- migration

    def _set(self, state: IoapicState) -> None:
        self._id, self._selected, self._irr = state.id, state.ioregsel, state.irr
        self._table = list(state.ioredtbl)

    def save(self) -> IoapicState:
        """The registers."""
        with self._lock:
            return IoapicState(self._id, self._selected, self._irr, list(self._table))

    def load(self, record: IoapicState) -> None:
        """Set the registers, and send what they ask for.

        Levels are the lines' own: their devices say them when they are loaded, whatever was in service is sent once more.
        """
        with self._lock:
            self._set(record)
            levels = sum(1 << pin for pin, entry in enumerate(self._table) if entry & _LEVEL)
            self._irr = self._irr & ~levels | self._lines & levels
            for pin in range(IOAPIC_PINS):
                self._serve(pin)


def _message(entry: int) -> tuple[int, int]:
    """Address and data of the message that *entry* stands for."""
    logical = _MESSAGE_LOGICAL if entry & _LOGICAL else 0
    level = _MESSAGE_LEVEL if entry & _LEVEL else 0
    address = _MESSAGE_ADDRESS | (entry >> 56) << 12 | logical
    return address, entry & (_VECTOR | _DELIVERY_MODE) | _MESSAGE_ASSERT | level
