from __future__ import annotations

from kvm.devices.timer import VirtualClock
from qemumig.savevm.devices.timer import TimerState


def test_the_clock_stands_until_it_is_started_and_after_it_is_stopped() -> None:
    clock = VirtualClock()
    assert clock.now == 0
    clock.start()
    clock.start()
    while not clock.now:
        pass
    clock.stop()
    clock.stop()
    stopped = clock.now
    assert 0 < stopped == clock.now


def test_the_clock_goes_on_from_what_came_with_a_migration() -> None:
    clock = VirtualClock()
    clock.load(TimerState(cpu_ticks_offset=77, cpu_clock_offset=1_000_000))
    assert clock.save() == TimerState(77, 1_000_000)
    clock.start()
    assert clock.now >= 1_000_000
    clock.stop()
    assert clock.save().cpu_ticks_offset == 77
