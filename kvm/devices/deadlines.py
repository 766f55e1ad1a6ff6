"""Deadlines: a thread that calls devices when their time has come.

    deadline = deadlines.new(call)      call()  in `vm/timers`, without any lock of ours
    deadline.set(when)                  nanoseconds of deadlines.now(); earlier or later than before, None for never

A call may come late, and it may come after `set(None)` when it was on its way already; so a device looks at its own
clock when it is called, and sets its next deadline then.

Threads   Any thread sets, under locks of its own if it likes.  `vm/timers` starts with the first deadline that is set;
          `close` ends and joins it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from qemumig.threads import start_thread

NANOSECONDS = 1_000_000_000
_LONGEST_SLEEP_S = 3600  # a guest, or a stream, may name a time for which no clock has room


class Deadline:
    """One call at one time; made by `Deadlines.new`."""

    def __init__(self, changed: threading.Condition, call: Callable[[], None], arm: Callable[[], None]) -> None:
        self._changed = changed
        self._arm = arm
        self.call = call
        self.when: int | None = None  # under lock

    def set(self, when: int | None) -> None:
        """Be called at *when*, in nanoseconds of the clock of these deadlines, or never."""
        with self._changed:
            if when == self.when:
                return
            self.when = when
            if when is not None:
                self._arm()
            self._changed.notify_all()


class Deadlines:
    """All deadlines of a machine, few enough to look at each; *on_error* is told what a call raised."""

    def __init__(self, on_error: Callable[[Exception], None]) -> None:
        # Set before the thread starts.
        self._on_error = on_error
        self._all: list[Deadline] = []
        # Under lock.
        self._changed = threading.Condition(threading.RLock())
        self._thread: threading.Thread | None = None
        self._ending = False

    def new(self, call: Callable[[], None]) -> Deadline:
        """A deadline that is never, until it is set; before the guest runs."""
        deadline = Deadline(self._changed, call, self._start)
        self._all.append(deadline)
        return deadline

    def now(self) -> int:
        """The clock that they come by: the host's, in nanoseconds, which never goes back."""
        return time.monotonic_ns()

    def close(self) -> None:
        """End the thread; no call comes after that.  Twice is allowed."""
        with self._changed:
            self._ending = True
            self._changed.notify_all()
            thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()

    def _start(self) -> None:
        """Under lock."""
        if self._thread is None and not self._ending:
            self._thread = start_thread("vm/timers", self._run)

    def _run(self) -> None:
        while (due := self._wait()) is not None:
            try:
                due.call()
            except Exception as error:
                self._on_error(error)

    def _wait(self) -> Deadline | None:
        """Sleep until a deadline has come, take it; None at the end."""
        with self._changed:
            while not self._ending:
                first = self._first()
                if first is None or first.when is None:
                    self._changed.wait()
                    continue
                left = first.when - self.now()
                if left <= 0:
                    first.when = None
                    return first
                self._changed.wait(min(left / NANOSECONDS, _LONGEST_SLEEP_S))
            return None

    def _first(self) -> Deadline | None:
        """The one that comes next; under lock."""
        return min((one for one in self._all if one.when is not None), key=lambda one: one.when or 0, default=None)
