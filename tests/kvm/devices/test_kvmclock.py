from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvm.devices.kvmclock import Kvmclock
from kvm.system import Kvm
from kvm.vm import Vm
from qemumig.savevm.devices.kvmclock import KvmclockState

pytestmark = pytest.mark.needs("kvm")


@pytest.fixture
def vm() -> Iterator[Vm]:
    with Kvm() as kvm, kvm.create_vm() as vm:
        yield vm


def test_a_pause_does_not_count(vm: Vm) -> None:
    clock = Kvmclock(vm)
    clock.stop()
    stopped = clock.save().clock
    while vm.get_clock().clock < stopped + 50_000_000:
        pass
    assert clock.save().clock == stopped
    clock.start()
    assert stopped <= vm.get_clock().clock < stopped + 50_000_000


def test_the_clock_starts_from_what_came_with_a_migration(vm: Vm) -> None:
    clock = Kvmclock(vm)
    clock.load(KvmclockState(5_000_000_000_000, False))
    assert clock.save().clock == 5_000_000_000_000
    clock.start()
    assert 5_000_000_000_000 <= vm.get_clock().clock < 5_010_000_000_000


def test_a_fresh_clock_is_not_set_at_the_first_start(vm: Vm) -> None:
    before = vm.get_clock().clock
    clock = Kvmclock(vm)
    clock.start()
    assert vm.get_clock().clock >= before
    assert clock.save().clock_is_reliable in (True, False)
