"""A local APIC between KVM's register page and an ApicState (cpu-state.md §5).

Each register is four bytes, sixteen apart.  The current count of the timer is not in a stream: a timer that runs starts
a full period anew.
"""

from __future__ import annotations

import struct

from qemumig.savevm.devices.apic import ApicState, count_shift_of

from ..structs import kvm_lapic_state
from ..vcpu import Vcpu
from .errors import refusals
from .msrs import MSR_APIC_BASE

_ID, _TPR, _ARB_ID, _LDR, _DFR, _SPURIOUS = 0x020, 0x080, 0x090, 0x0D0, 0x0E0, 0x0F0
_ISR, _TMR, _IRR, _ESR, _ICR, _LVT = 0x100, 0x180, 0x200, 0x280, 0x300, 0x320
_INITIAL_COUNT, _DIVIDE = 0x380, 0x3E0
_STRIDE = 0x10
_DFR_ONES = 0x0FFFFFFF


def save_apic(vcpu: Vcpu) -> ApicState:
    """The APIC of a parked vCPU; MachineError."""
    with refusals(vcpu.index, "reading the local APIC"):
        base = vcpu.get_msrs([MSR_APIC_BASE]).get(MSR_APIC_BASE, 0)
        return apic_of(vcpu.get_lapic(), base)


def load_apic(vcpu: Vcpu, apic: ApicState) -> None:
    """Set it; before the other registers, which take CR8 and the APIC's base from here.  MachineError."""
    doing = f"setting the local APIC (base {apic.apicbase:#x}, id {apic.id})"
    with refusals(vcpu.index, doing):
        vcpu.set_msrs([(MSR_APIC_BASE, apic.apicbase)])
        vcpu.set_lapic(lapic_of(apic))


def apic_of(lapic: kvm_lapic_state, base: int) -> ApicState:
    """The record of KVM's register page; no timer is kept outside of KVM."""
    page = bytes(lapic.regs)
    divide = _get(page, _DIVIDE)
    return ApicState(
        apicbase=base & 0xFFFFFFFF,
        id=_get(page, _ID) >> 24,
        arb_id=_get(page, _ARB_ID) & 0xFF,
        tpr=_get(page, _TPR) & 0xFF,
        spurious_vec=_get(page, _SPURIOUS),
        log_dest=_get(page, _LDR) >> 24,
        dest_mode=_get(page, _DFR) >> 28,
        isr=_series(page, _ISR, 8),
        tmr=_series(page, _TMR, 8),
        irr=_series(page, _IRR, 8),
        lvt=_series(page, _LVT, 6),
        esr=_get(page, _ESR),
        icr=_series(page, _ICR, 2),
        divide_conf=divide,
        count_shift=count_shift_of(divide),
        initial_count=_get(page, _INITIAL_COUNT),
    )


def lapic_of(apic: ApicState) -> kvm_lapic_state:
    """KVM's register page for the record; what is read-only is left zero, KVM computes it."""
    page = bytearray(len(kvm_lapic_state().regs))
    registers = [
        (_ID, [apic.id << 24]),
        (_TPR, [apic.tpr]),
        (_LDR, [apic.log_dest << 24]),
        (_DFR, [(apic.dest_mode & 0xF) << 28 | _DFR_ONES]),
        (_SPURIOUS, [apic.spurious_vec]),
        (_ISR, apic.isr),
        (_TMR, apic.tmr),
        (_IRR, apic.irr),
        (_ESR, [apic.esr]),
        (_ICR, apic.icr),
        (_LVT, apic.lvt),
        (_INITIAL_COUNT, [apic.initial_count]),
        (_DIVIDE, [apic.divide_conf]),
    ]
    for first, values in registers:
        for number, value in enumerate(values):
            struct.pack_into("<I", page, first + _STRIDE * number, value)
    return kvm_lapic_state.from_buffer(page)


def _get(page: bytes, register: int) -> int:
    return int.from_bytes(page[register : register + 4], "little")


def _series(page: bytes, first: int, count: int) -> list[int]:
    return [_get(page, first + _STRIDE * number) for number in range(count)]
