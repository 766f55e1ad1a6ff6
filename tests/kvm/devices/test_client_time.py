"""Time that stands still until somebody moves it (qtest.md §2)."""

import threading

from kvm.devices.client_time import LATEST, ClientTime
from kvm.devices.pit import Pit
from tests.kvm.devices.lines import RecordedLine


def test_what_a_step_passes_happens_in_its_order_and_at_its_time():
    time = ClientTime()
    seen = []

    def note(name):
        seen.append((name, time.now()))

    late, early = time.new(lambda: note("late")), time.new(lambda: note("early"))
    late.set(70)
    early.set(30)
    assert time.next() == 30 and time.now() == 0
    assert time.step(69)
    assert (seen, time.now(), time.next()) == ([("early", 30)], 69, 70)
    assert time.step(100)
    assert (seen[1:], time.now(), time.next()) == ([("late", 70)], 100, None)


def test_a_deadline_that_sets_itself_again_comes_as_often_as_there_is_time_for():
    time = ClientTime()
    calls = []

    def again():
        calls.append(time.now())
        deadline.set(time.now() + 10)

    deadline = time.new(again)
    deadline.set(5)
    assert time.step(30)
    assert calls == [5, 15, 25]


def test_time_goes_nowhere_but_forwards_and_not_for_ever():
    time = ClientTime()
    assert time.step(5)
    assert not any(time.step(until) for until in (5, 4, -1, LATEST + 1))
    assert time.step(LATEST) and time.now() == LATEST


def test_that_the_machine_runs_moves_nothing():
    time = ClientTime()
    time.clock.start()
    assert time.step(7)
    time.clock.stop()
    assert time.now() == time.clock.save().cpu_clock_offset == 7


def test_the_interval_timer_ticks_by_it():
    time, line = ClientTime(), RecordedLine()
    pit = Pit(time.now, line, time)
    pit.reset()
    assert time.next() is None, "the machine has not started"
    pit.start()
    assert time.next() == 27_462_701  # half of 65536 ticks; a real QEMU looks a nanosecond earlier, and then again
    assert time.step(1_000_000_000)
    assert line.edges == 18


def test_a_step_across_more_than_anybody_can_live_to_see_ends_with_the_machine():
    time, entered = ClientTime(), threading.Event()

    def again():
        deadline.set(time.now() + 1)
        entered.set()

    deadline = time.new(again)
    deadline.set(1)
    thread = threading.Thread(target=time.step, args=(LATEST,))
    thread.start()
    assert entered.wait(10)
    time.close()
    thread.join()
    assert time.now() < LATEST
