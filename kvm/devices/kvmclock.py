"""kvmclock: the guest's paravirtual clock, kept by KVM; it stands still while the machine is stopped.

    stop    read it
    start   set it back to what it was at the stop, or to what came with a migration

A fresh machine's clock is left alone until it has been stopped once.

Threads   Whoever stops and starts the machine; a migration saves and loads while it is stopped.
"""

from __future__ import annotations

from qemumig.savevm.devices.kvmclock import KvmclockState

from ..ioctls import Cap
from ..structs import KVM_CLOCK_TSC_STABLE
from ..vm import Vm


class Kvmclock:
    """The clock of one VM."""

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        self._reliable = bool(vm.check_extension(Cap.KVM_CAP_ADJUST_CLOCK) & KVM_CLOCK_TSC_STABLE)
        self._stopped_at: int | None = None  # nanoseconds

    def stop(self) -> None:
        """Note where the clock stands; no vCPU runs."""
        self._stopped_at = self._vm.get_clock().clock

    def start(self) -> None:
        """Let the clock go on from where it was noted; no vCPU runs yet."""
        if self._stopped_at is not None:
            self._vm.set_clock(self._stopped_at)

    def save(self) -> KvmclockState:
        """The clock at the stop; of a machine that never ran, the clock now."""
        clock = self._vm.get_clock().clock if self._stopped_at is None else self._stopped_at
        return KvmclockState(clock, self._reliable)

    def load(self, record: KvmclockState) -> None:
        """Go on from the source's clock when the machine starts."""
        self._stopped_at = record.clock
