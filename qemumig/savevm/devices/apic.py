"""`apic`: the local APIC of one vCPU (cpu-state.md §5); version 3, instance = initial APIC id."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..fields import int32, int64, uint8, uint32
from ..vmstate import Subsection, VMState

_LVT_MASKED = 0x10000


@dataclass
class ApicSipi:
    """A start-up interrupt that a user-space APIC waits for."""

    sipi_vector: int = 0
    wait_for_sipi: int = 0


@dataclass
class ApicState:
    """The registers of a local APIC; times in ns of the virtual clock."""

    apicbase: int = 0xFEE00900  # 0xFEE00800 on every vCPU but the first
    id: int = 0
    arb_id: int = 0
    tpr: int = 0
    spurious_vec: int = 0xFF
    log_dest: int = 0
    dest_mode: int = 0xF
    isr: list[int] = field(default_factory=lambda: [0] * 8)
    tmr: list[int] = field(default_factory=lambda: [0] * 8)
    irr: list[int] = field(default_factory=lambda: [0] * 8)
    lvt: list[int] = field(default_factory=lambda: [_LVT_MASKED] * 6)  # timer thermal perf LINT0 LINT1 error
    esr: int = 0
    icr: list[int] = field(default_factory=lambda: [0] * 2)
    divide_conf: int = 0
    count_shift: int = 1
    initial_count: int = 0
    initial_count_load_time: int = 0
    next_time: int = 0
    timer_expiry: int = -1  # -1: no timer runs
    apic_sipi: ApicSipi | None = None


def count_shift_of(divide_conf: int) -> int:
    """The divider of the timer as a power of two, from its register: 0 divides by 1, 7 by 128."""
    return ((divide_conf & 3 | divide_conf >> 1 & 4) + 1) & 7


APIC = VMState(
    "apic",
    3,
    (
        uint32("apicbase"),
        uint8("id"),
        uint8("arb_id"),
        uint8("tpr"),
        uint32("spurious_vec"),
        uint8("log_dest"),
        uint8("dest_mode"),
        uint32("isr", count=8),
        uint32("tmr", count=8),
        uint32("irr", count=8),
        uint32("lvt", count=6),
        uint32("esr"),
        uint32("icr", count=2),
        uint32("divide_conf"),
        int32("count_shift"),
        uint32("initial_count"),
        int64("initial_count_load_time"),
        int64("next_time"),
        int64("timer_expiry"),
    ),
    subsections=(
        Subsection(
            "apic_sipi",
            VMState("apic_sipi", 1, (int32("sipi_vector"), int32("wait_for_sipi")), record=ApicSipi),
        ),
    ),
    record=ApicState,
)
