"""`timer`: the clocks that device timers count by (stream.md §5.1); version 2, instance 0."""

from __future__ import annotations

from dataclasses import dataclass

from ..fields import int16, int64, timer, unused
from ..vmstate import Subsection, VMState


@dataclass
class IcountWarp:
    """When the clock is to be warped over an idle phase, in ns."""

    vm_clock_warp_start: int = 0
    icount_warp_timer: int | None = None


@dataclass
class IcountTimers:
    """The timers that adjust the speed, in ns."""

    icount_rt_timer: int | None = None
    icount_vm_timer: int | None = None


@dataclass
class IcountShift:
    """How many ns an instruction takes, as a power of two, and the drift when that was last adjusted."""

    icount_time_shift: int = 0
    last_delta: int = 0


@dataclass
class Icount:
    """Time by counted instructions."""

    qemu_icount_bias: int = 0  # ns
    qemu_icount: int = 0  # instructions
    warp_timer: IcountWarp | None = None
    timers: IcountTimers | None = None
    shift: IcountShift | None = None


@dataclass
class TimerState:
    """The virtual clock in ns at the stop, and the offset of the tick counter."""

    cpu_ticks_offset: int = 0
    cpu_clock_offset: int = 0
    icount: Icount | None = None  # only when instructions are counted


_WARP_TIMER = VMState(
    "timer/icount/warp_timer",
    1,
    (int64("vm_clock_warp_start"), timer("icount_warp_timer")),
    record=IcountWarp,
)

_TIMERS = VMState(
    "timer/icount/timers",
    1,
    (timer("icount_rt_timer"), timer("icount_vm_timer")),
    record=IcountTimers,
)

_SHIFT = VMState(
    "timer/icount/shift",
    2,
    (int16("icount_time_shift"), int64("last_delta")),
    record=IcountShift,
)

_ICOUNT = VMState(
    "timer/icount",
    1,
    (int64("qemu_icount_bias"), int64("qemu_icount")),
    subsections=(
        Subsection("warp_timer", _WARP_TIMER),
        Subsection("timers", _TIMERS),
        Subsection("shift", _SHIFT),
    ),
    record=Icount,
)

TIMER = VMState(
    "timer",
    2,
    (int64("cpu_ticks_offset"), unused(8), int64("cpu_clock_offset", version=2)),
    minimum_version_id=1,
    subsections=(Subsection("icount", _ICOUNT),),
    record=TimerState,
)
