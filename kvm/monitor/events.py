"""Events on their way from any thread to every monitor (qmp.md §1.6).

In    emit("STOP"), emit("MIGRATION", {"status": "active"})
Out   {"timestamp": {…}, "event": …, "data": {…}} to each subscriber, on the loop's thread

While a guest stands still for a migration (`held`), the processors are for what moves it: what happens meanwhile is told
a little later, with the time at which it happened.

Events that a guest can cause as often as it likes are limited: one a second of each kind and device, the last one of
those that were held back.

Threads   `emit` from any; the rest belongs to the loop's thread.
Holds     (1) subscribers see events in the order of the calls to `emit`, whatever threads those came from; only a
              limited one may come later
          (2) an event emitted on the loop's thread has been delivered when `emit` returns: so it is on the wire
              before the response of the command that caused it
          (3) none is held longer than HOLD_S
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from .. import trace

Message = dict[str, Any]
Subscriber = Callable[[Message], None]

HOLD_S = 0.05
LIMIT_S = 1.0  # between two events of one kind and device
LIMITED = ("RTC_CHANGE", "BLOCK_IO_ERROR", "WATCHDOG", "BALLOON_CHANGE")
NEVER_HELD_BACK = {"action": "stop"}  # what a machine stops for is said at once


class Limiter:
    """Holds back events that come too fast."""

    def __init__(self, deliver: Subscriber) -> None:
        self._deliver = deliver
        self._timers: dict[tuple, asyncio.TimerHandle] = {}
        self._held: dict[tuple, Message] = {}  # the last one of each that waits for its timer

    def pass_on(self, message: Message) -> None:
        """Deliver *message* now, or later, or never if another one takes its place."""
        key = limited_by(message)
        if key is None:
            self._deliver(message)
        elif key in self._timers:
            self._held[key] = message
        else:
            self._deliver(message)
            self._start(key)

    def _start(self, key: tuple) -> None:
        self._timers[key] = asyncio.get_running_loop().call_later(LIMIT_S, self._expire, key)

    def _expire(self, key: tuple) -> None:
        del self._timers[key]
        held = self._held.pop(key, None)
        if held is not None:
            self._deliver(held)
            self._start(key)

    def stop(self) -> None:
        """Deliver what was held back; nothing is limited any more."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        held, self._held = self._held, {}
        for message in held.values():
            self._deliver(message)


def limited_by(message: Message) -> tuple | None:
    """What *message* shares its limit with; None when it has none."""
    data = message.get("data", {})
    if message["event"] not in LIMITED or NEVER_HELD_BACK.items() <= data.items():
        return None
    return (message["event"], *(data.get(name) for name in ("qom-path", "node-name", "device", "id")))


class EventHub:
    """Takes events in, hands them out; those from before `start` wait for it."""

    def __init__(self) -> None:
        # Loop thread only.
        self._subscribers: list[Subscriber] = []
        self._limiter = Limiter(self._hand_out)
        # Under lock.
        self._lock = threading.Lock()
        self._queue: deque[Message] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._loop_thread = 0
        self._holds = 0  # how many want nothing delivered …
        self._held_until_s = 0.0  # … and until when they get it

    def start(self) -> None:
        """Deliver from now on, on the running loop."""
        with self._lock:
            self._loop = asyncio.get_running_loop()
            self._loop_thread = threading.get_ident()
        self._deliver()

    def stop(self) -> None:
        """Deliver what waits, and nothing afterwards."""
        self._deliver()
        self._limiter.stop()
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
        trace.monitor_protocol_event_emit(name)
        with self._lock:
            self._queue.append(event(name, data))
            if self._loop is None:
                return
            if threading.get_ident() != self._loop_thread:
                if not self._holds or time.monotonic() >= self._held_until_s:
                    self._loop.call_soon_threadsafe(self._deliver)
                return
        self._deliver()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside, events of other threads than the loop's wait: till the end, or for HOLD_S if that is sooner."""
        with self._lock:
            self._holds += 1
            self._held_until_s = time.monotonic() + HOLD_S
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._deliver_after_all)
        try:
            yield
        finally:
            with self._lock:
                self._holds -= 1
                if self._queue and self._loop is not None:
                    self._loop.call_soon_threadsafe(self._deliver)

    def _deliver_after_all(self) -> None:
        asyncio.get_running_loop().call_later(HOLD_S, self._deliver)

    def _deliver(self) -> None:
        while self._queue:
            self._limiter.pass_on(self._queue.popleft())

    def _hand_out(self, message: Message) -> None:
        for subscriber in tuple(self._subscribers):
            subscriber(message)


def event(name: str, data: dict[str, Any] | None) -> Message:
    """The message for an event that happens now."""
    now = time.time_ns()
    message: Message = {
        "timestamp": {"seconds": now // 10**9, "microseconds": now % 10**9 // 1000},
        "event": name,
    }
    if data is not None:
        message["data"] = data
    return message
