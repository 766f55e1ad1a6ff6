"""Holding the vCPUs back, so that the guest writes less memory than a migration can send (convergence.md §2).

    time   │ vCPUs run 10 ms │ doze 10 ms × p / (100 − p) │ run 10 ms │ doze … │        p: percentage of the time lost
           └──────────── 10 ms / (1 − p / 100) ───────────┘

Every vCPU dozes by itself once it has left the guest, so one that is slow to leave holds up nobody, and a machine that is
to stop wakes them all.

Threads   `throttle` tells the vCPUs, as long as there is a percentage; whoever sets it starts and joins that thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from qemumig.threads import start_thread

from .vcpu_thread import VcpuThread

RUN_S = 0.01  # a vCPU runs so long between two dozes


class Throttle:
    """Takes *percentage* of their time from the threads that *vcpus* names; 0: nothing.  `set` by one thread at a time."""

    def __init__(self, vcpus: Callable[[], Sequence[VcpuThread]]) -> None:
        self._vcpus = vcpus
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self.percentage = 0

    def set(self, percentage: int) -> None:
        """Take that share from now on; 0 ends the thread and waits for it."""
        if not 0 <= percentage <= 99:
            raise ValueError(f"{percentage} percent of a vCPU's time cannot be taken, at most 99")
        self.percentage = percentage
        if percentage and self._thread is None:
            self._over.clear()
            self._thread = start_thread("throttle", self._run)
        elif not percentage and self._thread is not None:
            self._over.set()
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        while (percentage := self.percentage) and not self._over.wait(RUN_S / (1 - percentage / 100)):
            for vcpu in self._vcpus():
                vcpu.doze(RUN_S * percentage / (100 - percentage))
