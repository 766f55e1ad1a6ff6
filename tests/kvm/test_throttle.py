"""Time taken from vCPUs, and given back (convergence.md §2)."""

from __future__ import annotations

import threading

import pytest

from kvm.throttle import RUN_S, Throttle


class Vcpu:
    """Notes what it was asked for, and tells when a doze is a long one."""

    def __init__(self) -> None:
        self.dozes: list[float] = []
        self.short, self.long = threading.Event(), threading.Event()

    def doze(self, seconds: float) -> None:
        self.dozes.append(seconds)
        (self.long if seconds > RUN_S else self.short).set()


def test_every_vcpu_loses_its_share_until_it_is_given_back() -> None:
    vcpus = [Vcpu(), Vcpu()]
    throttle = Throttle(lambda: vcpus)  # type: ignore[arg-type,return-value]
    throttle.set(20)
    assert all(vcpu.short.wait(30) for vcpu in vcpus)
    throttle.set(75)
    assert all(vcpu.long.wait(30) for vcpu in vcpus)
    throttle.set(0)
    assert "throttle" not in [thread.name for thread in threading.enumerate()]
    for vcpu in vcpus:
        assert vcpu.dozes[0] == pytest.approx(RUN_S / 4)  # a fifth of the time: 2.5 ms out, 10 ms in
        assert vcpu.dozes[-1] == pytest.approx(RUN_S * 3)
    counts = [len(vcpu.dozes) for vcpu in vcpus]
    throttle.set(0)
    assert counts == [len(vcpu.dozes) for vcpu in vcpus]


def test_a_share_that_would_leave_nothing_is_refused() -> None:
    throttle = Throttle(list)
    for percentage in (-1, 100):
        with pytest.raises(ValueError, match=f"{percentage} percent of a vCPU's time cannot be taken"):
            throttle.set(percentage)
