"""The virtual clock: nanoseconds during which the guest ran; the time base of device timers.

It stands still while the machine is stopped, and travels in the section `timer`.

Threads   Any.
"""

from __future__ import annotations

import threading
import time

from qemumig.savevm.devices.timer import TimerState


class VirtualClock:
    """Stopped at first, at 0."""

    def __init__(self) -> None:
        # Under lock.
        self._lock = threading.Lock()
        self._value = 0  # nanoseconds, while stopped; while running: less the host's clock
        self._running = False
        self._record = TimerState()  # what came with a migration and is of no use here

    @property
    def now(self) -> int:
        """Nanoseconds."""
        with self._lock:
            return self._value + (time.monotonic_ns() if self._running else 0)

    def start(self) -> None:
        """Let it run; nothing happens when it does already."""
        with self._lock:
            if not self._running:
                self._value -= time.monotonic_ns()
                self._running = True

    def stop(self) -> None:
        """Hold it; nothing happens when it stands."""
        with self._lock:
            if self._running:
                self._value += time.monotonic_ns()
                self._running = False

    def save(self) -> TimerState:
        """The clock; the tick counter beside it counts nothing here and goes on as it came."""
        now = self.now
        with self._lock:
            return TimerState(self._record.cpu_ticks_offset, now, self._record.icount)

    def load(self, record: TimerState) -> None:
        """Go on from the source's clock; the machine is stopped."""
        with self._lock:
            self._record = record
            self._value = record.cpu_clock_offset
