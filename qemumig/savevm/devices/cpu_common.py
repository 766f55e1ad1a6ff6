"""`cpu_common`: whether a vCPU is halted (cpu-state.md §1); version 1, instance = vCPU index."""

from __future__ import annotations

from dataclasses import dataclass

from ..fields import boolean, int32, uint32
from ..vmstate import VMState, plain_subsection


@dataclass
class CpuCommonState:
    """Halted or not, and the pending interrupts of a user-space APIC (0 when the APIC is in the kernel)."""

    halted: int = 0
    interrupt_request: int = 0
    exception_index: int | None = None
    crash_occurred: bool | None = None  # after a panic of the guest


CPU_COMMON = VMState(
    "cpu_common",
    1,
    (uint32("halted"), uint32("interrupt_request")),
    subsections=(
        plain_subsection("exception_index", "cpu_common/exception_index", int32, "exception_index"),
        plain_subsection("crash_occurred", "cpu_common/crash_occurred", boolean, "crash_occurred"),
    ),
    record=CpuCommonState,
)
