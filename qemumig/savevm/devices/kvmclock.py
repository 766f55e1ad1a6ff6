"""`kvmclock`: the guest's paravirtual clock (cpu-state.md §6); version 1, instance 0."""

from __future__ import annotations

from dataclasses import dataclass

from ..fields import boolean, uint64
from ..vmstate import VMState, plain_subsection


@dataclass
class KvmclockState:
    """Nanoseconds since the guest's boot.

    *clock_is_reliable*: the source's TSC is stable, so the value may be used as it is.  None: not sent; a real
    destination then recomputes the clock from guest memory, so always send it.
    """

    clock: int = 0
    clock_is_reliable: bool | None = True


KVMCLOCK = VMState(
    "kvmclock",
    1,
    (uint64("clock"),),
    subsections=(plain_subsection("clock_is_reliable", "kvmclock/clock_is_reliable", boolean, "clock_is_reliable"),),
    record=KvmclockState,
)
