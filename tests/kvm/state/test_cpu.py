"""A vCPU's whole state in and out of KVM."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from kvm.cpuid import CpuModel
from kvm.state.apic import load_apic
from kvm.state.cpu import load_cpu, read_tsc, save_cpu
from kvm.state.host import HostState
from kvm.system import Kvm
from kvm.vcpu import Vcpu
from qemumig.errors import MachineError
from qemumig.savevm.devices.apic import ApicState
from qemumig.savevm.devices.cpu import CPU
from qemumig.savevm.devices.cpu_state import (
    ArchitecturalPmu,
    Avx512,
    CpuState,
    FpopIpDp,
    FpReg,
    MtrrVar,
    NestedState,
    Segment,
)
from qemumig.savevm.reader import BytesReader
from tests.qemumig.savevm import recorded

pytestmark = pytest.mark.needs("kvm")


@contextmanager
def new_vcpu(index: int = 0) -> Iterator[tuple[Vcpu, HostState]]:
    """A vCPU as the machine makes it, in a VM of its own."""
    with Kvm() as kvm, kvm.create_vm() as vm:
        supported = kvm.supported_cpuid()
        model = CpuModel("qemu64", {"pni": False}, supported)
        host = HostState.of(vm, model, supported)
        vm.create_irqchip()
        vcpu = vm.create_vcpu(index)
        vcpu.setup_mce(host.mcg_cap)
        vcpu.set_cpuid(model.entries(index, index + 1))
        yield vcpu, host


@pytest.fixture
def machine() -> Iterator[tuple[Vcpu, HostState]]:
    with new_vcpu() as made:
        yield made


def load(vcpu: Vcpu, host: HostState, cpu: CpuState, **more: Any) -> list[str]:
    """Load APIC and registers; the warnings."""
    warnings: list[str] = []
    load_apic(vcpu, more.get("apic", ApicState()))
    load_cpu(vcpu, host, cpu, warnings.append)
    return warnings


def over_the_wire(cpu: CpuState) -> tuple[bytes, CpuState]:
    wire, _ = CPU.save(cpu)
    return wire, CPU.load(BytesReader(wire), CPU.version_id)


def in_full_use(host: HostState, seed: int) -> CpuState:
    """A 64-bit program at CPL 3 that uses every register there is; what this host lacks is left alone."""
    generator = random.Random(seed)
    word = lambda: generator.getrandbits(64)  # noqa: E731
    words = lambda count: [word() for _ in range(count)]  # noqa: E731
    has = host.xsave_components
    xcr0 = 1 | 2 | (4 if 2 in has else 0)
    cpu = CpuState(
        regs=words(16),
        eip=0x0000_7FFF_1234_5678,
        eflags=0x246,
        fpuc=0x27F,
        fpus=0x3800,
        fptag=0xFF,
        fpregs=[FpReg(word() | 1 << 63, generator.randrange(1, 0x7FFE)) for _ in range(8)],
        segs=[
            Segment(0x23, 0, 0xFFFFFFFF, 0x00C0F300),
            Segment(0x2B, 0, 0xFFFFFFFF, 0x00A0FB00),
            Segment(0x23, 0, 0xFFFFFFFF, 0x00C0F300),
            Segment(0x23, 0, 0xFFFFFFFF, 0x00C0F300),
            Segment(0x23, 0x0000_7F00_0000_1000, 0xFFFFFFFF, 0x00C0F300),
            Segment(0x23, 0x0000_7F00_0000_2000, 0xFFFFFFFF, 0x00C0F300),
        ],
        ldt=Segment(0, 0, 0xFFFF, 0x8200),
        tr=Segment(0x30, 0x2400, 0xE8, 0x8B00),
        gdt=Segment(0, 0xFFFF_8000_0000_2000, 0x12F, 0),
        idt=Segment(0, 0xFFFF_8000_0000_4000, 0x40F, 0),
        sysenter_cs=0x18,
        sysenter_esp=0xFFFF_8000_0004_5678,
        sysenter_eip=0xFFFF_8000_000F_6789,
        cr0=0x80010033,
        cr2=0x77000,
        cr3=0x10000,
        cr4=0x40620,
        dr=[0x55000, 0x56000, 0x57000, 0x66000, 0xFFFF0FF1, 0x400, 0xFFFF0FF1, 0x400],
        mxcsr=0x1FA0,
        xmm_low=[words(2) for _ in range(16)],
        ymm_high=[words(2) if 2 in has else [0, 0] for _ in range(16)],
        efer=0xD01,
        star=0x001B0018_001B0018,
        lstar=0xFFFF_8000_000F_1234,
        cstar=0xFFFF_8000_000F_2345,
        fmask=0x600,
        kernelgsbase=0xFFFF_8000_000F_3456,
        pat=0x0007_0106_0007_0106,
        mtrr_fixed=[0x0606060606060606] * 11,
        mtrr_deftype=0xC06,
        mtrr_var=[MtrrVar(0x80000000, 0x000F_FFFF_8000_0800 | (1 << 52) - (1 << host.physical_bits))]
        + [MtrrVar(0, (1 << 52) - (1 << host.physical_bits)) for _ in range(7)],
        interrupt_injected=0x40,
        tsc=0x123456789ABC,
        mcg_cap=host.mcg_cap,
        system_time_msr=0x5001,
        wall_clock_msr=0x5040,
        hflags2=0x105,
        xcr0=xcr0,
        xstate_bv=xcr0,
        fpop_ip_dp=FpopIpDp(0x123, 0x1000, 0x2000),
        msr_tsc_adjust=0xFFFF_FFFF_FFFF_0000,
        msr_tscdeadline=0,
        steal_time_msr=0x6001,
        poll_control_msr=0,
        tsc_khz=None,
    )
    if {5, 6, 7} <= set(has):
        cpu.xcr0 |= 0xE0
        cpu.xstate_bv |= 0xE0
        cpu.avx512 = Avx512(words(8), [words(4) for _ in range(16)], [words(8) for _ in range(16)])
    return cpu


@pytest.mark.parametrize("seed", [1, 2])
def test_state_in_full_use_comes_out_of_a_second_vm_byte_identical(seed: int) -> None:
    with new_vcpu() as (vcpu, host):
        given = in_full_use(host, seed)
        load(vcpu, host, given)
        first = save_cpu(vcpu, host, given.tsc)
    wire, record = over_the_wire(first)
    with new_vcpu() as (vcpu, host):
        load(vcpu, host, record)
        again, _ = over_the_wire(save_cpu(vcpu, host, record.tsc))
    assert again == wire
    # And the first machine did not simply forget: what it was given is what it says.
    fields = {field.name for field in dataclasses.fields(CpuState)}
    computed = {"hflags", "tsc_khz", "sysenter_esp"} | {
        name for name in fields if getattr(given, name) is None and getattr(first, name) is not None
    }
    different = {name for name in fields - computed if getattr(first, name) != getattr(given, name)}
    assert different == set()


def test_a_fresh_vcpu_is_in_reset_state(machine: tuple[Vcpu, HostState]) -> None:
    vcpu, host = machine
    cpu = save_cpu(vcpu, host, 0)
    expected = CpuState(mcg_cap=host.mcg_cap)
    for name in ("eip", "eflags", "hflags", "segs", "ldt", "tr", "cr0", "cr4", "efer", "dr", "pat", "mp_state", "xcr0"):
        assert getattr(cpu, name) == getattr(expected, name), name
    assert (cpu.exception_nr, cpu.interrupt_injected, cpu.hflags2) == (-1, -1, 0x101)


def test_a_fresh_second_vcpu_waits_for_init() -> None:
    with new_vcpu(1) as (vcpu, host):
        assert save_cpu(vcpu, host, 0).mp_state == 1


def test_a_plain_guest_needs_one_subsection_as_on_a_real_machine(machine: tuple[Vcpu, HostState]) -> None:
    vcpu, host = machine
    wire, _ = over_the_wire(save_cpu(vcpu, host, 0))
    assert len(wire) == 1842
    assert wire[1817:].startswith(b"\x05\x0bcpu/tsc_khz")


HOSTS_OWN = {
    "xstate_bv",  # the recording KVM's image claims PKRU to be in use
    "mtrr_var",  # ones above the address bits, as many as the host lacks
    "tsc_khz",
    "msr_tsx_ctrl",  # Intel's; zero in all recordings
}


def assert_same_guest(again: CpuState, cpu: CpuState) -> None:
    """Every part of *cpu* that a host may not change is in *again*, and nothing else is in use."""
    for field in dataclasses.fields(CpuState):
        if field.name not in HOSTS_OWN and getattr(cpu, field.name) is not None:
            assert getattr(again, field.name) == getattr(cpu, field.name), field.name
    assert subsections(again) <= subsections(cpu)


def subsections(cpu: CpuState) -> set[str]:
    _, description = CPU.save(cpu)
    return {one["vmsd_name"] for one in description["subsections"]}


@pytest.mark.parametrize("name", [name for name in recorded.names() if "avx512" not in name])
def test_registers_of_a_real_machine_come_out_as_they_went_in(name: str) -> None:
    for section in recorded.load(name).devices:
        if section.vmstate is CPU:
            with new_vcpu(section.header.instance_id) as (vcpu, host):
                load(vcpu, host, section.record)
                assert_same_guest(save_cpu(vcpu, host, section.record.tsc), section.record)


def test_vector_registers_of_a_real_machine_come_out_as_they_went_in(machine: tuple[Vcpu, HostState]) -> None:
    vcpu, host = machine
    if not {5, 6, 7} <= set(host.xsave_components):
        pytest.skip("this host has no AVX-512")
    record = next(one.record for one in recorded.load("q100-avx512-pkru").devices if one.vmstate is CPU)
    pkru = 0x200 if 9 not in host.xsave_components else 0
    cpu = dataclasses.replace(record, xcr0=record.xcr0 & ~pkru, pkru=None if pkru else record.pkru)
    load(vcpu, host, cpu)
    again = save_cpu(vcpu, host, cpu.tsc)
    assert any(map(any, again.avx512.zmm_hi16)) if again.avx512 else False
    assert_same_guest(again, cpu)


def test_the_tsc_goes_on_from_what_was_loaded(machine: tuple[Vcpu, HostState]) -> None:
    vcpu, host = machine
    vcpu.set_msrs([(0x10, 1 << 48)])
    if vcpu.get_msrs([0x10])[0x10] < 1 << 48:
        pytest.skip("this host's KVM cannot set a guest's TSC")
    load(vcpu, host, CpuState(tsc=1 << 50))
    assert 1 << 50 <= read_tsc(vcpu) < (1 << 50) + (1 << 40)


def test_the_priority_of_the_apic_survives_the_registers(machine: tuple[Vcpu, HostState]) -> None:
    vcpu, host = machine
    load(vcpu, host, CpuState(), apic=ApicState(tpr=0x30))
    assert vcpu.get_sregs().cr8 == 3


REFUSED: list[tuple[Callable[[], CpuState], str]] = [
    (lambda: CpuState(cr0=0x80000000), "special registers .*CR0 0x80000000.*KVM_SET_SREGS"),
    (lambda: CpuState(cr4=1 << 60), "special registers .*CR4 0x1000000000000000"),
    (lambda: CpuState(mxcsr=0xFFFFFFFF, xstate_bv=3), "the FPU .*MXCSR 0xffffffff.*KVM_SET_XSAVE"),
    (lambda: CpuState(xcr0=1 << 62), "XCR0 to 0x4000000000000000.*KVM_SET_XCRS"),
    (lambda: CpuState(xcr0=0), "XCR0 to 0x0.*KVM_SET_XCRS"),
    (lambda: CpuState(lstar=0x8000_0000_0000_0000), "MSRs: .*MSR 0xc0000082 = 0x8000000000000000"),
    (lambda: CpuState(mp_state=99), "the run state to 99.*KVM_SET_MP_STATE"),
    (lambda: CpuState(dr=[0] * 6 + [1 << 40, 0x400]), "debug registers .*DR6 0x10000000000"),
    (lambda: CpuState(spec_ctrl=1 << 40), "MSR"),
    (lambda: CpuState(msr_architectural_pmu=ArchitecturalPmu(global_ctrl=1)), "msr_architectural_pmu is in use"),
    (lambda: CpuState(nested_state=NestedState(flags=1)), "nested_state is in use"),
    (lambda: CpuState(pkru=4), "XSAVE component 9 is in use"),
]


@pytest.mark.parametrize(("state", "message"), REFUSED)
def test_what_kvm_refuses_is_a_machine_error_that_names_it(
    machine: tuple[Vcpu, HostState], state: Callable[[], CpuState], message: str
) -> None:
    vcpu, host = machine
    if "component 9" in message and 9 in host.xsave_components:
        pytest.skip("this host has PKRU")
    with pytest.raises(MachineError, match=f"vCPU 0: .*{message}"):
        load(vcpu, host, state())


def test_empty_state_of_unknown_features_is_no_obstacle(machine: tuple[Vcpu, HostState]) -> None:
    vcpu, host = machine
    assert load(vcpu, host, CpuState(msr_architectural_pmu=ArchitecturalPmu(), nested_state=NestedState())) == []


def test_another_tsc_frequency_is_set_or_warned_of(machine: tuple[Vcpu, HostState]) -> None:
    vcpu, host = machine
    ours = vcpu.get_tsc_khz()
    warnings = load(vcpu, host, CpuState(tsc_khz=ours // 2))
    if vcpu.get_tsc_khz() != ours // 2:
        assert warnings == [f"vCPU 0: its TSC ran at {ours // 2} kHz and now runs at {ours} kHz: no TSC scaling here"]
    assert load(vcpu, host, CpuState(tsc_khz=vcpu.get_tsc_khz())) == []
