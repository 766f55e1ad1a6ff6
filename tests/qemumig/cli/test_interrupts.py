"""Signals end a program once, and not while something is being taken."""

from __future__ import annotations

import os
import signal

import pytest

from qemumig.cli.interrupts import Interrupted, Interrupts


def interrupt(number: int = signal.SIGINT) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_raises_and_is_named(number: int) -> None:
    with Interrupts(), pytest.raises(Interrupted) as caught:
        interrupt(number)
    assert caught.value.signum == number


def test_signal_waits_until_the_held_block_is_left() -> None:
    steps = []
    with Interrupts() as interrupts, pytest.raises(Interrupted):
        with interrupts.held():
            interrupt()
            steps.append("taken")
        steps.append("never")
    assert steps == ["taken"]


def test_second_signal_does_not_cut_the_clean_up_short() -> None:
    with Interrupts():
        with pytest.raises(Interrupted):
            interrupt()
        interrupt()


def test_nothing_is_raised_after_hold() -> None:
    with Interrupts() as interrupts:
        interrupts.hold()
        interrupt()


def test_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Interrupts():
        assert signal.getsignal(signal.SIGINT) != before
    assert signal.getsignal(signal.SIGINT) == before
