"""`cpu`: the registers of one vCPU on the wire (cpu-state.md §2, §3); version 12, instance = vCPU index.

In    CpuState (cpu_state.py), filled from the hypervisor
Out   1817 bytes, and a subsection for each feature that is in use

A receiver knows every subsection a QEMU of this machine may send, since nothing on the wire tells how long one is.  One
is left out: `cpu/xen_vcpu`, which belongs to the machine `pc`; what comes with it is refused by its name.
Where QEMU leaves a subsection out because its value is the reset value, so do we, whether the attribute is None or holds
that value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..fields import Field, int32, int64, struct, tmp, uint8, uint16, uint32, uint64
from ..vmstate import Subsection, Value, VMState, plain_subsection, when_nonzero
from .cpu_state import (
    HF_GUEST,
    NESTED_GUEST_MODE,
    AmxXtile,
    ArchitecturalPmu,
    ArchLbr,
    Avx512,
    BoundRegister,
    CpuState,
    ExceptionInfo,
    FpopIpDp,
    FpReg,
    Fred,
    HypervHypercall,
    HypervReenlightenment,
    HypervStimer,
    HypervSynic,
    IntelPt,
    LbrRecord,
    Mpx,
    MtrrVar,
    NestedPaging,
    NestedState,
    NestedSvm,
    NestedVmx,
    Segment,
    Xfd,
)

_SEGMENT = VMState(
    "segment",
    1,
    (uint32("selector"), uint64("base"), uint32("limit"), uint32("flags")),
    record=Segment,
)

_MTRR_VAR = VMState("mtrr_var", 1, (uint64("base"), uint64("mask")), record=MtrrVar)


@dataclass
class _FpRegTmp:
    """How an x87 register looks on the wire, for the moment of its passage."""

    parent: Any = None
    tmp_mant: int = 0
    tmp_exp: int = 0


def _fpreg_to_wire(helper: _FpRegTmp) -> None:
    helper.tmp_mant, helper.tmp_exp = helper.parent.mantissa, helper.parent.exponent


def _fpreg_from_wire(helper: _FpRegTmp, version_id: int) -> None:
    helper.parent.mantissa, helper.parent.exponent = helper.tmp_mant, helper.tmp_exp


_FPREG_TMP = VMState(
    "fpreg_tmp",
    0,
    (uint64("tmp_mant"), uint16("tmp_exp")),
    pre_save=_fpreg_to_wire,
    post_load=_fpreg_from_wire,
    record=_FpRegTmp,
)

_FPREG = VMState("fpreg", 0, (tmp("tmp", _FPREG_TMP),), record=FpReg)


def _register_words(name: str, first: int, count: int) -> VMState:
    """*count* words of a vector register from word *first* on, as a list."""
    fields = tuple(uint64(f"_q_ZMMReg[{first + index}]", index) for index in range(count))
    return VMState(name, 1, fields, record=lambda: [0] * count)


def _check_loaded(cpu: CpuState, version_id: int) -> None:
    if cpu.fpregs_format != 0:
        raise ValueError(f"fpregs_format is {cpu.fpregs_format}, expected 0")
    nested_flags = cpu.nested_state.flags if cpu.nested_state else 0
    if bool(cpu.hflags & HF_GUEST) != bool(nested_flags & NESTED_GUEST_MODE):
        raise ValueError(
            f"hflags {cpu.hflags:#x} and the flags of the nested state {nested_flags:#x} contradict each other"
        )


def _when_any(record: Any) -> bool:
    """A `needed`: QEMU sends the subsection only when something in it is not zero."""
    return any(_is_set(value) for value in vars(record).values())


def _is_set(value: Any) -> bool:
    if isinstance(value, list):
        return any(map(_is_set, value))
    return any(map(_is_set, vars(value).values())) if hasattr(value, "__dict__") else bool(value)


def _when_not_one(record: Value) -> bool:
    """A `needed` of registers whose reset value is 1."""
    return record.value != 1


def _msr(attr: str, member: str, needed: Any = when_nonzero) -> Subsection:
    """A subsection `cpu/attr` that holds one 64-bit register."""
    return plain_subsection(attr, f"cpu/{attr}", uint64, f"env.{member}", needed=needed)


def _record(attr: str, record: Any, *fields: Field, needed: Any = _when_any, post_load: Any = None) -> Subsection:
    """A subsection `cpu/attr` with a record of its own."""
    return Subsection(attr, VMState(f"cpu/{attr}", 1, fields, record=record, needed=needed, post_load=post_load))


def _tiles_to_bytes(tiles: AmxXtile, version_id: int) -> None:
    """The wire has arrays of single bytes, where the record has them in one piece."""
    tiles.xtilecfg, tiles.xtiledata = bytes(tiles.xtilecfg), bytes(tiles.xtiledata)


def _four_words(name: str, attr: str) -> Field:
    return uint64(name, attr, count=4)


def _five_words(name: str, attr: str) -> Field:
    return uint64(name, attr, count=5)


def _page(name: str, attr: str) -> Field:
    return uint8(name, attr, count=4096)


def _value_to_bytes(record: Value, version_id: int) -> None:
    record.value = bytes(record.value)


def _vmcs(attr: str) -> Subsection:
    name = f"cpu/kvm_nested_state/vmx/{attr}"
    field_name = f"data.vmx[0].{attr}"
    return plain_subsection(attr, name, _page, field_name, needed=when_nonzero, post_load=_value_to_bytes)


def _fill_vmx(vmx: NestedVmx, version_id: int) -> None:
    vmx.vmcs12, vmx.shadow_vmcs12 = vmx.vmcs12 or b"", vmx.shadow_vmcs12 or b""


def _fill_svm(svm: NestedSvm, version_id: int) -> None:
    svm.vmcb12 = bytes(svm.vmcb12)


def _fill_nested_state(nested: NestedState, version_id: int) -> None:
    nested.vmx, nested.svm = nested.vmx or NestedVmx(), nested.svm or NestedSvm()


_NESTED_STATE = VMState(
    "cpu/kvm_nested_state",
    1,
    (uint16("flags"), uint16("format"), uint32("size")),
    subsections=(
        Subsection(
            "vmx",
            VMState(
                "cpu/kvm_nested_state/vmx",
                1,
                (uint64("hdr.vmx.vmxon_pa"), uint64("hdr.vmx.vmcs12_pa"), uint16("hdr.vmx.smm.flags", "smm_flags")),
                subsections=(_vmcs("vmcs12"), _vmcs("shadow_vmcs12")),
                needed=_when_any,
                post_load=_fill_vmx,
                record=NestedVmx,
            ),
        ),
        Subsection(
            "svm",
            VMState(
                "cpu/kvm_nested_state/svm",
                1,
                (uint64("hdr.svm.vmcb_pa"), _page("data.svm[0].vmcb12", "vmcb12")),
                needed=_when_any,
                post_load=_fill_svm,
                record=NestedSvm,
            ),
        ),
    ),
    post_load=_fill_nested_state,
    record=NestedState,
)


def _nested_state(name: str, attr: str) -> Field:
    return struct(name, _NESTED_STATE, attr)


_LBR_RECORD = VMState(
    "lbr_records_var",
    1,
    (uint64("from", "from_address"), uint64("to", "to_address"), uint64("info")),
    record=LbrRecord,
)

_SUBSECTIONS = (
    plain_subsection("error_code", "cpu/error_code", int32, "env.error_code"),
    _record(
        "exception_info",
        ExceptionInfo,
        uint8("env.exception_pending"),
        uint8("env.exception_injected"),
        uint8("env.exception_has_payload"),
        uint64("env.exception_payload"),
        needed=None,
    ),
    _msr("async_pf_msr", "async_pf_en_msr"),
    _msr("async_pf_int_msr", "async_pf_int_msr"),
    _msr("async_pv_eoi_msr", "pv_eoi_en_msr"),
    _msr("steal_time_msr", "steal_time_msr"),
    _msr("poll_control_msr", "poll_control_msr", _when_not_one),
    _record("fpop_ip_dp", FpopIpDp, uint16("env.fpop"), uint64("env.fpip"), uint64("env.fpdp")),
    _msr("msr_tsc_adjust", "tsc_adjust"),
    _msr("msr_tscdeadline", "tsc_deadline"),
    _msr("msr_ia32_misc_enable", "msr_ia32_misc_enable", _when_not_one),
    _msr("msr_ia32_feature_control", "msr_ia32_feature_control"),
    _record(
        "msr_architectural_pmu",
        ArchitecturalPmu,
        uint64("env.msr_fixed_ctr_ctrl", "fixed_ctr_ctrl"),
        uint64("env.msr_global_ctrl", "global_ctrl"),
        uint64("env.msr_global_status", "global_status"),
        uint64("env.msr_global_ovf_ctrl", "global_ovf_ctrl"),
        uint64("env.msr_fixed_counters", "fixed_counters", count=3),
        uint64("env.msr_gp_counters", "gp_counters", count=18),
        uint64("env.msr_gp_evtsel", "gp_evtsel", count=18),
    ),
    _record(
        "mpx",
        Mpx,
        struct(
            "env.bnd_regs",
            VMState("bnd_regs", 1, (uint64("lb"), uint64("ub")), record=BoundRegister),
            count=4,
        ),
        uint64("env.bndcs_regs.cfgu"),
        uint64("env.bndcs_regs.sts"),
        uint64("env.msr_bndcfgs", "bndcfgs"),
    ),
    _record(
        "msr_hyperv_hypercall",
        HypervHypercall,
        uint64("env.msr_hv_guest_os_id", "guest_os_id"),
        uint64("env.msr_hv_hypercall", "hypercall"),
    ),
    _msr("msr_hyperv_vapic", "msr_hv_vapic"),
    _msr("msr_hyperv_time", "msr_hv_tsc"),
    plain_subsection("msr_hyperv_crash", "cpu/msr_hyperv_crash", _five_words, "env.msr_hv_crash_params"),
    _msr("msr_hyperv_runtime", "msr_hv_runtime"),
    _record(
        "msr_hyperv_synic",
        HypervSynic,
        uint64("env.msr_hv_synic_control", "control"),
        uint64("env.msr_hv_synic_evt_page", "evt_page"),
        uint64("env.msr_hv_synic_msg_page", "msg_page"),
        uint64("env.msr_hv_synic_sint", "sint", count=16),
    ),
    _record(
        "msr_hyperv_stimer",
        HypervStimer,
        uint64("env.msr_hv_stimer_config", "config", count=4),
        uint64("env.msr_hv_stimer_count", "count", count=4),
    ),
    _record(
        "msr_hyperv_reenlightenment",
        HypervReenlightenment,
        uint64("env.msr_hv_reenlightenment_control", "control"),
        uint64("env.msr_hv_tsc_emulation_control", "tsc_emulation_control"),
        uint64("env.msr_hv_tsc_emulation_status", "tsc_emulation_status"),
    ),
    _record(
        "avx512",
        Avx512,
        uint64("env.opmask_regs", "opmask", count=8),
        struct("env.xmm_regs", _register_words("zmmh_reg", 4, 4), "zmm_high", count=16),
        struct("env.xmm_regs", _register_words("hi16_zmm_reg", 0, 8), "zmm_hi16", count=16),
    ),
    _msr("xss", "xss"),
    plain_subsection("umwait", "cpu/umwait", uint32, "env.umwait", needed=when_nonzero),
    plain_subsection("tsc_khz", "cpu/tsc_khz", int64, "env.tsc_khz", needed=when_nonzero),
    _msr("msr_smi_count", "msr_smi_count"),
    plain_subsection("pkru", "cpu/pkru", uint32, "env.pkru", needed=when_nonzero),
    plain_subsection("pkrs", "cpu/pkrs", uint32, "env.pkrs", needed=when_nonzero),
    _msr("spec_ctrl", "spec_ctrl"),
    _msr("amd_tsc_scale_msr", "amd_tsc_scale_msr", None),
    _msr("mcg_ext_ctl", "mcg_ext_ctl"),
    _record(
        "intel_pt",
        IntelPt,
        uint64("env.msr_rtit_ctrl", "ctrl"),
        uint64("env.msr_rtit_status", "status"),
        uint64("env.msr_rtit_output_base", "output_base"),
        uint64("env.msr_rtit_output_mask", "output_mask"),
        uint64("env.msr_rtit_cr3_match", "cr3_match"),
        uint64("env.msr_rtit_addrs", "addrs", count=8),
    ),
    _msr("virt_ssbd", "virt_ssbd"),
    _record("svn_npt", NestedPaging, uint64("env.nested_cr3"), uint32("env.nested_pg_mode"), needed=None),
    plain_subsection("svm_guest", "cpu/svm_guest", uint32, "env.int_ctl"),
    plain_subsection("nested_state", "cpu/nested_state", _nested_state, "env.nested_state"),
    plain_subsection("msr_tsx_ctrl", "cpu/msr_tsx_ctrl", uint32, "env.tsx_ctrl"),
    plain_subsection("intel_sgx", "cpu/intel_sgx", _four_words, "env.msr_ia32_sgxlepubkeyhash"),
    plain_subsection("pdptrs", "cpu/pdptrs", _four_words, "env.pdptrs"),
    _record("msr_xfd", Xfd, uint64("env.msr_xfd", "xfd"), uint64("env.msr_xfd_err", "xfd_err"), needed=None),
    _msr("msr_hwcr", "msr_hwcr"),
    _record(
        "fred",
        Fred,
        *(uint64(f"env.fred_{name}", name) for name in vars(Fred())),
        needed=None,
    ),
    _record(
        "intel_amx_xtile",
        AmxXtile,
        uint8("env.xtilecfg", count=64),
        uint8("env.xtiledata", count=8192),
        needed=None,
        post_load=_tiles_to_bytes,
    ),
    _record(
        "arch_lbr",
        ArchLbr,
        uint64("env.msr_lbr_ctl", "ctl"),
        uint64("env.msr_lbr_depth", "depth"),
        struct("env.lbr_records", _LBR_RECORD, "records", count=32),
        needed=None,
    ),
    plain_subsection("triple_fault", "cpu/triple_fault", uint8, "env.triple_fault_pending", needed=when_nonzero),
)

_FIELDS = (
    uint64("env.regs", count=16),
    uint64("env.eip"),
    uint64("env.eflags"),
    uint32("env.hflags"),
    uint16("env.fpuc"),
    uint16("env.fpus_vmstate", "fpus"),
    uint16("env.fptag_vmstate", "fptag"),
    uint16("env.fpregs_format_vmstate", "fpregs_format"),
    struct("env.fpregs", _FPREG, count=8),
    struct("env.segs", _SEGMENT, count=6),
    struct("env.ldt", _SEGMENT),
    struct("env.tr", _SEGMENT),
    struct("env.gdt", _SEGMENT),
    struct("env.idt", _SEGMENT),
    uint32("env.sysenter_cs"),
    uint64("env.sysenter_esp"),
    uint64("env.sysenter_eip"),
    uint64("env.cr[0]", "cr0"),
    uint64("env.cr[2]", "cr2"),
    uint64("env.cr[3]", "cr3"),
    uint64("env.cr[4]", "cr4"),
    uint64("env.dr", count=8),
    int32("env.a20_mask"),
    uint32("env.mxcsr"),
    struct("env.xmm_regs", _register_words("xmm_reg", 0, 2), "xmm_low", count=16),
    uint64("env.efer"),
    uint64("env.star"),
    uint64("env.lstar"),
    uint64("env.cstar"),
    uint64("env.fmask"),
    uint64("env.kernelgsbase"),
    uint32("env.smbase"),
    uint64("env.pat"),
    uint32("env.hflags2"),
    uint64("env.vm_hsave"),
    uint64("env.vm_vmcb"),
    uint64("env.tsc_offset"),
    uint64("env.intercept"),
    uint16("env.intercept_cr_read"),
    uint16("env.intercept_cr_write"),
    uint16("env.intercept_dr_read"),
    uint16("env.intercept_dr_write"),
    uint32("env.intercept_exceptions"),
    uint8("env.v_tpr"),
    uint64("env.mtrr_fixed", count=11),
    uint64("env.mtrr_deftype"),
    struct("env.mtrr_var", _MTRR_VAR, count=8),
    int32("env.interrupt_injected"),
    uint32("env.mp_state"),
    uint64("env.tsc"),
    int32("env.exception_nr"),
    uint8("env.soft_interrupt"),
    uint8("env.nmi_injected"),
    uint8("env.nmi_pending"),
    uint8("env.has_error_code"),
    uint32("env.sipi_vector"),
    uint64("env.mcg_cap"),
    uint64("env.mcg_status"),
    uint64("env.mcg_ctl"),
    uint64("env.mce_banks", count=40),
    uint64("env.tsc_aux"),
    uint64("env.system_time_msr"),
    uint64("env.wall_clock_msr"),
    uint64("env.xcr0", version=12),
    uint64("env.xstate_bv", version=12),
    struct("env.xmm_regs", _register_words("ymmh_reg", 2, 2), "ymm_high", count=16, version=12),
)

CPU = VMState(
    "cpu",
    12,
    _FIELDS,
    minimum_version_id=11,
    subsections=_SUBSECTIONS,
    post_load=_check_loaded,
    record=CpuState,
)
