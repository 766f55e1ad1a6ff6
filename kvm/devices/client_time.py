"""Virtual time that a test harness moves, and nothing else does: the clock of accelerator `qtest` (qtest.md §2).

    clock      stands still between two requests, whether the machine runs or not
    deadlines  are times of that clock; those that a step passes come in their order, each at its own time

A device that counts virtual time takes both from here; the real-time clock of the board stays with the host's.

Threads   Any sets a deadline.  `step` is the harness's thread, which makes the calls; `close`, from any, ends a step.
"""

from __future__ import annotations

from .deadlines import Deadline, Deadlines
from .timer import VirtualClock

LATEST = (1 << 63) - 1  # nanoseconds, the last that a clock can show


class ClientClock(VirtualClock):
    """Shows what it was set to."""

    def start(self) -> None:
        """The machine runs: that moves nothing."""

    def stop(self) -> None:
        """Nothing moved."""

    def set(self, now: int) -> None:
        """It is *now*, which is not before what it was."""
        with self._lock:
            self._value = now


class ClientTime(Deadlines):
    """A clock and its deadlines, without a thread."""

    def __init__(self) -> None:
        super().__init__(lambda error: None)
        self.clock = ClientClock()

    def now(self) -> int:
        return self.clock.now

    def next(self) -> int | None:
        """When the next deadline comes, which is now when it has passed; None for never."""
        with self._changed:
            first = self._first()
            return None if first is None or first.when is None else max(first.when, self.now())

    def step(self, until: int) -> bool:
        """Move on to *until*, with all that happens on the way; False when that is no later time."""
        if not self.now() < until <= LATEST:
            return False
        while (due := self._take(until)) is not None:
            due.call()
        with self._changed:
            if not self._ending:
                self.clock.set(until)
        return True

    def _take(self, until: int) -> Deadline | None:
        """The first deadline up to *until*, at whose time it is now; None when there is none."""
        with self._changed:
            first = self._first()
            if self._ending or first is None or first.when is None or first.when > until:
                return None
            self.clock.set(max(first.when, self.now()))
            first.when = None
            return first

    def _start(self) -> None:
        """Nothing comes by itself."""
