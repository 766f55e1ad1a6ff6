"""The system control port 0x92 of a PC, and the reset control port 0xCF9.

    0x92    bit 0: its rise resets the machine    bit 1: address line 20, which is always on and only remembered here
    0xCF9   bit 2 resets the machine

Threads   vCPU threads read and write; a migration saves and loads.
"""

from __future__ import annotations

from collections.abc import Callable

from qemumig.savevm.devices.port92 import A20_ENABLED, Port92State

PORTS = 0x92, 1
RESET_PORTS = 0xCF9, 1
_FAST_RESET = 1
_RESET_CPU = 4
_KEPT = 0xFF & ~_FAST_RESET


class Port92:
    """Port 0x92; *reset_machine* only asks for it, for it is called by a vCPU."""

    def __init__(self, reset_machine: Callable[[], None]) -> None:
        self._reset_machine = reset_machine
        self._value = A20_ENABLED

    def reset(self) -> None:
        """As firmware leaves it."""
        self._value = A20_ENABLED

    def read(self, offset: int, size: int) -> int:
        return self._value

    def write(self, offset: int, size: int, value: int) -> None:
        asks = value & ~self._value & _FAST_RESET
        self._value = value & _KEPT
        if asks:
            self._reset_machine()

    def save(self) -> Port92State:
        return Port92State(self._value)

    def load(self, record: Port92State) -> None:
        self._value = record.outport


class ResetControl:
    """Port 0xCF9, which has no state."""

    def __init__(self, reset_machine: Callable[[], None]) -> None:
        self._reset_machine = reset_machine

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        if value & _RESET_CPU:
            self._reset_machine()
