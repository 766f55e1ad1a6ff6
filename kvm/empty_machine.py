"""The machine `none`: no vCPU, no memory, no device; there to be asked about others, and to migrate nothing (cli.md §2).

Its run state is a word that changes as a real machine's does.

Threads   As machine.py.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from qemumig.errors import StateError
from qemumig.machine import DeviceSection
from qemumig.qapi import RunState
from qemumig.ram.block import RAMBlock

from . import trace
from .config import MachineConfig
from .devices.bus import Bus
from .devices.client_time import ClientTime
from .runstates import IN_TRANSIT, require_next, require_rename

Emit = Callable[[str, dict | None], None]


class NothingDirty:
    """The dirty log of no memory."""

    manual_clear = False

    def start(self) -> None:
        """There is nothing to log."""

    def fetch(self, block: RAMBlock, words: memoryview) -> None:
        """There is no block."""

    def clear(self, block: RAMBlock, first_page: int, page_count: int) -> None:
        """There is no block."""

    def stop(self) -> None:
        """Nothing was logged."""


class NothingPhysical:
    """Addresses and ports where nobody answers."""

    def __init__(self) -> None:
        self._ports = Bus("port", 0xFF)

    def covers(self, address: int, size: int) -> bool:
        """Whether there is something at all of these addresses."""
        return False

    def read(self, address: int, size: int) -> bytes:
        """Zeroes."""
        return bytes(size)

    def write(self, address: int, data: bytes) -> None:
        """Lost."""

    def read_port(self, port: int, size: int) -> int:
        """Ones."""
        return self._ports.read(port, size)

    def write_port(self, port: int, size: int, value: int) -> None:
        """Lost."""


class NoPins:
    """The pins of no interrupt controller."""

    count = 0

    def set_level(self, pin: int, level: int) -> None:
        """There is no pin."""

    def observe(self, observer: Callable[[int, int], None] | None) -> None:
        """Nothing ever changes."""


class EmptyMachine:
    """Made stopped, like any machine; fulfils qemumig.machine.Machine and what the monitor asks."""

    def __init__(self, config: MachineConfig, emit: Emit) -> None:
        self.machine_type = config.machine_type.wire_name
        self.uuid = config.uuid
        self.reboots = True
        self.on_shutdown: Callable[[bool, str], None] | None = None
        self.ram_blocks: Sequence[RAMBlock] = ()
        self.dirty_log = NothingDirty()
        self.physical = NothingPhysical()
        self.client_time = None if config.runs_guest else ClientTime()
        self._emit = emit
        self._lock = threading.RLock()
        self._runstate = RunState.INMIGRATE if config.incoming else RunState.PRELAUNCH

    def close(self) -> None:
        """End a step of its clock; there is nothing to give back."""
        if self.client_time is not None:
            self.client_time.close()

    # -- run state

    @property
    def runstate(self) -> RunState:
        """What the machine is doing now."""
        return self._runstate

    @property
    def running(self) -> bool:
        """True while vCPUs may run, if there were some."""
        return self._runstate is RunState.RUNNING

    def stop(self, state: RunState) -> RunState:
        """Enter *state*, from the one returned; event STOP if it ran."""
        with self._lock:
            before = self._runstate
            self._enter(state)
            if before is RunState.RUNNING and not self.running:
                self._emit("STOP", None)
            return before

    def start(self) -> None:
        """RUNNING; event RESUME."""
        with self._lock:
            if not self.running:
                self._enter(RunState.RUNNING)
                self._emit("RESUME", None)

    def set_runstate(self, state: RunState) -> None:
        """Rename the state of a machine that is stopped."""
        with self._lock:
            require_rename(self._runstate, state)
            self._enter(state)

    def reset(self) -> None:
        """Nothing but the run state begins anew."""
        with self._lock:
            if not self.running and self._runstate not in IN_TRANSIT:
                self._enter(RunState.PRELAUNCH)

    def wake(self) -> None:
        """There is nobody to wake."""
        text = "wake-up from suspend is not supported by this guest"
        raise StateError(text, state=self._runstate, required=RunState.SUSPENDED)

    def request_shutdown(self, guest: bool, reason: str) -> None:
        """The machine is to end."""
        with self._lock:
            self._emit("SHUTDOWN", {"guest": guest, "reason": reason})
            self.stop(RunState.SHUTDOWN)
        if self.on_shutdown is not None:
            self.on_shutdown(guest, reason)

    def press_power_button(self) -> bool:
        """There is no button."""
        return False

    def control_registers(self, cpu: int) -> None:
        """There is no vCPU."""

    @property
    def pins(self) -> NoPins:
        """There are none."""
        return NoPins()

    @property
    def migration_blockers(self) -> list[str]:
        """Nothing stands in the way."""
        return []

    def vcpu_thread_ids(self) -> list[int]:
        """There is none."""
        return []

    def _enter(self, state: RunState) -> None:
        require_next(self._runstate, state)
        trace.runstate_set(self._runstate.value, state.value)
        self._runstate = state

    # -- migration

    def sections(self) -> Sequence[DeviceSection]:
        """No device, no section."""
        return ()

    def save_device_state(self) -> Sequence[tuple[DeviceSection, Any]]:
        """No device, no state."""
        return ()

    def first_touched(self) -> Sequence[tuple[RAMBlock, int]]:
        """Nothing: there is no memory."""
        return []

    def rehearse_load(self) -> None:
        """Nothing will come."""

    def load_device_state(self, loaded: Sequence[tuple[DeviceSection, Any]]) -> None:
        """Nothing can have come."""

    def throttle_vcpus(self, percentage: int) -> None:
        """There is none that could be slowed down."""

    def discard_ram(self) -> None:
        """There is none."""

    def read_physical(self, address: int, size: int) -> bytes:
        """Zeroes."""
        return bytes(size)
