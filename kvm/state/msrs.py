"""Model-specific registers between their numbers and a CpuState: one table, in the order of writing (cpu-state.md §4).

A register whose subsection was absent is written its reset value, so that nothing of the machine's own past is left.
One that this machine does not have is skipped while it holds its reset value; otherwise the load is refused, for the
guest would find another value than it left there.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from qemumig.savevm.devices.cpu_state import CpuState

from .errors import UnsupportedStateError

MSR_TSC = 0x10
MSR_APIC_BASE = 0x1B

_MTRR_DEFTYPE, _MTRR_VAR, _MTRR_COUNT = 0x2FF, 0x200, 8
_MTRR_FIXED = (0x250, 0x258, 0x259, *range(0x268, 0x270))
_MCG_STATUS, _MCG_CTL = 0x17A, 0x17B
MACHINE_CHECK_BANKS = range(0x400, 0x400 + 40)  # four registers a bank

# KVM has these for every guest, though its list leaves them out.
ALWAYS_THERE = frozenset({MSR_APIC_BASE, _MTRR_DEFTYPE, *_MTRR_FIXED, *range(_MTRR_VAR, _MTRR_VAR + 2 * _MTRR_COUNT)})

# KVM may have these although the guest's CPU model does not; their state is then no part of the guest's.
FEATURE_OF = {0xC0000103: "rdtscp", 0xC0000104: "tsc-scale", 0x122: "arch-capabilities"}


@dataclass(frozen=True, slots=True)
class Msr:
    """An MSR and where a CpuState has it: *attr*, or a part of what is there."""

    index: int
    attr: str
    number: int | None = None  # element of a list
    member: str | None = None  # attribute of that element
    reset: int = 0
    may_be_lost: bool = False  # of no use to a guest on a machine without it

    def get(self, cpu: CpuState) -> int:
        """Its value in *cpu*; the reset value when that came with no subsection."""
        value: Any = getattr(cpu, self.attr)
        if value is None:
            return self.reset
        if self.number is not None:
            value = value[self.number]
        return int(value if self.member is None else getattr(value, self.member))

    def put(self, cpu: CpuState, value: int) -> None:
        """Set its value in *cpu*."""
        if self.number is None:
            setattr(cpu, self.attr, value)
        elif self.member is None:
            getattr(cpu, self.attr)[self.number] = value
        else:
            setattr(getattr(cpu, self.attr)[self.number], self.member, value)


_AT_ONCE = (
    Msr(0x174, "sysenter_cs"),
    Msr(0x175, "sysenter_esp"),
    Msr(0x176, "sysenter_eip"),
    Msr(0x277, "pat", reset=0x0007040600070406),
    Msr(0xC0000081, "star"),
    Msr(0xC0010117, "vm_hsave"),
    Msr(0xC0000103, "tsc_aux"),
    Msr(0x3B, "msr_tsc_adjust"),
    Msr(0x1A0, "msr_ia32_misc_enable", reset=1),
    Msr(0x9E, "smbase", reset=0x30000, may_be_lost=True),
    Msr(0x34, "msr_smi_count"),
    Msr(0x6E1, "pkrs"),
    Msr(0xDA0, "xss"),
    Msr(0xE1, "umwait"),
    Msr(0x48, "spec_ctrl"),
    Msr(0xC0000104, "amd_tsc_scale_msr", reset=1 << 32),
    Msr(0x122, "msr_tsx_ctrl"),
    Msr(0xC001011F, "virt_ssbd"),
    Msr(0xC0010015, "msr_hwcr"),
    Msr(0xC0000083, "cstar"),
    Msr(0xC0000102, "kernelgsbase"),
    Msr(0xC0000084, "fmask"),
    Msr(0xC0000082, "lstar"),
    Msr(MSR_TSC, "tsc"),
    Msr(0x12, "system_time_msr"),
    Msr(0x11, "wall_clock_msr"),
    Msr(0x4B564D06, "async_pf_int_msr"),
    Msr(0x4B564D02, "async_pf_msr"),
    Msr(0x4B564D04, "async_pv_eoi_msr"),
    Msr(0x4B564D03, "steal_time_msr"),
    Msr(0x4B564D05, "poll_control_msr", reset=1),
    Msr(_MTRR_DEFTYPE, "mtrr_deftype"),
    *(Msr(index, "mtrr_fixed", number) for number, index in enumerate(_MTRR_FIXED)),
    *(
        Msr(_MTRR_VAR + 2 * number + half, "mtrr_var", number, member)
        for number in range(_MTRR_COUNT)
        for half, member in enumerate(("base", "mask"))
    ),
    Msr(_MCG_STATUS, "mcg_status", may_be_lost=True),
    Msr(_MCG_CTL, "mcg_ctl", may_be_lost=True),
    *(Msr(index, "mce_banks", number, may_be_lost=True) for number, index in enumerate(MACHINE_CHECK_BANKS)),
)
_FEATURE_CONTROL = Msr(0x3A, "msr_ia32_feature_control")
_TSC_DEADLINE = Msr(0x6E0, "msr_tscdeadline")
_ALL = (*_AT_ONCE, _FEATURE_CONTROL, _TSC_DEADLINE)


def indices(offered: Collection[int]) -> list[int]:
    """What to read from KVM: every register of the table that the machine has."""
    return [one.index for one in _ALL if one.index in offered]


def take_msrs(cpu: CpuState, values: dict[int, int], physical_bits: int) -> None:
    """Fill *cpu* from *values*, as KVM gave them."""
    for one in _ALL:
        if one.index in values:
            one.put(cpu, values[one.index])
    for pair in cpu.mtrr_var:  # as if the processor had 52 address bits: the receiver may have more than we
        pair.mask |= _beyond(physical_bits)


def msrs_of(cpu: CpuState, offered: Collection[int], physical_bits: int) -> list[tuple[int, int]]:
    """(index, value) pairs in the order in which they are to be written; UnsupportedStateError."""
    pairs = [pair for one in _AT_ONCE for pair in _pair(one, cpu, offered)]
    masks = range(_MTRR_VAR + 1, _MTRR_VAR + 2 * _MTRR_COUNT, 2)
    usable = ~_beyond(physical_bits)
    return [(index, value & usable if index in masks else value) for index, value in pairs]


def feature_control_of(cpu: CpuState, offered: Collection[int]) -> list[tuple[int, int]]:
    """What is written before anything else."""
    return _pair(_FEATURE_CONTROL, cpu, offered)


def deadline_of(cpu: CpuState, offered: Collection[int]) -> list[tuple[int, int]]:
    """What is written after the APIC and the run state: it may fire at once."""
    return _pair(_TSC_DEADLINE, cpu, offered)


def _pair(one: Msr, cpu: CpuState, offered: Collection[int]) -> list[tuple[int, int]]:
    value = one.get(cpu)
    if one.index in offered:
        return [(one.index, value)]
    if value != one.reset and not one.may_be_lost:
        raise UnsupportedStateError(f"MSR {one.index:#x} is {value:#x}, and this machine does not have it")
    return []


def _beyond(physical_bits: int) -> int:
    """Address bits that MTRRs could have and this processor has not."""
    return (1 << 52) - (1 << physical_bits)
