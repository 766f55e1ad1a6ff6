"""All registers of one vCPU, read and written in the order that KVM needs (cpu-state.md §4).

    read    events, run state, general registers, XSAVE, XCR0, segments, MSRs, debug registers
    write   feature control, segments, TSC frequency, general registers, XSAVE, XCR0, MSRs, events, run state, TSC
            deadline, debug registers

The run state is asked for before the registers: asking may deliver an INIT or a SIPI, which changes CS and RIP.  The
APIC is loaded before all of this.  The TSC is read when the machine stops, and again after it ran; it is the machine
that keeps it in between.

Fields that KVM does not back (cpu-state.md §2, "-") are sent as a real machine's are and ignored on the way in.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from qemumig.savevm.devices.cpu_state import CpuState, derive_hflags

from ..errors import KvmError
from ..structs import kvm_sregs, kvm_sregs2, kvm_xcrs
from ..vcpu import Vcpu
from . import msrs
from .errors import UnsupportedStateError, refusals
from .events import events_of, take_events
from .fpu import take_xsave, xsave_of
from .host import HostState
from .registers import (
    debugregs_of,
    put_sregs,
    regs_of,
    take_debugregs,
    take_regs,
    take_sregs,
)

# Parts of a CpuState that belong to features no CPU model here has (kvm/cpuid.py hides them).
_WITHOUT_PLACE = (
    "msr_architectural_pmu",
    "mpx",
    "mcg_ext_ctl",
    "intel_pt",
    "svn_npt",
    "svm_guest",
    "nested_state",
    "intel_sgx",
    "msr_xfd",
    "intel_amx_xtile",
    "fred",
    "arch_lbr",
)


def read_tsc(vcpu: Vcpu) -> int:
    """The guest's TSC now."""
    with refusals(vcpu.index, "reading the TSC"):
        return vcpu.get_msrs([msrs.MSR_TSC]).get(msrs.MSR_TSC, 0)


def save_cpu(vcpu: Vcpu, host: HostState, tsc: int) -> CpuState:
    """The registers of a parked vCPU; *tsc* is its TSC at the stop.  MachineError."""
    cpu = CpuState(mcg_cap=host.mcg_cap)
    with refusals(vcpu.index, "reading the registers"):
        events = vcpu.get_vcpu_events()
        cpu.mp_state = vcpu.get_mp_state()
        take_regs(cpu, vcpu.get_regs())
        take_xsave(cpu, vcpu.get_xsave(), host.xsave_components)
        cpu.xcr0 = _xcr0(vcpu.get_xcrs())
        sregs = vcpu.get_sregs2() if host.has_sregs2 else vcpu.get_sregs()
        take_sregs(cpu, sregs)
        msrs.take_msrs(cpu, vcpu.get_msrs(msrs.indices(host.msrs)), host.physical_bits)
        take_debugregs(cpu, vcpu.get_debugregs())
        cpu.tsc_khz = vcpu.get_tsc_khz()
    take_events(cpu, events)
    cpu.hflags = derive_hflags(cpu, smm=bool(events.smi.smm))
    cpu.tsc = tsc
    return cpu


def load_cpu(vcpu: Vcpu, host: HostState, cpu: CpuState, warn: Callable[[str], None]) -> None:
    """Write *cpu* into a parked vCPU whose APIC is loaded; MachineError says what was refused.

    *warn* is told of what the guest may notice and live with.
    """

    def doing(what: str) -> AbstractContextManager[None]:
        return refusals(vcpu.index, f"setting {what}")

    with doing("the CPU's features"):
        _require_place(cpu)
    with doing("MSRs"):
        vcpu.set_msrs(msrs.feature_control_of(cpu, host.msrs))
    with doing(f"special registers (CR0 {cpu.cr0:#x}, CR3 {cpu.cr3:#x}, CR4 {cpu.cr4:#x}, EFER {cpu.efer:#x})"):
        _load_sregs(vcpu, host, cpu)
    _load_tsc_khz(vcpu, cpu, warn)
    with doing(f"general registers (RIP {cpu.eip:#x}, RFLAGS {cpu.eflags:#x})"):
        vcpu.set_regs(regs_of(cpu))
    with doing(f"the FPU (XSTATE_BV {cpu.xstate_bv:#x}, MXCSR {cpu.mxcsr:#x})"):
        vcpu.set_xsave(xsave_of(cpu, vcpu.xsave_size, host.xsave_components))
    with doing(f"XCR0 to {cpu.xcr0:#x}"):
        vcpu.set_xcrs(_xcrs_of(cpu.xcr0))
    with doing("MSRs"):
        vcpu.set_msrs(msrs.msrs_of(cpu, host.msrs, host.physical_bits))
    with doing(f"events (exception {cpu.exception_nr}, interrupt {cpu.interrupt_injected})"):
        vcpu.set_vcpu_events(events_of(cpu, host))
    with doing(f"the run state to {cpu.mp_state}"):
        vcpu.set_mp_state(cpu.mp_state)
    with doing("the TSC deadline"):
        vcpu.set_msrs(msrs.deadline_of(cpu, host.msrs))
    with doing(f"debug registers (DR6 {cpu.dr[6]:#x}, DR7 {cpu.dr[7]:#x})"):
        vcpu.set_debugregs(debugregs_of(cpu))


def _require_place(cpu: CpuState) -> None:
    for attr in _WITHOUT_PLACE:
        value = getattr(cpu, attr)
        if value is not None and _is_set(value):
            raise UnsupportedStateError(f"{attr} is in use, and this machine does not have it")


def _is_set(value: Any) -> bool:
    """True when something in a number, bytes, list or record of them is not zero."""
    if isinstance(value, int):
        return value != 0
    return any(map(_is_set, value if isinstance(value, (list, bytes)) else vars(value).values()))


def _load_sregs(vcpu: Vcpu, host: HostState, cpu: CpuState) -> None:
    sregs: kvm_sregs | kvm_sregs2
    if host.has_sregs2:
        sregs = vcpu.get_sregs2()  # for the APIC's base and CR8
        put_sregs(cpu, sregs)
        vcpu.set_sregs2(sregs)
    else:
        sregs = vcpu.get_sregs()
        put_sregs(cpu, sregs)
        vcpu.set_sregs(sregs)


def _load_tsc_khz(vcpu: Vcpu, cpu: CpuState, warn: Callable[[str], None]) -> None:
    """The source's frequency; where KVM cannot give it, the guest goes on with ours, as on a real machine."""
    with refusals(vcpu.index, "reading the TSC frequency"):
        ours = vcpu.get_tsc_khz()
    if not cpu.tsc_khz or cpu.tsc_khz == ours:
        return
    try:
        vcpu.set_tsc_khz(cpu.tsc_khz)
    except (KvmError, OverflowError):
        warn(f"vCPU {vcpu.index}: its TSC ran at {cpu.tsc_khz} kHz and now runs at {ours} kHz: no TSC scaling here")


def _xcr0(xcrs: kvm_xcrs) -> int:
    """XCR0; 1, the reset value, where the processor has none."""
    values = {one.xcr: one.value for one in xcrs.xcrs[: xcrs.nr_xcrs]}
    return values.get(0, 1)


def _xcrs_of(xcr0: int) -> kvm_xcrs:
    xcrs = kvm_xcrs(nr_xcrs=1)
    xcrs.xcrs[0].xcr, xcrs.xcrs[0].value = 0, xcr0
    return xcrs
