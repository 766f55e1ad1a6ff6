import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

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
from kvm.vcpu_thread import VcpuThread

from .machines import CODE, IMAGE, Program, TinyGuest, needs_kvm

pytestmark = needs_kvm

OUT_A = "b041 e610 f4"  # mov al,'A'; out 0x10,al; hlt
IN_TO_2000 = "e420 a20020 f4"  # in al,0x20; mov [0x2000],al; hlt
SPIN = "ebfe"  # jmp $
OUT_FOREVER = "e610 ebfc"  # out 0x10,al; jmp back

WAIT = 20.0  # seconds; a bound for a hang, no test waits that long when all is well


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


# -- the thread -----------------------------------------------------------------------------------------------


class Recorder:
    """A handler that keeps what it saw, and an event for each kind of thing a test waits for."""

    def __init__(self) -> None:
        self.exits: list[object] = []
        self.seen = threading.Event()
        self.errors: list[BaseException] = []
        self.failed = threading.Event()

    def handle_exit(self, exit: object) -> None:
        self.exits.append(exit)
        self.seen.set()

    def on_error(self, error: BaseException) -> None:
        self.errors.append(error)
        self.failed.set()


def pause(thread: VcpuThread) -> None:
    thread.request_pause()
    assert thread.wait_paused(WAIT)
    assert thread.paused


def test_thread_starts_parked_and_runs_when_resumed() -> None:
    recorder = Recorder()
    with Program(OUT_FOREVER) as program:
        thread = VcpuThread(program.vcpu, recorder.handle_exit)
        thread.start()
        assert thread.paused
        assert program.vcpu.get_regs().rip == CODE
        thread.resume()
        assert recorder.seen.wait(WAIT)
        thread.stop()


def test_guest_that_never_exits_is_parked_and_goes_on() -> None:
    with Program(SPIN) as program:
        thread = VcpuThread(program.vcpu, Recorder().handle_exit)
        thread.start()
        for _ in range(20):
            thread.resume()
            assert not thread.wait_paused(0.001)
            pause(thread)
            assert program.vcpu.get_regs().rip == CODE
        thread.stop()


def test_no_kick_is_lost_however_early_it_comes() -> None:
    with Program(SPIN) as program:
        thread = VcpuThread(program.vcpu, Recorder().handle_exit)
        thread.start()
        for _ in range(2000):
            thread.resume()
            pause(thread)
        thread.stop()


def stands_still(recorder: Recorder) -> bool:
    before = len(recorder.exits)
    time.sleep(0.02)
    return len(recorder.exits) == before


def test_a_vcpu_that_dozes_stays_out_of_the_guest_until_it_is_paused() -> None:
    recorder = Recorder()
    with Program(OUT_FOREVER) as program:
        thread = VcpuThread(program.vcpu, recorder.handle_exit)
        thread.start()
        thread.doze(1000)  # it is parked: nothing to doze
        for _ in range(3):
            thread.resume()
            recorder.seen.clear()
            assert recorder.seen.wait(WAIT)
            thread.doze(1000)
            while not stands_still(recorder):
                thread.doze(1000)  # one at a time
            pause(thread)
        thread.resume()
        for _ in range(200):
            thread.doze(0.0001)
        recorder.seen.clear()
        assert recorder.seen.wait(WAIT)
        thread.stop()


def test_a_doze_that_was_only_asked_for_is_forgotten_by_a_resume() -> None:
    recorder = Recorder()
    with Program(OUT_FOREVER) as program:
        thread = VcpuThread(program.vcpu, recorder.handle_exit)
        thread.start()
        for _ in range(100):
            thread.resume()
            thread.doze(1000)
            pause(thread)
        thread.resume()
        recorder.seen.clear()
        assert recorder.seen.wait(WAIT)
        thread.stop()


def test_resume_overtakes_a_pause_that_was_only_asked_for() -> None:
    recorder = Recorder()
    with Program(OUT_FOREVER) as program:
        thread = VcpuThread(program.vcpu, recorder.handle_exit)
        thread.start()
        for _ in range(500):
            thread.resume()
            thread.request_pause()
            thread.resume()
            recorder.seen.clear()
            assert recorder.seen.wait(WAIT)
        pause(thread)
        thread.stop()


def test_parked_vcpu_stands_still() -> None:
    recorder = Recorder()
    with Program(OUT_FOREVER) as program:
        thread = VcpuThread(program.vcpu, recorder.handle_exit)
        thread.start()
        thread.resume()
        assert recorder.seen.wait(WAIT)
        pause(thread)
        count, regs = len(recorder.exits), bytes(program.vcpu.get_regs())
        thread.request_pause()
        assert thread.wait_paused(WAIT)
        assert (len(recorder.exits), bytes(program.vcpu.get_regs())) == (count, regs)
        thread.stop()


def test_handler_may_ask_for_the_pause_and_its_answer_is_in_the_registers() -> None:
    with Program(IN_TO_2000) as program:

        def answer(exit: object) -> None:
            assert isinstance(exit, IoExit)
            exit.data[0] = 0x5A
            thread.request_pause()

        thread = VcpuThread(program.vcpu, answer)
        thread.start()
        thread.resume()
        assert thread.wait_paused(WAIT)
        regs = program.vcpu.get_regs()
        assert (regs.rax & 0xFF, regs.rip) == (0x5A, CODE + 2)
        assert program.ram.read(0x2000, 1) == b"\x00"
        thread.stop()


def test_string_input_survives_a_pause_at_every_exit() -> None:
    # cld; mov di,0x2000; mov cx,200; mov dx,0x20; rep insb; hlt
    with Program("fc bf0020 b9c800 ba2000 f36c f4") as program:
        given = bytearray()
        halted = threading.Event()

        def answer(exit: object) -> None:
            thread.request_pause()
            if isinstance(exit, HaltExit):
                halted.set()
                return
            assert isinstance(exit, IoExit)
            for at in range(exit.count):
                exit.data[at] = len(given) & 0xFF
                given.append(len(given) & 0xFF)

        thread = VcpuThread(program.vcpu, answer)
        thread.start()
        while not halted.is_set():
            thread.resume()
            assert thread.wait_paused(WAIT)
        assert len(given) == 200
        assert program.ram.read(0x2000, 200) == given
        thread.stop()


def test_exception_of_the_handler_parks_and_is_reported() -> None:
    recorder = Recorder()
    with Program(OUT_FOREVER) as program:

        def fail(exit: object) -> None:
            raise ValueError("a broken device")

        thread = VcpuThread(program.vcpu, fail, on_error=recorder.on_error)
        thread.start()
        for count in (1, 2):  # the vCPU may be resumed
            thread.resume()
            assert recorder.failed.wait(WAIT)
            assert thread.wait_paused(WAIT)
            assert [str(error) for error in recorder.errors] == ["a broken device"] * count
            recorder.failed.clear()
        thread.stop()


def test_refusal_of_kvm_run_parks_and_is_reported() -> None:
    recorder = Recorder()
    with Program(SPIN) as program:
        thread = VcpuThread(program.vcpu, recorder.handle_exit, on_error=recorder.on_error)
        thread.start()
        fd, program.vcpu.fd = program.vcpu.fd, -1
        thread.resume()
        assert recorder.failed.wait(WAIT)
        program.vcpu.fd = fd
        assert str(recorder.errors[0]) == "[Errno 9] KVM_RUN (vCPU 0): Bad file descriptor"
        assert thread.wait_paused(WAIT)
        thread.stop()


def test_thread_has_its_name_in_the_kernel_too() -> None:
    with Program(SPIN) as program:
        thread = VcpuThread(program.vcpu, Recorder().handle_exit, "CPU 12/KVM and much more")
        assert thread.thread_id is None
        thread.start()
        name = Path(f"/proc/self/task/{thread.thread_id}/comm").read_text()
        assert name == "CPU 12/KVM and \n"
        thread.stop()


@pytest.mark.parametrize("running", [False, True])
def test_stop_ends_the_thread(running: bool) -> None:
    with Program(SPIN) as program:
        thread = VcpuThread(program.vcpu, Recorder().handle_exit, "CPU 7/KVM")
        thread.start()
        if running:
            thread.resume()
        thread.stop()
        assert thread.join(0)
        assert not any(other.name == "CPU 7/KVM" for other in threading.enumerate())
        thread.stop()
        thread.resume()
        thread.request_pause()  # all without effect, and without a signal to a thread that is gone


def test_handler_may_end_its_own_thread() -> None:
    with Program(OUT_FOREVER) as program:
        exits: list[object] = []

        def end(exit: object) -> None:
            exits.append(exit)
            thread.stop()

        thread = VcpuThread(program.vcpu, end)
        thread.start()
        thread.resume()
        assert thread.join(WAIT)
        assert len(exits) == 1
        assert thread.paused


def test_thread_that_never_started_is_stopped_at_once() -> None:
    with Program(SPIN) as program:
        thread = VcpuThread(program.vcpu, Recorder().handle_exit)
        thread.stop()
        assert thread.join(0)


def test_thread_cannot_wait_for_itself() -> None:
    recorder = Recorder()
    with Program(OUT_FOREVER) as program:
        thread = VcpuThread(program.vcpu, lambda exit: thread.wait_paused(), on_error=recorder.on_error)
        thread.start()
        thread.resume()
        assert recorder.failed.wait(WAIT)
        assert "waits for itself" in str(recorder.errors[0])
        thread.stop()


def test_kicks_do_not_disturb_the_main_thread() -> None:
    reader, writer = socket.socketpair()
    reader.setblocking(False)
    writer.setblocking(False)
    before = signal.set_wakeup_fd(writer.fileno())
    try:
        with Program(SPIN) as program:
            thread = VcpuThread(program.vcpu, Recorder().handle_exit)
            thread.start()
            for _ in range(50):
                thread.resume()
                assert not thread.wait_paused(0.001)
                pause(thread)
            thread.stop()
        with pytest.raises(BlockingIOError):
            reader.recv(1)
    finally:
        signal.set_wakeup_fd(before)
        reader.close()
        writer.close()


def test_signals_for_the_process_are_left_to_other_threads() -> None:
    with Program(SPIN) as program:
        thread = VcpuThread(program.vcpu, Recorder().handle_exit)
        thread.start()
        status = Path(f"/proc/self/task/{thread.thread_id}/status").read_text()
        thread.stop()
    blocked = int(next(line for line in status.splitlines() if line.startswith("SigBlk")).split()[1], 16)

    def is_blocked(number: int) -> bool:
        return bool(blocked >> (number - 1) & 1)

    assert is_blocked(signal.SIGINT) and is_blocked(signal.SIGTERM) and is_blocked(signal.SIGUSR1)
    assert not is_blocked(signal.SIGRTMIN) and not is_blocked(signal.SIGSEGV)


# -- the tiny guest -------------------------------------------------------------------------------------------

needs_image = pytest.mark.skipif(not IMAGE.exists(), reason=f"{IMAGE.name} is missing")


class Output(threading.Event):
    """Set when every vCPU of the guest has printed *count* more letters: B is the first one's, C the second's."""

    def __init__(self, guest: TinyGuest) -> None:
        super().__init__()
        self.guest = guest
        self.wanted: list[int] = []

    def letters(self) -> list[int]:
        """How many each vCPU has printed."""
        return [self.guest.output.count(ord("B") + vcpu.index) for vcpu in self.guest.vcpus]

    def expect(self, count: int) -> None:
        self.wanted = [printed + count for printed in self.letters()]
        self.clear()

    def handle_exit(self, exit: object) -> None:
        self.guest.handle_exit(exit)
        if all(printed >= wanted for printed, wanted in zip(self.letters(), self.wanted, strict=True)):
            self.set()


@needs_image
@pytest.mark.parametrize("cpus", [1, 2])
def test_tiny_guest_is_stopped_200_times_at_full_speed_and_stays_intact(cpus: int) -> None:
    with TinyGuest(cpus) as guest:
        output = Output(guest)
        errors = Recorder()
        threads = [VcpuThread(vcpu, output.handle_exit, f"CPU {vcpu.index}/KVM", errors.on_error) for vcpu in guest.vcpus]
        output.expect(1)
        for thread in threads:
            thread.start()
            thread.resume()
        assert output.wait(WAIT), f"printed {bytes(guest.output)!r}"
        for _ in range(200):
            for thread in threads:
                thread.request_pause()
            for thread in threads:
                assert thread.wait_paused(WAIT)
            before = [guest.status(cpu) for cpu in range(cpus)]
            assert before == [guest.status(cpu) for cpu in range(cpus)]  # nothing moves
            for thread in threads:
                thread.resume()
            assert not threads[0].wait_paused(0.001)
        output.expect(2)
        assert output.wait(WAIT), f"printed {bytes(guest.output)!r}"
        for thread in threads:
            thread.stop()
        assert not errors.errors
        for cpu in range(cpus):
            passes, error = guest.status(cpu)
            assert (passes > before[cpu][0], error) == (True, 0)
        assert guest.vcpus[0].get_sregs().cs.dpl == 3
        assert guest.output[:1] == b"A"
        assert set(guest.output[1:]) <= set(b"BC")
