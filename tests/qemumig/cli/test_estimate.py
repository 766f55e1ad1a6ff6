"""The estimate of the time left against guests whose behaviour is known."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from qemumig.cli.estimate import Estimate, Estimator, span

MB = 1_000_000
LIMIT_S = 0.3
STEP_S = 0.002
LOOK_EVERY = 50  # steps


@dataclass
class Look:
    """What a client saw, and what it could not know."""

    seconds: float  # since the beginning
    number: int  # of the round
    estimate: Estimate


def migrate(*, memory: int, bandwidth: float, dirty_rate: float, written: int, stop_s: float) -> tuple[list[Look], float]:
    """A guest of *memory* bytes that writes at *dirty_rate* over *written* bytes of it, looked at ten times a second.

    Returns the looks, and when it was over: infinity when it was not by *stop_s*.
    """
    estimator, looks = Estimator(LIMIT_S), []
    now, number, remaining, began = 0.0, 1, float(memory), 0.0
    for step in range(int(stop_s / STEP_S)):
        if step % LOOK_EVERY == 0:
            looks.append(Look(now, number, estimator.look(now, number, int(remaining), bandwidth)))
        now += STEP_S
        remaining -= bandwidth * STEP_S
        if remaining <= 0:  # the round is over: what was written meanwhile is dirty
            remaining = min(dirty_rate * (now - began), written)
            number, began = number + 1, now
            if remaining <= bandwidth * LIMIT_S:
                return looks, now + remaining / bandwidth
    return looks, float("inf")


def after_rounds(looks: list[Look], number: int) -> Iterator[Look]:
    """The looks at which *number* rounds have ended and the one at hand is measured."""
    return (look for look in looks if look.number > number and look.estimate != Estimate())


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7, 0.85])
def test_for_a_guest_that_converges_the_truth_lies_in_the_range(share: float) -> None:
    looks, end = migrate(memory=2000 * MB, bandwidth=100 * MB, dirty_rate=share * 100 * MB, written=2000 * MB, stop_s=600)
    assert end < 600
    assert all(look.estimate.converges for look in looks)
    seen = list(after_rounds(looks, 2))
    for look in seen:
        truth = end - look.seconds
        assert look.estimate.high is not None
        assert look.estimate.low - 0.3 <= truth <= look.estimate.high + 0.3, (truth, look)
    assert seen or share < 0.3


@pytest.mark.parametrize("share", [1.0, 1.3, 10.0])
def test_a_guest_that_outruns_the_link_is_told_after_one_round(share: float) -> None:
    looks, end = migrate(memory=1000 * MB, bandwidth=100 * MB, dirty_rate=share * 100 * MB, written=1000 * MB, stop_s=90)
    assert end == float("inf")
    assert not any(look.estimate.converges for look in after_rounds(looks, 1))


def test_a_guest_that_rewrites_too_much_is_told_after_two_rounds() -> None:
    looks, end = migrate(memory=1000 * MB, bandwidth=100 * MB, dirty_rate=500 * MB, written=60 * MB, stop_s=60)
    assert end == float("inf")
    assert not any(look.estimate.converges for look in after_rounds(looks, 2))


def test_what_may_never_end_is_given_no_upper_bound() -> None:
    for written in (60 * MB, 1000 * MB):
        looks, _ = migrate(memory=1000 * MB, bandwidth=100 * MB, dirty_rate=500 * MB, written=written, stop_s=60)
        assert all(look.estimate.high is None for look in looks)


def test_in_the_first_round_only_the_least_is_known() -> None:
    looks, end = migrate(memory=1000 * MB, bandwidth=100 * MB, dirty_rate=50 * MB, written=1000 * MB, stop_s=60)
    first = [look for look in looks if look.number == 1 and look.estimate.low]
    assert first
    for look in first:
        assert look.estimate.high is None and look.estimate.converges
        assert look.estimate.low <= end - look.seconds


def test_rounds_that_pass_between_two_looks_share_what_was_gained() -> None:
    estimator = Estimator(LIMIT_S)
    for now, number, remaining in ((0, 1, 1600), (1, 1, 800), (2, 2, 800), (2.5, 2, 400), (3, 4, 200), (3.5, 4, 100)):
        estimate = estimator.look(now, number, remaining * MB, 100 * MB)
    assert estimate.high is not None
    assert estimate.low == pytest.approx(100 / 800 + 100 / 800 + 50 / 800 + 25 / 800, rel=0.5)


def test_in_postcopy_the_rest_only_has_to_be_sent() -> None:
    estimator = Estimator(LIMIT_S)
    estimator.look(0, 1, 1000 * MB, 100 * MB)
    estimator.look(1, 1, 900 * MB, 100 * MB)
    assert estimator.look_back(2, 700 * MB) == Estimate(3.5, 7.0)


@pytest.mark.parametrize(
    ("estimate", "words"),
    [
        (Estimate(converges=False), "does not converge at this rate"),
        (Estimate(12.3), "at least 12 s left"),
        (Estimate(2.04, 5.5), "2.0 s to 5.5 s left"),
        (Estimate(0.01, 0.02), "0.1 s left"),
        (Estimate(50, 400), "50 s to 7 min left"),
    ],
)
def test_words(estimate: Estimate, words: str) -> None:
    assert str(estimate) == words


def test_durations_read_well() -> None:
    assert [span(seconds) for seconds in (0.0, 3.14159, 42.4, 130)] == ["0.1 s", "3.1 s", "42 s", "2 min"]
