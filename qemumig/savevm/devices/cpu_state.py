"""The registers of one vCPU as a record (cpu-state.md §2, §3); cpu.py says how it looks on the wire.

Names of attributes are those of cpu-state.md.  Two spellings are worth a picture:

    fpregs[i]    FpReg: 64 bits of mantissa, 16 bits of sign and exponent; physical order st(0)..st(7)
    xmm_low[i]   [bits 63:0, bits 127:64]        ymm_high[i]   [bits 191:128, bits 255:192]

An attribute of a subsection is None when the subsection was absent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

_MAX64 = 0xFFFFFFFFFFFFFFFF

# bits of hflags, QEMU's digest of the execution mode (cpu-state.md §2)
_HF_CPL_SHIFT = 0
_HF_CS32 = 1 << 4
_HF_SS32 = 1 << 5
_HF_ADDSEG = 1 << 6
_HF_PE = 1 << 7
_HF_MP_SHIFT = 9  # CR0.MP, EM and TS follow each other in both
_HF_LMA = 1 << 14
_HF_CS64 = 1 << 15
_HF_SMM = 1 << 19
HF_GUEST = 1 << 21  # in nested guest mode
_HF_OSFXSR = 1 << 22

NESTED_GUEST_MODE = 1  # in the flags of KVM's nested state

_CR0_PE, _CR0_MP_SHIFT, _CR4_OSFXSR, _EFER_LMA = 1 << 0, 1, 1 << 9, 1 << 10
_EFLAGS_TF, _EFLAGS_IOPL, _EFLAGS_VM = 1 << 8, 3 << 12, 1 << 17
_SEGMENT_DPL_SHIFT, _SEGMENT_L, _SEGMENT_DB = 13, 1 << 21, 1 << 22


def _zeros(count: int) -> Callable[[], list[int]]:
    return lambda: [0] * count


def _words(count: int, length: int) -> Callable[[], list[list[int]]]:
    return lambda: [[0] * length for _ in range(count)]


@dataclass
class Segment:
    """A segment register; *flags* is the upper word of a descriptor without base and limit, *limit* in bytes."""

    selector: int = 0
    base: int = 0
    limit: int = 0xFFFF
    flags: int = 0


@dataclass
class FpReg:
    """An x87 register: its 80 bits as mantissa and sign/exponent."""

    mantissa: int = 0
    exponent: int = 0


@dataclass
class MtrrVar:
    """A variable-range MTRR pair."""

    base: int = 0
    mask: int = 0


@dataclass
class ExceptionInfo:
    """A pending exception with its payload, while in a nested guest."""

    exception_pending: int = 0
    exception_injected: int = 0
    exception_has_payload: int = 0
    exception_payload: int = 0


@dataclass
class FpopIpDp:
    """The last x87 instruction: opcode, its address, its operand's address."""

    fpop: int = 0
    fpip: int = 0
    fpdp: int = 0


@dataclass
class ArchitecturalPmu:
    """Performance counters and their controls."""

    fixed_ctr_ctrl: int = 0
    global_ctrl: int = 0
    global_status: int = 0
    global_ovf_ctrl: int = 0
    fixed_counters: list[int] = field(default_factory=_zeros(3))
    gp_counters: list[int] = field(default_factory=_zeros(18))
    gp_evtsel: list[int] = field(default_factory=_zeros(18))


@dataclass
class BoundRegister:
    """An MPX bound register."""

    lb: int = 0
    ub: int = 0


@dataclass
class Mpx:
    """Memory protection extensions."""

    bnd_regs: list[BoundRegister] = field(default_factory=lambda: [BoundRegister() for _ in range(4)])
    cfgu: int = 0
    sts: int = 0
    bndcfgs: int = 0


@dataclass
class HypervHypercall:
    """Hyper-V: who the guest is, and its hypercall page."""

    guest_os_id: int = 0
    hypercall: int = 0


@dataclass
class HypervSynic:
    """Hyper-V: the synthetic interrupt controller."""

    control: int = 0
    evt_page: int = 0
    msg_page: int = 0
    sint: list[int] = field(default_factory=_zeros(16))


@dataclass
class HypervStimer:
    """Hyper-V: the synthetic timers."""

    config: list[int] = field(default_factory=_zeros(4))
    count: list[int] = field(default_factory=_zeros(4))


@dataclass
class HypervReenlightenment:
    """Hyper-V: what a guest asked to be told when its TSC changes."""

    control: int = 0
    tsc_emulation_control: int = 0
    tsc_emulation_status: int = 0


@dataclass
class Avx512:
    """The AVX-512 state: mask registers, upper halves of zmm0-15 (4 words each), zmm16-31 (8 words each)."""

    opmask: list[int] = field(default_factory=_zeros(8))
    zmm_high: list[list[int]] = field(default_factory=_words(16, 4))
    zmm_hi16: list[list[int]] = field(default_factory=_words(16, 8))


@dataclass
class IntelPt:
    """Processor trace."""

    ctrl: int = 0
    status: int = 0
    output_base: int = 0
    output_mask: int = 0
    cr3_match: int = 0
    addrs: list[int] = field(default_factory=_zeros(8))


@dataclass
class NestedPaging:
    """The guest's CR3 and the paging mode while a nested guest uses nested paging."""

    nested_cr3: int = 0
    nested_pg_mode: int = 0


@dataclass
class NestedVmx:
    """Where a guest that runs guests with VMX has its control structures, and copies of them that KVM holds."""

    vmxon_pa: int = 0
    vmcs12_pa: int = 0
    smm_flags: int = 0
    vmcs12: bytes = b""  # 4096 bytes, or none
    shadow_vmcs12: bytes = b""


@dataclass
class NestedSvm:
    """The same with SVM."""

    vmcb_pa: int = 0
    vmcb12: bytes = b""


@dataclass
class NestedState:
    """KVM's nested state: its head, *size* in bytes with everything, and what one of the two formats adds."""

    flags: int = 0
    format: int = 0  # 0 VMX, 1 SVM
    size: int = 0
    vmx: NestedVmx = field(default_factory=NestedVmx)
    svm: NestedSvm = field(default_factory=NestedSvm)


@dataclass
class Xfd:
    """Extended feature disable."""

    xfd: int = 0
    xfd_err: int = 0


@dataclass
class AmxXtile:
    """AMX tiles: configuration and data."""

    xtilecfg: bytes = bytes(64)
    xtiledata: bytes = bytes(8192)


@dataclass
class Fred:
    """Flexible return and event delivery."""

    rsp0: int = 0
    rsp1: int = 0
    rsp2: int = 0
    rsp3: int = 0
    stklvls: int = 0
    ssp1: int = 0
    ssp2: int = 0
    ssp3: int = 0
    config: int = 0


@dataclass
class LbrRecord:
    """One branch of the last-branch records."""

    from_address: int = 0
    to_address: int = 0
    info: int = 0


@dataclass
class ArchLbr:
    """The last-branch records."""

    ctl: int = 0
    depth: int = 0
    records: list[LbrRecord] = field(default_factory=lambda: [LbrRecord() for _ in range(32)])


def _reset_segments() -> list[Segment]:
    """ES, CS, SS, DS, FS, GS after reset: the code segment at the top of the 4 GiB space, the others at 0."""
    segments = [Segment(flags=0x9300) for _ in range(6)]
    segments[1] = Segment(0xF000, 0xFFFF0000, 0xFFFF, 0x9B00)
    return segments


def _reset_mce_banks() -> list[int]:
    """40 registers, four a bank; the first of each of the 10 banks enables everything."""
    return [_MAX64, 0, 0, 0] * 10


@dataclass
class CpuState:
    """The registers of one vCPU; the defaults are those of a boot processor after reset."""

    regs: list[int] = field(default_factory=_zeros(16))  # rax rcx rdx rbx rsp rbp rsi rdi r8..r15
    eip: int = 0xFFF0
    eflags: int = 0x2
    hflags: int = 0x40  # see derive_hflags
    fpuc: int = 0x37F
    fpus: int = 0
    fptag: int = 0  # abridged: bit i set = register i holds something
    fpregs_format: int = 0
    fpregs: list[FpReg] = field(default_factory=lambda: [FpReg() for _ in range(8)])
    segs: list[Segment] = field(default_factory=_reset_segments)  # ES CS SS DS FS GS
    ldt: Segment = field(default_factory=lambda: Segment(flags=0x8200))
    tr: Segment = field(default_factory=lambda: Segment(flags=0x8B00))
    gdt: Segment = field(default_factory=Segment)
    idt: Segment = field(default_factory=Segment)
    sysenter_cs: int = 0
    sysenter_esp: int = 0
    sysenter_eip: int = 0
    cr0: int = 0x60000010
    cr2: int = 0
    cr3: int = 0
    cr4: int = 0
    dr: list[int] = field(default_factory=lambda: [0, 0, 0, 0, 0xFFFF0FF0, 0x400, 0xFFFF0FF0, 0x400])
    a20_mask: int = -1
    mxcsr: int = 0x1F80
    xmm_low: list[list[int]] = field(default_factory=_words(16, 2))
    efer: int = 0
    star: int = 0
    lstar: int = 0
    cstar: int = 0
    fmask: int = 0
    kernelgsbase: int = 0
    smbase: int = 0x30000
    pat: int = 0x0007040600070406
    hflags2: int = 0x101  # bit 2: NMIs are masked
    vm_hsave: int = 0
    vm_vmcb: int = 0
    tsc_offset: int = 0
    intercept: int = 0
    intercept_cr_read: int = 0
    intercept_cr_write: int = 0
    intercept_dr_read: int = 0
    intercept_dr_write: int = 0
    intercept_exceptions: int = 0
    v_tpr: int = 0
    mtrr_fixed: list[int] = field(default_factory=_zeros(11))
    mtrr_deftype: int = 0
    mtrr_var: list[MtrrVar] = field(default_factory=lambda: [MtrrVar() for _ in range(8)])
    interrupt_injected: int = -1  # vector, or -1: zero would be vector 0
    mp_state: int = 0  # 0 runnable, 1 uninitialised, 2 INIT received, 3 halted, 4 SIPI received
    tsc: int = 0
    exception_nr: int = -1
    soft_interrupt: int = 0
    nmi_injected: int = 0
    nmi_pending: int = 0
    has_error_code: int = 0
    sipi_vector: int = 0
    mcg_cap: int = 0x100010A
    mcg_status: int = 0
    mcg_ctl: int = _MAX64
    mce_banks: list[int] = field(default_factory=_reset_mce_banks)
    tsc_aux: int = 0
    system_time_msr: int = 0
    wall_clock_msr: int = 0
    xcr0: int = 1
    xstate_bv: int = 0
    ymm_high: list[list[int]] = field(default_factory=_words(16, 2))
    # subsections: None when absent
    error_code: int | None = None
    exception_info: ExceptionInfo | None = None
    async_pf_msr: int | None = None
    async_pf_int_msr: int | None = None
    async_pv_eoi_msr: int | None = None
    steal_time_msr: int | None = None
    poll_control_msr: int | None = None
    fpop_ip_dp: FpopIpDp | None = None
    msr_tsc_adjust: int | None = None
    msr_tscdeadline: int | None = None
    msr_ia32_misc_enable: int | None = None
    msr_ia32_feature_control: int | None = None
    msr_architectural_pmu: ArchitecturalPmu | None = None
    mpx: Mpx | None = None
    msr_hyperv_hypercall: HypervHypercall | None = None
    msr_hyperv_vapic: int | None = None
    msr_hyperv_time: int | None = None
    msr_hyperv_crash: list[int] | None = None  # 5 parameters
    msr_hyperv_runtime: int | None = None
    msr_hyperv_synic: HypervSynic | None = None
    msr_hyperv_stimer: HypervStimer | None = None
    msr_hyperv_reenlightenment: HypervReenlightenment | None = None
    avx512: Avx512 | None = None
    xss: int | None = None
    umwait: int | None = None
    tsc_khz: int | None = None
    msr_smi_count: int | None = None
    pkru: int | None = None
    pkrs: int | None = None
    spec_ctrl: int | None = None
    amd_tsc_scale_msr: int | None = None
    mcg_ext_ctl: int | None = None
    intel_pt: IntelPt | None = None
    virt_ssbd: int | None = None
    svn_npt: NestedPaging | None = None
    svm_guest: int | None = None
    nested_state: NestedState | None = None
    msr_tsx_ctrl: int | None = None
    intel_sgx: list[int] | None = None
    pdptrs: list[int] | None = None
    msr_xfd: Xfd | None = None
    msr_hwcr: int | None = None
    intel_amx_xtile: AmxXtile | None = None
    fred: Fred | None = None
    arch_lbr: ArchLbr | None = None
    triple_fault: int | None = None


def derive_hflags(cpu: CpuState, *, smm: bool = False) -> int:
    """The hflags that QEMU computes from the registers of *cpu*; *smm*: the vCPU is in system management mode."""
    code, stack = cpu.segs[1], cpu.segs[2]
    hflags = (stack.flags >> _SEGMENT_DPL_SHIFT & 3) << _HF_CPL_SHIFT
    hflags |= (cpu.cr0 & _CR0_PE) * _HF_PE
    hflags |= (cpu.cr0 >> _CR0_MP_SHIFT & 7) << _HF_MP_SHIFT
    hflags |= cpu.eflags & (_EFLAGS_TF | _EFLAGS_IOPL | _EFLAGS_VM)
    hflags |= _HF_OSFXSR if cpu.cr4 & _CR4_OSFXSR else 0
    hflags |= _HF_LMA if cpu.efer & _EFER_LMA else 0
    hflags |= _HF_SMM if smm else 0
    if cpu.efer & _EFER_LMA and code.flags & _SEGMENT_L:
        return hflags | _HF_CS32 | _HF_SS32 | _HF_CS64
    hflags |= _HF_CS32 if code.flags & _SEGMENT_DB else 0
    hflags |= _HF_SS32 if stack.flags & _SEGMENT_DB else 0
    return hflags | (_HF_ADDSEG if _needs_segment_bases(cpu) else 0)


def _needs_segment_bases(cpu: CpuState) -> bool:
    """True outside of 64-bit code when data addresses are not simply offsets."""
    code = cpu.segs[1]
    if not cpu.cr0 & _CR0_PE or cpu.eflags & _EFLAGS_VM or not code.flags & _SEGMENT_DB:
        return True
    return any(cpu.segs[index].base for index in (0, 2, 3))  # ES, SS, DS
