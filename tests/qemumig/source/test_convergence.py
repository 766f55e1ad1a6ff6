"""Windows, the dirty rate, and what is taken from the vCPUs of a guest that is too fast (ram.md §7, §8, convergence.md)."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qemumig.errors import MigrationCancelled
from qemumig.options import MigrationOptions
from qemumig.source import convergence
from qemumig.source.convergence import AutoConverge, DirtyRate, Pacer, Period
from tests.support.traces import recorded

MIB = 1 << 20


class Clock:
    """A clock that tests move."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(convergence, "time", clock)
    return clock


@pytest.fixture
def quit_fd() -> Iterator[int]:
    fd = os.eventfd(0)
    yield fd
    os.close(fd)


def options(capability: str = "", **parameters: Any) -> MigrationOptions:
    made = MigrationOptions()
    if capability:
        made.set_capabilities([(capability, True)])
    made.set_parameters({name.replace("_", "-"): value for name, value in parameters.items()})
    return made


# ---- windows ----


def test_a_window_gives_bandwidth_threshold_and_rates(clock: Clock, quit_fd: int) -> None:
    chosen = options(downtime_limit=500)
    pacer = Pacer(chosen, quit_fd)
    pacer.restart(1000, 10)
    clock.now += 0.05
    assert not pacer.update(5_000_000, 2000)
    clock.now += 0.075
    assert pacer.update(10_001_000, 2510)
    assert pacer.bandwidth == pytest.approx(10_000_000 / 0.125)
    assert pacer.mbps == pytest.approx(10_000_000 * 8 / 0.125 / 1e6)
    assert pacer.pages_per_second == pytest.approx(2500 / 0.125)
    assert pacer.threshold(pacer.current_bandwidth(0)) == pytest.approx(80_000_000 * 0.5)
    chosen.set_parameters({"avail-switchover-bandwidth": 1_000_000})
    assert pacer.threshold(pacer.current_bandwidth(0)) == pytest.approx(500_000)


def test_pages_that_leave_smaller_count_in_full_for_the_switchover_and_as_sent_for_the_figures(
    clock: Clock, quit_fd: int
) -> None:
    pacer = Pacer(options(), quit_fd)
    pacer.restart(1000, 10, 10)
    clock.now += 0.05
    assert pacer.current_bandwidth(1000 + MIB, 1034) == pytest.approx(4 * MIB / 0.05)
    clock.now += 0.075
    assert pacer.update(1000 + 2 * MIB, 5000, 2058)
    assert pacer.bandwidth == pytest.approx(2 * MIB / 0.125)
    assert pacer.mbps == pytest.approx(2 * MIB * 8 / 0.125 / 1e6)
    assert pacer.current_bandwidth(0) == pacer.guest_bandwidth == pytest.approx(8 * MIB / 0.125)
    clock.now += 0.125
    assert pacer.update(1000 + 3 * MIB, 9000, 2058)  # pages of zeroes only
    assert pacer.guest_bandwidth == pacer.bandwidth == pytest.approx(MIB / 0.125)


def test_the_rate_limit_gives_a_tenth_to_each_window(clock: Clock, quit_fd: int) -> None:
    chosen = options(max_bandwidth=1_000_000)
    pacer = Pacer(chosen, quit_fd)
    pacer.restart(5000, 0)
    assert pacer.allowance(5000) == 100_000
    assert pacer.allowance(65_000) == 40_000
    assert pacer.allowance(500_000) == 0
    chosen.set_parameters({"max-bandwidth": 0})
    assert pacer.allowance(500_000) > 1 << 60


def test_a_wait_for_the_next_window_ends_when_told_to_quit(quit_fd: int) -> None:
    pacer = Pacer(options(), quit_fd)
    os.eventfd_write(quit_fd, 1)
    with pytest.raises(MigrationCancelled):
        pacer.wait()


# ---- the dirty rate ----


def test_the_dirty_rate_covers_periods_of_more_than_a_second(clock: Clock) -> None:
    rate = DirtyRate()
    clock.now += 0.9
    assert rate.update(1000, 5000) is None
    assert rate.pages_per_second == 0
    clock.now += 1.1
    assert rate.update(3000, 9000) == Period(3000 * 4096, 9000)
    assert rate.pages_per_second == 1500
    clock.now += 1.5
    assert rate.update(3300, 9500) == Period(300 * 4096, 500)
    assert rate.pages_per_second == 200


# ---- auto-converge ----

BAD, GOOD = Period(dirtied=60 * MIB, sent=100 * MIB), Period(dirtied=40 * MIB, sent=100 * MIB)


def percentages(chosen: MigrationOptions, periods: list[Period]) -> list[int]:
    """What is asked of the machine, one after the other."""
    asked: list[int] = []
    converge = AutoConverge(chosen, asked.append)
    for period in periods:
        converge.judge(period)
    converge.end()
    converge.end()
    return asked


def test_a_hopeless_guest_loses_more_time_with_every_second_bad_period() -> None:
    """The sequence that real QEMUs show with default parameters."""
    assert percentages(options("auto-converge"), [BAD] * 22) == [20, 30, 40, 50, 60, 70, 80, 90, 99, 99, 99, 0]


def test_the_trace_says_how_much_time_is_taken_and_when_it_is_given_back(tmp_path: Path) -> None:
    """In the words of a real QEMU."""
    with recorded(tmp_path, "migration_throttle", "cpu_throttle_*") as lines:
        percentages(options("auto-converge"), [BAD] * 4)
    taken = [f"cpu_throttle_set set guest CPU throttled by {percentage}%" for percentage in (20, 30, 0)]
    assert lines == ["migration_throttle", taken[0], "migration_throttle", taken[1], taken[2]]


def test_bad_periods_need_not_follow_each_other_and_good_ones_change_nothing() -> None:
    assert percentages(options("auto-converge"), [BAD, GOOD, GOOD, BAD, GOOD, BAD, GOOD]) == [20, 0]
    assert percentages(options("auto-converge"), [GOOD] * 9) == []


def test_nothing_is_taken_without_the_capability() -> None:
    assert percentages(options(), [BAD] * 9) == []


def test_parameters_of_the_throttle_are_obeyed() -> None:
    chosen = options("auto-converge", cpu_throttle_initial=5, cpu_throttle_increment=40, max_cpu_throttle=70)
    assert percentages(chosen, [BAD] * 8) == [5, 45, 70, 70, 0]
    assert percentages(options("auto-converge", throttle_trigger_threshold=61), [BAD] * 8) == []


def test_the_tail_is_slow_when_that_is_asked_for() -> None:
    """Only as much as brings the guest's rate down to what the limit allows, and no step larger than the increment."""
    chosen = options("auto-converge", cpu_throttle_tailslow=True, cpu_throttle_initial=50)
    near, far = Period(dirtied=52 * MIB, sent=100 * MIB), Period(dirtied=100 * MIB, sent=100 * MIB)
    assert percentages(chosen, [near] * 4) == [50, 52, 0]  # 50 · 50/52 = 48.08, so 2 are enough
    assert percentages(chosen, [far] * 4) == [50, 60, 0]


def test_a_real_clock_is_used_outside_of_tests() -> None:
    assert convergence.time is time
