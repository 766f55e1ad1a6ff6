"""kvm.vcpu: exits as typed values, registers there and back, what KVM refuses."""

from collections.abc import Callable, Iterator

import pytest

from kvm import Kvm, KvmError, Vcpu, structs
from kvm.structs import (
    KVM_MP_STATE_RUNNABLE,
    KVM_MP_STATE_UNINITIALIZED,
    kvm_debugregs,
    kvm_lapic_state,
    kvm_regs,
    kvm_run,
    kvm_sregs,
    kvm_sregs2,
    kvm_vcpu_events,
    kvm_xcrs,
)
from kvm.vcpu import (
    FailEntryExit,
    HaltExit,
    InternalErrorExit,
    InterruptedExit,
    IoapicEoiExit,
    IoExit,
    MmioExit,
    ShutdownExit,
    SystemEventExit,
    UnknownExit,
)

from .machines import CODE, IN_TO_2000, OUT_A, Program, TinyGuest, needs_kvm

pytestmark = needs_kvm


# -- exits ----------------------------------------------------------------------------------------------------


def test_port_write_shows_its_bytes() -> None:
    with Program(OUT_A) as program:
        exit = program.vcpu.run_once()
        assert isinstance(exit, IoExit)
        assert (exit.port, exit.size, exit.count, exit.is_write) == (0x10, 1, 1, True)
        assert bytes(exit.data) == b"A"
        assert isinstance(program.vcpu.run_once(), HaltExit)


def test_guest_reads_what_the_handler_wrote() -> None:
    with Program(IN_TO_2000) as program:
        exit = program.vcpu.run_once()
        assert isinstance(exit, IoExit)
        assert (exit.port, exit.is_write) == (0x20, False)
        exit.data[0] = 0x5A
        assert isinstance(program.vcpu.run_once(), HaltExit)
        assert program.ram.read(0x2000, 1) == b"\x5a"


def test_string_output_comes_whole() -> None:
    # cld; mov si,0x2000; mov cx,3; mov dx,0x10; rep outsb; hlt
    with Program("fc be0020 b90300 ba1000 f36e f4") as program:
        program.ram.write(0x2000, b"xyz")
        seen = b""
        while isinstance(exit := program.vcpu.run_once(), IoExit):
            seen += bytes(exit.data)
        assert seen == b"xyz"
        assert isinstance(exit, HaltExit)


def test_access_outside_memory_is_an_mmio_exit() -> None:
    # mov word [0x9000],0x1234; mov al,[0x9004]; mov [0x2000],al; hlt
    with Program("c70600903412 a00490 a20020 f4") as program:
        exit = program.vcpu.run_once()
        assert isinstance(exit, MmioExit)
        assert (exit.address, exit.size, exit.is_write) == (0x9000, 2, True)
        assert bytes(exit.data) == b"\x34\x12"
        exit = program.vcpu.run_once()
        assert isinstance(exit, MmioExit)
        assert (exit.address, exit.size, exit.is_write) == (0x9004, 1, False)
        exit.data[:] = b"\x77"
        assert isinstance(program.vcpu.run_once(), HaltExit)
        assert program.ram.read(0x2000, 1) == b"\x77"


def test_triple_fault_is_a_shutdown() -> None:
    # mov ax,0x50; mov ds,ax in protected mode: no such descriptor, and no interrupt table to go to
    with Program("66b85000 8ed8 f4") as program:
        sregs = program.vcpu.get_sregs()
        sregs.cr0 |= 1
        sregs.cs.db, sregs.cs.g, sregs.cs.limit, sregs.cs.selector = 1, 1, 0xFFFFFFFF, 8
        sregs.idt.limit = 0
        program.vcpu.set_sregs(sregs)
        assert isinstance(program.vcpu.run_once(), ShutdownExit)


def fail_entry(run: kvm_run) -> None:
    run.fail_entry.hardware_entry_failure_reason = 0x80000021


def internal_error(run: kvm_run) -> None:
    run.internal.suberror, run.internal.ndata = 1, 2
    run.internal.data[0], run.internal.data[1] = 7, 8


def endless_internal_error(run: kvm_run) -> None:
    run.internal.suberror, run.internal.ndata = 3, 1000


def system_event(run: kvm_run) -> None:
    run.system_event.type = 2


def end_of_interrupt(run: kvm_run) -> None:
    run.eoi.vector = 0x41


def nothing(run: kvm_run) -> None:
    pass


@pytest.mark.parametrize(
    ("reason", "fill", "expected"),
    [
        (structs.KVM_EXIT_HLT, nothing, HaltExit()),
        (structs.KVM_EXIT_SHUTDOWN, nothing, ShutdownExit()),
        (structs.KVM_EXIT_INTR, nothing, InterruptedExit()),
        (structs.KVM_EXIT_FAIL_ENTRY, fail_entry, FailEntryExit(0x80000021)),
        (structs.KVM_EXIT_INTERNAL_ERROR, internal_error, InternalErrorExit(1, (7, 8))),
        (structs.KVM_EXIT_INTERNAL_ERROR, endless_internal_error, InternalErrorExit(3, (0,) * 16)),
        (structs.KVM_EXIT_SYSTEM_EVENT, system_event, SystemEventExit(2)),
        (structs.KVM_EXIT_IOAPIC_EOI, end_of_interrupt, IoapicEoiExit(0x41)),
        (structs.KVM_EXIT_DEBUG, nothing, UnknownExit(structs.KVM_EXIT_DEBUG)),
    ],
)
def test_exit_has_the_values_of_the_shared_page(
    monkeypatch: pytest.MonkeyPatch, reason: int, fill: Callable[[kvm_run], None], expected: object
) -> None:
    with Program() as program:
        monkeypatch.setattr("kvm.vcpu.raw_ioctl", lambda fd, request, argument: 0)  # "the guest has exited"
        program.vcpu.run.exit_reason = reason
        fill(program.vcpu.run)
        assert program.vcpu.run_once() == expected


def test_vcpu_that_waits_for_init_can_be_interrupted() -> None:
    with TinyGuest(cpus=2) as guest:
        guest.vcpus[1].run.immediate_exit = 1
        assert isinstance(guest.vcpus[1].run_once(), InterruptedExit)


def test_immediate_exit_completes_the_access_and_runs_nothing() -> None:
    with Program(IN_TO_2000) as program:
        exit = program.vcpu.run_once()
        assert isinstance(exit, IoExit)
        exit.data[0] = 0x5A
        program.vcpu.run.immediate_exit = 1
        assert isinstance(program.vcpu.run_once(), InterruptedExit)
        regs = program.vcpu.get_regs()
        assert (regs.rax & 0xFF, regs.rip) == (0x5A, CODE + 2)
        assert program.ram.read(0x2000, 1) == b"\x00"


def test_shared_page_outlives_the_vcpu_for_those_who_hold_a_view() -> None:
    with Program(OUT_A) as program:
        exit = program.vcpu.run_once()
        assert isinstance(exit, IoExit)
    assert bytes(exit.data) == b"A"


# -- state ----------------------------------------------------------------------------------------------------


@pytest.fixture
def vcpu() -> Iterator[Vcpu]:
    """A vCPU with an APIC and all the host's CPUID leaves."""
    with Kvm() as kvm, kvm.create_vm() as vm:
        vm.create_irqchip()
        made = vm.create_vcpu(0)
        made.set_cpuid(kvm.supported_cpuid())
        yield made


def test_registers_come_back(vcpu: Vcpu) -> None:
    regs = vcpu.get_regs()
    regs.rax, regs.r15, regs.rip = 0x1122334455667788, 0xFEDC, 0x8000
    vcpu.set_regs(regs)
    assert bytes(vcpu.get_regs()) == bytes(regs)


def test_special_registers_come_back(vcpu: Vcpu) -> None:
    sregs = vcpu.get_sregs()
    sregs.cr2, sregs.gdt.base, sregs.gdt.limit = 0xABC000, 0x2000, 0x27
    vcpu.set_sregs(sregs)
    assert bytes(vcpu.get_sregs()) == bytes(sregs)
    newer = vcpu.get_sregs2()
    assert (newer.cr2, newer.gdt.base) == (0xABC000, 0x2000)
    newer.cr2 = 0xDEF000
    vcpu.set_sregs2(newer)
    assert vcpu.get_sregs().cr2 == 0xDEF000


def test_debug_registers_come_back(vcpu: Vcpu) -> None:
    debugregs = vcpu.get_debugregs()
    debugregs.db[0] = 0x123456
    vcpu.set_debugregs(debugregs)
    assert vcpu.get_debugregs().db[0] == 0x123456


def test_xsave_image_comes_back(vcpu: Vcpu) -> None:
    image = vcpu.get_xsave()
    assert len(image) == vcpu.xsave_size >= 4096
    image[160:176] = bytes(range(16))  # XMM0
    image[512] |= 3  # x87 and SSE are in the image
    vcpu.set_xsave(image)
    assert vcpu.get_xsave()[160:176] == bytes(range(16))


def test_xsave_image_of_another_size_is_refused(vcpu: Vcpu) -> None:
    with pytest.raises(KvmError, match=r"KVM_SET_XSAVE \(vCPU 0: 100 bytes, expected \d+\)"):
        vcpu.set_xsave(bytes(100))


def test_xcr0_comes_back(vcpu: Vcpu) -> None:
    xcrs = vcpu.get_xcrs()
    assert (xcrs.nr_xcrs, xcrs.xcrs[0].xcr, xcrs.xcrs[0].value) == (1, 0, 1)
    xcrs.xcrs[0].value = 3
    vcpu.set_xcrs(xcrs)
    assert vcpu.get_xcrs().xcrs[0].value == 3


def test_msrs_come_back(vcpu: Vcpu) -> None:
    values = {0x174: 0x10, 0x175: 0xFFFF800000001000, 0xC0000082: 0xFFFF800000002000}
    vcpu.set_msrs(values.items())
    assert vcpu.get_msrs(values) == values


def test_unreadable_msrs_are_left_out(vcpu: Vcpu) -> None:
    vcpu.set_msrs([(0x174, 7), (0x175, 9)])
    assert vcpu.get_msrs([0xDEAD0001, 0x174, 0xDEAD0002, 0xDEAD0003, 0x175, 0xDEAD0004]) == {0x174: 7, 0x175: 9}


def test_refused_msr_is_named_with_its_value(vcpu: Vcpu) -> None:
    pairs = [(0x174, 1), (0xC0000082, 0x8000000000000000), (0x175, 2)]
    with pytest.raises(KvmError) as caught:
        vcpu.set_msrs(pairs)
    assert "KVM_SET_MSRS (vCPU 0, MSR 0xc0000082 = 0x8000000000000000)" in str(caught.value)


def test_more_msrs_than_one_request_takes(vcpu: Vcpu) -> None:
    vcpu.set_msrs([(0x174, value) for value in range(600)])
    assert vcpu.get_msrs([0x174] * 599 + [0x175]) == {0x174: 599, 0x175: 0}
    with pytest.raises(KvmError, match=r"MSR 0xdead0001 = 0x5"):
        vcpu.set_msrs([(0x174, 0)] * 400 + [(0xDEAD0001, 5)])


def test_apic_registers_come_back(vcpu: Vcpu) -> None:
    lapic = vcpu.get_lapic()
    lapic.regs[0x80] = 0x30  # task priority
    vcpu.set_lapic(lapic)
    assert vcpu.get_lapic().regs[0x80] == 0x30
    assert vcpu.get_sregs().cr8 == 3


def test_events_come_back(vcpu: Vcpu) -> None:
    events = vcpu.get_vcpu_events()
    events.nmi.masked, events.flags = 1, 0
    vcpu.set_vcpu_events(events)
    assert vcpu.get_vcpu_events().nmi.masked == 1


def test_nmi_is_pending_once_queued(vcpu: Vcpu) -> None:
    vcpu.nmi()
    assert vcpu.get_vcpu_events().nmi.pending == 1


def test_interrupt_is_queued_where_no_chip_is_in_the_kernel() -> None:
    with Program() as program:
        program.vcpu.interrupt(0x33)
        event = program.vcpu.get_vcpu_events().interrupt
        assert (event.injected, event.nr) == (1, 0x33)


def test_first_vcpu_is_runnable_and_others_wait_for_init(vcpu: Vcpu) -> None:
    assert vcpu.get_mp_state() == KVM_MP_STATE_RUNNABLE
    second = vcpu.vm.create_vcpu(1)
    assert second.get_mp_state() == KVM_MP_STATE_UNINITIALIZED
    second.set_mp_state(KVM_MP_STATE_RUNNABLE)
    assert second.get_mp_state() == KVM_MP_STATE_RUNNABLE


def test_cpuid_comes_back(vcpu: Vcpu) -> None:
    entries = vcpu.get_cpuid()
    vendor = next(entry for entry in entries if entry.function == 0)
    vendor.ebx, vendor.ecx, vendor.edx = 0x756E6547, 0x6C65746E, 0x49656E69
    second = vcpu.vm.create_vcpu(1)
    second.set_cpuid(entries)
    found = next(entry for entry in second.get_cpuid() if entry.function == 0)
    assert (found.ebx, found.ecx, found.edx) == (vendor.ebx, vendor.ecx, vendor.edx)


def test_tsc_frequency_may_be_set_to_what_it_is(vcpu: Vcpu) -> None:
    khz = vcpu.get_tsc_khz()
    assert khz > 100_000
    vcpu.set_tsc_khz(khz)
    assert vcpu.get_tsc_khz() == khz


def test_kvmclock_control_says_whether_the_guest_has_one(vcpu: Vcpu) -> None:
    assert vcpu.kvmclock_ctrl() is False


def test_machine_check_banks_are_set_up(vcpu: Vcpu) -> None:
    vcpu.setup_mce(0x100010A)
    assert vcpu.get_msrs([0x179])[0x179] == 0x100010A


@pytest.mark.parametrize(
    ("request_name", "use"),
    [
        ("KVM_RUN (vCPU 0)", Vcpu.run_once),
        ("KVM_GET_REGS (vCPU 0)", Vcpu.get_regs),
        ("KVM_SET_REGS (vCPU 0)", lambda vcpu: vcpu.set_regs(kvm_regs())),
        ("KVM_GET_SREGS (vCPU 0)", Vcpu.get_sregs),
        ("KVM_SET_SREGS (vCPU 0)", lambda vcpu: vcpu.set_sregs(kvm_sregs())),
        ("KVM_GET_SREGS2 (vCPU 0)", Vcpu.get_sregs2),
        ("KVM_SET_SREGS2 (vCPU 0)", lambda vcpu: vcpu.set_sregs2(kvm_sregs2())),
        ("KVM_GET_DEBUGREGS (vCPU 0)", Vcpu.get_debugregs),
        ("KVM_SET_DEBUGREGS (vCPU 0)", lambda vcpu: vcpu.set_debugregs(kvm_debugregs())),
        ("KVM_GET_XCRS (vCPU 0)", Vcpu.get_xcrs),
        ("KVM_SET_XCRS (vCPU 0)", lambda vcpu: vcpu.set_xcrs(kvm_xcrs())),
        ("KVM_SET_XSAVE (vCPU 0)", lambda vcpu: vcpu.set_xsave(bytes(vcpu.xsave_size))),
        ("KVM_GET_MSRS (vCPU 0)", lambda vcpu: vcpu.get_msrs([0x10])),
        ("KVM_SET_MSRS (vCPU 0)", lambda vcpu: vcpu.set_msrs([(0x174, 0)])),
        ("KVM_GET_LAPIC (vCPU 0)", Vcpu.get_lapic),
        ("KVM_SET_LAPIC (vCPU 0)", lambda vcpu: vcpu.set_lapic(kvm_lapic_state())),
        ("KVM_GET_VCPU_EVENTS (vCPU 0)", Vcpu.get_vcpu_events),
        ("KVM_SET_VCPU_EVENTS (vCPU 0)", lambda vcpu: vcpu.set_vcpu_events(kvm_vcpu_events())),
        ("KVM_GET_MP_STATE (vCPU 0)", Vcpu.get_mp_state),
        ("KVM_SET_MP_STATE (vCPU 0)", lambda vcpu: vcpu.set_mp_state(0)),
        ("KVM_INTERRUPT (vCPU 0)", lambda vcpu: vcpu.interrupt(0x20)),
        ("KVM_NMI (vCPU 0)", Vcpu.nmi),
        ("KVM_X86_SETUP_MCE (vCPU 0)", lambda vcpu: vcpu.setup_mce(1)),
        ("KVM_GET_CPUID2 (vCPU 0)", Vcpu.get_cpuid),
        ("KVM_SET_CPUID2 (vCPU 0)", lambda vcpu: vcpu.set_cpuid([])),
        ("KVM_GET_TSC_KHZ (vCPU 0)", Vcpu.get_tsc_khz),
        ("KVM_SET_TSC_KHZ (vCPU 0, 1 kHz)", lambda vcpu: vcpu.set_tsc_khz(1)),
        ("KVM_KVMCLOCK_CTRL (vCPU 0)", Vcpu.kvmclock_ctrl),
    ],
)
def test_dead_descriptor_names_request_and_vcpu(vcpu: Vcpu, request_name: str, use: Callable[[Vcpu], object]) -> None:
    assert vcpu.xsave_size  # of the VM, asked for while that lives
    vcpu.close()
    with pytest.raises(KvmError) as caught:
        use(vcpu)
    assert str(caught.value) == f"[Errno 9] {request_name}: Bad file descriptor"


def test_dead_descriptor_names_the_xsave_request_of_this_host(vcpu: Vcpu) -> None:
    expected = "KVM_GET_XSAVE2" if vcpu.xsave_size > 4096 else "KVM_GET_XSAVE"
    vcpu.close()
    with pytest.raises(KvmError) as caught:
        vcpu.get_xsave()
    assert str(caught.value) == f"[Errno 9] {expected} (vCPU 0): Bad file descriptor"
