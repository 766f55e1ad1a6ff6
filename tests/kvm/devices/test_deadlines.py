from __future__ import annotations

import queue
import threading
import time

import pytest

from kvm.devices.deadlines import Deadlines

pytestmark = pytest.mark.usefixtures("no_leaks")

SOON, FAR = 1_000_000, 10**18  # nanoseconds from now
PATIENCE_S = 20


def test_calls_come_in_the_order_of_their_times_by_one_thread() -> None:
    came: queue.Queue[tuple[str, str]] = queue.Queue()
    deadlines = Deadlines(lambda error: None)
    first, second = (
        deadlines.new(lambda name=name: came.put((name, threading.current_thread().name))) for name in ("first", "second")
    )
    now = time.monotonic_ns()
    second.set(now + 2 * SOON)
    first.set(now + SOON)
    assert [came.get(timeout=PATIENCE_S) for _ in range(2)] == [("first", "vm/timers"), ("second", "vm/timers")]
    deadlines.close()
    deadlines.close()


def test_a_deadline_can_be_moved_forward_and_a_time_that_no_clock_has_is_far_away() -> None:
    came = threading.Event()
    deadlines = Deadlines(lambda error: None)
    deadline = deadlines.new(came.set)
    deadline.set(time.monotonic_ns() + FAR)
    deadline.set(1 << 80)
    deadline.set(time.monotonic_ns())
    assert came.wait(PATIENCE_S)
    deadlines.close()


def test_a_deadline_that_was_taken_back_does_not_come() -> None:
    came: list[str] = []
    done = threading.Event()
    deadlines = Deadlines(lambda error: None)
    never, later = deadlines.new(lambda: came.append("never")), deadlines.new(done.set)
    now = time.monotonic_ns()
    never.set(now + 20 * SOON)
    never.set(None)
    later.set(now + 30 * SOON)
    assert done.wait(PATIENCE_S)
    assert came == []
    deadlines.close()


def test_a_call_may_set_its_own_deadline_again() -> None:
    calls = 0
    done = threading.Event()
    deadlines = Deadlines(lambda error: None)

    def call() -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            done.set()
        else:
            deadline.set(time.monotonic_ns())

    deadline = deadlines.new(call)
    deadline.set(time.monotonic_ns())
    assert done.wait(PATIENCE_S)
    deadlines.close()
    assert calls == 5


def test_what_a_call_raises_is_told_and_the_others_go_on() -> None:
    errors: queue.Queue[Exception] = queue.Queue()
    came = threading.Event()
    deadlines = Deadlines(errors.put)

    def fail() -> None:
        raise ValueError("no")

    failing, working = deadlines.new(fail), deadlines.new(came.set)
    failing.set(time.monotonic_ns())
    assert str(errors.get(timeout=PATIENCE_S)) == "no"
    working.set(time.monotonic_ns())
    assert came.wait(PATIENCE_S)
    deadlines.close()


def test_without_a_deadline_there_is_no_thread() -> None:
    deadlines = Deadlines(lambda error: None)
    deadlines.new(lambda: None).set(None)
    assert "vm/timers" not in [thread.name for thread in threading.enumerate()]
    deadlines.close()
