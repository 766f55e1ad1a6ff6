"""`mc146818rtc`: the real-time clock and its CMOS memory (rtc=on only); version 3, instance 0."""

from __future__ import annotations

from dataclasses import dataclass

from ..fields import buffer, int64, timer, uint8, uint16, uint32, uint64, unused
from ..vmstate import VMState, plain_subsection


@dataclass
class Mc146818RtcState:
    """CMOS memory and the clock's timers; times in ns, a timer that is not armed is None."""

    cmos_data: bytes = bytes(128)
    cmos_index: int = 0
    periodic_timer: int | None = None
    next_periodic_time: int = 0
    irq_coalesced: int = 0
    period: int = 0
    base_rtc: int = 0  # seconds since 1970
    last_update: int = 0
    offset: int = 0
    update_timer: int | None = None
    next_alarm_time: int = 0
    irq_reinject_on_ack_count: int | None = None


MC146818RTC = VMState(
    "mc146818rtc",
    3,
    (
        buffer("cmos_data", 128),
        uint8("cmos_index"),
        unused(28),
        timer("periodic_timer"),
        int64("next_periodic_time"),
        unused(24),
        uint32("irq_coalesced", version=2),
        uint32("period", version=2),
        uint64("base_rtc", version=3),
        uint64("last_update", version=3),
        int64("offset", version=3),
        timer("update_timer", version=3),
        uint64("next_alarm_time", version=3),
    ),
    minimum_version_id=1,
    subsections=(
        plain_subsection(
            "irq_reinject_on_ack_count",
            "mc146818rtc/irq_reinject_on_ack_count",
            uint16,
            "irq_reinject_on_ack_count",
        ),
    ),
    record=Mc146818RtcState,
)
