"""`i8254`: the legacy interval timer (pit=on only); version 3, instance 0.

The first channel's `irq_disabled` and `next_transition_time` stand beside the array and are members of the timer here.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..fields import int32, int64, struct, uint8, uint16, uint32
from ..vmstate import VMState


@dataclass
class PitChannel:
    """One counter; times in ns of the virtual clock."""

    count: int = 0x10000
    latched_count: int = 0
    count_latched: int = 0
    status_latched: int = 0
    status: int = 0
    read_state: int = 0
    write_state: int = 0
    write_latch: int = 0
    rw_mode: int = 0
    mode: int = 3
    bcd: int = 0
    gate: int = 0
    count_load_time: int = 0
    next_transition_time: int = -1


@dataclass
class I8254State:
    """The three counters; *irq_disabled* and *next_transition_time* (ns, -1: none) are those of the first."""

    irq_disabled: int = 0
    channels: list[PitChannel] = field(default_factory=lambda: [PitChannel() for _ in range(3)])
    next_transition_time: int = -1


_CHANNEL = VMState(
    "pit channel",
    2,
    (
        int32("count"),
        uint16("latched_count"),
        uint8("count_latched"),
        uint8("status_latched"),
        uint8("status"),
        uint8("read_state"),
        uint8("write_state"),
        uint8("write_latch"),
        uint8("rw_mode"),
        uint8("mode"),
        uint8("bcd"),
        uint8("gate"),
        int64("count_load_time"),
        int64("next_transition_time"),
    ),
    record=PitChannel,
)

I8254 = VMState(
    "i8254",
    3,
    (
        uint32("channels[0].irq_disabled", "irq_disabled", version=3),
        struct("channels", _CHANNEL, count=3, version=2),
        int64("channels[0].next_transition_time", "next_transition_time"),
    ),
    minimum_version_id=2,
    record=I8254State,
)
