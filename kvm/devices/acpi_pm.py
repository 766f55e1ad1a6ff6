"""The ACPI power management block of a PC, at port 0x600: power button, power-off, suspend to RAM and the way back.

    0x600   PM1 status    bit 0 the timer's carry, 8 power button, 15 woken: written ones clear
    0x602   PM1 enable    bit 8: the button asks for an interrupt
    0x604   PM1 control   bit 0 interrupts, bits 10-12 sleep type, bit 13 (reads as 0) begins to sleep
    0x608   timer, 32 bits read-only: 3.579545 MHz of the virtual clock, of which 24 bits count

    sleep type 0 powers the machine off, 1 suspends it

An enabled event holds GSI 9 up.  Sleep types are those of QEMU's PCs, found by trying them there.

Threads   vCPU threads read and write; a monitor presses the button; a migration saves and loads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from qemumig.savevm.devices.qemumig_pm import SCI_ENABLED, PmState

PORTS = 0x600, 0xC
GSI = 9
TIMER_HZ = 3579545

_STATUS, _ENABLE, _CONTROL, _TIMER = 0, 2, 4, 8
_TIMER_MASK = 0xFFFFFF
_POWER_BUTTON, _WOKEN = 1 << 8, 1 << 15
_SLEEP_TYPE_SHIFT, _SLEEP_TYPES, _SLEEP_ENABLE = 10, 7, 1 << 13
_TYPE_OFF, _TYPE_SUSPEND = 0, 1
_NANOSECONDS = 10**9


class PmBlock:
    """The block; *power_off* and *suspend* only ask for it, for they are called by a vCPU."""

    def __init__(
        self,
        line: Callable[[bool], None],
        power_off: Callable[[], None],
        suspend: Callable[[], None],
        now: Callable[[], int],
    ) -> None:
        # Set before the guest runs.
        self._line = line
        self._power_off = power_off
        self._suspend = suspend
        self._now = now
        # Under lock.
        self._lock = threading.Lock()
        self._state = PmState()
        # Belongs to the machine, while no vCPU runs; it travels with the registers.
        self.asleep = False  # the guest has suspended itself, and nobody has woken it yet

    def reset(self) -> None:
        """As firmware leaves it."""
        self.load(PmState())

    def wake(self) -> None:
        """The machine comes back from suspend."""
        self.load(PmState(sts=_WOKEN))

    def press_power_button(self) -> None:
        """Tell the guest; what it does about it is its own affair."""
        with self._lock:
            self._state.sts |= _POWER_BUTTON
            self._move_line()

    def _move_line(self) -> None:
        state = self._state
        self._line(bool(state.cnt & SCI_ENABLED and state.sts & state.en))

    def read(self, offset: int, size: int) -> int:
        """A register, or a part of it."""
        with self._lock:
            low = self._state.sts | self._state.en << 16 | self._state.cnt << 32
        high = (self._now() * TIMER_HZ // _NANOSECONDS) & _TIMER_MASK
        return (low | high << 8 * _TIMER) >> 8 * offset & (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """One register or several, byte by byte; a control register whose high byte was not written does not sleep."""
        with self._lock:
            sleeps = False
            for index in range(size):
                sleeps |= self._write_byte(offset + index, value >> 8 * index & 0xFF)
            self._move_line()
            kind = self._state.cnt >> _SLEEP_TYPE_SHIFT & _SLEEP_TYPES
        if sleeps and kind == _TYPE_OFF:
            self._power_off()
        elif sleeps and kind == _TYPE_SUSPEND:
            self._suspend()

    def _write_byte(self, offset: int, value: int) -> bool:
        """Whether the guest goes to sleep."""
        state, shift = self._state, 8 * (offset & 1)
        kept = ~(0xFF << shift)
        register = offset & ~1
        if register == _STATUS:
            state.sts &= ~(value << shift)
        elif register == _ENABLE:
            state.en = state.en & kept | value << shift
        elif register == _CONTROL:
            written = value << shift
            state.cnt = state.cnt & kept | written & ~_SLEEP_ENABLE
            return bool(written & _SLEEP_ENABLE)
        return False

    def save(self) -> PmState:
        with self._lock:
            return PmState(self._state.sts, self._state.en, self._state.cnt, self.asleep)

    def load(self, record: PmState) -> None:
        with self._lock:
            self._state = PmState(record.sts, record.en, record.cnt)
            self.asleep = record.asleep
            self._move_line()
