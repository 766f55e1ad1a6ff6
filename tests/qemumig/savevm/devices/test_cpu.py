"""`cpu`: reset values, all subsections, hflags, and what a load refuses (cpu-state.md §2, §3)."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_type_hints

import pytest

from qemumig.errors import StreamError
from qemumig.savevm.devices import cpu as module
from qemumig.savevm.devices.cpu import CPU
from qemumig.savevm.devices.cpu_state import CpuState, FpReg, NestedState, NestedSvm, NestedVmx, Segment, derive_hflags
from qemumig.savevm.reader import BytesReader

FIXED_SIZE = 1817
LISTS = {"intel_sgx": 4, "pdptrs": 4, "msr_hyperv_crash": 5}


def _load(data: bytes, version_id: int = 12) -> CpuState:
    reader = BytesReader(data)
    cpu = CPU.load(reader, version_id)
    assert reader.remaining == 0
    return cpu


def test_the_fixed_part_has_1817_bytes_and_a_fresh_record_comes_back() -> None:
    data, _ = CPU.save(CpuState())
    assert len(data) == FIXED_SIZE
    assert _load(data) == CpuState()


@pytest.mark.parametrize(
    ("offset", "size", "changed"),
    [
        (0, 8, {"regs": [1] + [0] * 15}),
        (128, 8, {"eip": 1}),
        (144, 4, {"hflags": 0}),
        (156, 8, {"fpregs": [FpReg(1)] + [FpReg() for _ in range(7)]}),
        (356, 4, {"ldt": Segment(1, flags=0x8200)}),
        (416, 4, {"idt": Segment(1)}),
        (472, 8, {"cr3": 1}),
        (552, 4, {"a20_mask": 0}),
        (560, 8, {"xmm_low": [[1, 0]] + [[0, 0]] * 15}),
        (868, 8, {"pat": 1}),
        (1149, 4, {"interrupt_injected": 1}),
        (1165, 4, {"exception_nr": 1}),
        (1545, 8, {"xcr0": 2}),
        (1561, 8, {"ymm_high": [[1, 0]] + [[0, 0]] * 15}),
    ],
)
def test_fields_lie_where_the_table_says(offset: int, size: int, changed: dict[str, Any]) -> None:
    plain, _ = CPU.save(CpuState())
    other, _ = CPU.save(CpuState(**changed))
    different = [index for index in range(FIXED_SIZE) if plain[index] != other[index]]
    assert different
    assert all(offset <= index < offset + size for index in different)


def test_version_11_ends_before_xcr0() -> None:
    data, _ = CPU.save(CpuState(eip=5, xcr0=7))
    cpu = _load(data[:1545], 11)
    assert (cpu.eip, cpu.xcr0) == (5, CpuState().xcr0)


# -- subsections


def filled(attr: str) -> Any:
    """A value for the subsection *attr* in which every number is a different one."""
    hint = next(one for one in get_args(get_type_hints(CpuState, vars(module))[attr]) if one is not type(None))
    if attr in LISTS:
        return list(range(1, LISTS[attr] + 1))
    if attr == "nested_state":
        return nested()
    return _fill(hint(), iter(range(2, 100_000))) if is_dataclass(hint) else 2


def nested(*, vmx: bool = False) -> NestedState:
    """The state of a guest that has run guests, but runs none now."""
    page, other = bytes(range(256)) * 16, bytes(reversed(range(256))) * 16
    if vmx:
        return NestedState(0, 0, 128 + 8192, vmx=NestedVmx(2, 3, 4, page, other))
    return NestedState(0, 1, 128 + 4096, svm=NestedSvm(5, page))


def _fill(record: Any, numbers: Any) -> Any:
    for one in fields(record):
        setattr(record, one.name, _replace(getattr(record, one.name), numbers))
    return record


def _replace(value: Any, numbers: Any) -> Any:
    if isinstance(value, int):
        return next(numbers) & 0x7F
    if isinstance(value, (list, bytes)):
        return type(value)(_replace(one, numbers) for one in value)
    return _fill(value, numbers)


SUBSECTIONS = [one.attr for one in CPU.subsections]


@pytest.mark.parametrize("attr", SUBSECTIONS)
def test_every_subsection_goes_there_and_back(attr: str) -> None:
    cpu = CpuState(**{attr: filled(attr)})
    data, description = CPU.save(cpu)
    (subsection,) = description["subsections"]
    assert subsection["vmsd_name"] == f"cpu/{attr}"
    loaded = _load(data)
    assert CPU.save(loaded)[0] == data
    for other in SUBSECTIONS:
        assert (getattr(loaded, other) is not None) == (other == attr)


@pytest.mark.parametrize("attr", SUBSECTIONS)
def test_a_subsection_cut_short_is_refused(attr: str) -> None:
    data, _ = CPU.save(CpuState(**{attr: filled(attr)}))
    for missing in (1, 2, (len(data) - FIXED_SIZE - 7 - len(attr) - 4) or 1):
        with pytest.raises(StreamError, match=rf"<cpu/{attr}>"):
            CPU.load(BytesReader(data[:-missing]), 12)


SIZES = {  # of the fields, as real QEMUs accepted them
    "exception_info": 11,
    "fpop_ip_dp": 18,
    "msr_architectural_pmu": 8 * 43,
    "mpx": 8 * 11,
    "msr_hyperv_synic": 8 * 19,
    "avx512": 8 * (8 + 16 * 4 + 16 * 8),
    "umwait": 4,
    "tsc_khz": 8,
    "intel_pt": 8 * 13,
    "svn_npt": 12,
    "nested_state": 8 + 6 + len("cpu/kvm_nested_state/svm") + 8 + 4096,
    "intel_sgx": 32,
    "intel_amx_xtile": 64 + 8192,
    "fred": 72,
    "arch_lbr": 8 * (2 + 32 * 3),
    "triple_fault": 1,
}


@pytest.mark.parametrize("attr", SIZES)
def test_subsections_have_the_sizes_of_the_table(attr: str) -> None:
    data, _ = CPU.save(CpuState(**{attr: filled(attr)}))
    assert len(data) == FIXED_SIZE + 6 + len(f"cpu/{attr}") + SIZES[attr]


def test_registers_at_their_reset_value_are_not_sent() -> None:
    cpu = CpuState(steal_time_msr=0, poll_control_msr=1, msr_ia32_misc_enable=1, pkru=0, avx512=module.Avx512())
    assert len(CPU.save(cpu)[0]) == FIXED_SIZE
    cpu = CpuState(poll_control_msr=0)
    assert CPU.save(cpu)[1]["subsections"][0]["vmsd_name"] == "cpu/poll_control_msr"


def test_all_subsections_together_keep_their_order() -> None:
    cpu = CpuState(**{attr: filled(attr) for attr in SUBSECTIONS})
    cpu.nested_state = NestedState()
    data, description = CPU.save(cpu)
    assert [one["vmsd_name"] for one in description["subsections"]] == [f"cpu/{attr}" for attr in SUBSECTIONS]
    assert _load(data) == cpu


VMX = "cpu/kvm_nested_state/vmx"
NESTED = {  # how QEMU 10.0 and 11.1 describe what they send, names and sizes
    VMX: [("hdr.vmx.vmxon_pa", 8), ("hdr.vmx.vmcs12_pa", 8), ("hdr.vmx.smm.flags", 2)],
    f"{VMX}/vmcs12": [("data.vmx[0].vmcs12", 4096)],
    f"{VMX}/shadow_vmcs12": [("data.vmx[0].shadow_vmcs12", 4096)],
    "cpu/kvm_nested_state/svm": [("hdr.svm.vmcb_pa", 8), ("data.svm[0].vmcb12", 4096)],
}


def _subsections(state: dict[str, Any]) -> dict[str, list[tuple[str, int]]]:
    """Name → (field, bytes) of every subsection, nested ones too."""
    found = {}
    for one in state.get("subsections", ()):
        found[one["vmsd_name"]] = [(f["name"], f["size"] * f.get("array_len", 1)) for f in one["fields"]]
        found |= _subsections(one)
    return found


@pytest.mark.parametrize("vmx", [False, True])
def test_nested_state_is_laid_out_as_real_qemus_have_it(vmx: bool) -> None:
    cpu = CpuState(nested_state=nested(vmx=vmx))
    data, description = CPU.save(cpu)
    (struct_,) = description["subsections"][0]["fields"]
    expected = {name: fields_ for name, fields_ in NESTED.items() if name.startswith(VMX) == vmx}
    assert _subsections(struct_["struct"]) == expected
    assert struct_["size"] == (8329 if vmx else 4142)
    assert _load(data) == cpu


def test_nested_state_without_copies_of_control_structures_is_short() -> None:
    cpu = CpuState(nested_state=NestedState(0, 0, 128, vmx=NestedVmx(2, 3)))
    data, _ = CPU.save(cpu)
    assert len(data) == FIXED_SIZE + 6 + len("cpu/nested_state") + 8 + 6 + len(VMX) + 18
    assert _load(data) == cpu


# -- what a load refuses


@pytest.mark.parametrize(
    ("lie", "finding"),
    [
        ({"fpregs_format": 1}, "fpregs_format is 1, expected 0"),
        ({"hflags": 1 << 21}, "hflags 0x200000 and the flags of the nested state 0x0 contradict each other"),
        ({"nested_state": NestedState(flags=1)}, "hflags 0x40 and the flags of the nested state 0x1 contradict"),
    ],
)
def test_a_contradictory_cpu_is_refused(lie: dict[str, Any], finding: str) -> None:
    with pytest.raises(StreamError, match=rf"section 'cpu' instance 0 at offset 0x[0-9a-f]+: {finding}"):
        _load(CPU.save(CpuState(**lie))[0])


def test_a_guest_with_a_xen_vcpu_is_refused_by_name() -> None:
    """97 bytes in QEMU 10.0 and 11.1, which have it for `pc` alone and do not let such a guest go."""
    data = CPU.save(CpuState())[0] + b"\x05\x0ccpu/xen_vcpu\0\0\0\1" + bytes(97)
    with pytest.raises(StreamError, match="unknown subsection 'cpu/xen_vcpu' of 'cpu'; the guest has a Xen vCPU"):
        CPU.load(BytesReader(data), 12)


@pytest.mark.parametrize("version", [0, 10, 13])
def test_a_version_of_somebody_else_is_refused(version: int) -> None:
    with pytest.raises(StreamError, match=f"'cpu' has version {version}, expected 11 to 12"):
        CPU.load(BytesReader(bytes(FIXED_SIZE)), version)


# -- hflags


def _long_mode(**changes: Any) -> CpuState:
    """A 64-bit program at CPL 3, as the recordings have it."""
    cpu = CpuState(cr0=0x80010033, cr4=0x40620, efer=0x501)
    cpu.segs[1].flags, cpu.segs[2].flags = 0x00A0FB00, 0x00C0F300
    for name, value in changes.items():
        setattr(cpu, name, value)
    return cpu


def _protected_mode(code: int = 0x00C09B00, stack: int = 0x00C09300, data_base: int = 0) -> CpuState:
    cpu = CpuState(cr0=0x60000011)
    cpu.segs[1].flags, cpu.segs[2].flags = code, stack
    cpu.segs[3].base = data_base
    return cpu


@pytest.mark.parametrize(
    ("cpu", "hflags"),
    [
        (CpuState(), 0x40),
        (_long_mode(), 0x0040C2B3),
        (_long_mode(eflags=0x3102), 0x0040C2B3 | 0x3100),
        (_long_mode(cr0=0x8001003B), 0x0040CAB3),
        (_protected_mode(), 0xB0),
        (_protected_mode(data_base=0x1000), 0xF0),
        (_protected_mode(code=0x00009B00), 0xE0),
        (_protected_mode(code=0x00009B00, stack=0x00009300), 0xC0),
        (_protected_mode(code=0x00C0FB00, stack=0x00C0F300), 0xB3),
    ],
)
def test_hflags_are_derived_from_the_registers(cpu: CpuState, hflags: int) -> None:
    assert f"{derive_hflags(cpu):#x}" == f"{hflags:#x}"


def test_hflags_tell_of_system_management_mode() -> None:
    assert derive_hflags(CpuState(), smm=True) == 0x40 | 1 << 19


def test_fresh_records_share_nothing() -> None:
    one, other = CpuState(), CpuState()
    one.segs[0].base = one.xmm_low[3][1] = one.regs[0] = one.mce_banks[1] = 7
    one.fpregs[0].mantissa = 7
    assert other == CpuState()
    assert one.segs[2].base == one.xmm_low[2][1] == 0
