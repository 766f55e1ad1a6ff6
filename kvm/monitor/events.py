"""Events on their way from any thread to every monitor (qmp.md §1.6).

In    emit("STOP"), emit("MIGRATION", {"status": "active"})
Out   {"timestamp": {…}, "event": …, "data": {…}} to each subscriber, on the loop's thread

Threads   `emit` from any; the rest belongs to the loop's thread.
Holds     (1) subscribers see events in the order of the calls to `emit`, whatever threads those came from
          (2) an event emitted on the loop's thread has been delivered when `emit` returns: so it is on the wire
              before the response of the command that caused it
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

Subscriber = Callable[[dict[str, Any]], None]


class EventHub:
    """Takes events in, hands them out; those from before `start` wait for it."""

    def __init__(self) -> None:
        # Loop thread only.
        self._subscribers: list[Subscriber] = []
        # Under lock.
        self._lock = threading.Lock()
        self._queue: deque[dict[str, Any]] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._loop_thread = 0

    def start(self) -> None:
        """Deliver from now on, on the running loop."""
        with self._lock:
            self._loop = asyncio.get_running_loop()
            self._loop_thread = threading.get_ident()
        self._deliver()

    def stop(self) -> None:
        """Deliver what waits, and nothing afterwards."""
        self._deliver()
        with self._lock:
            self._loop = None

    def subscribe(self, subscriber: Subscriber) -> None:
        """*subscriber* gets every event from now on."""
        self._subscribers.append(subscriber)

    def unsubscribe(self, subscriber: Subscriber) -> None:
        """*subscriber* gets no more; it need not have subscribed."""
        if subscriber in self._subscribers:
            self._subscribers.remove(subscriber)

    def emit(self, name: str, data: dict[str, Any] | None = None) -> None:
        """Tell every monitor that *name* happened; *data* is what goes with it."""
        with self._lock:
            self._queue.append(event(name, data))
            if self._loop is None:
                return
            if threading.get_ident() != self._loop_thread:
                self._loop.call_soon_threadsafe(self._deliver)
                return
        self._deliver()

    def _deliver(self) -> None:
        while self._queue:
            message = self._queue.popleft()
            for subscriber in tuple(self._subscribers):
                subscriber(message)


def event(name: str, data: dict[str, Any] | None) -> dict[str, Any]:
    """The message for an event that happens now."""
    now = time.time_ns()
    message: dict[str, Any] = {
        "timestamp": {"seconds": now // 10**9, "microseconds": now % 10**9 // 1000},
        "event": name,
    }
    if data is not None:
        message["data"] = data
    return message
