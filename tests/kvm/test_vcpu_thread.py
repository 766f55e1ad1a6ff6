"""kvm.vcpu_thread: kicks, pauses and resumes of a vCPU that runs, whatever it does."""

import signal
import socket
import threading
import time
from pathlib import Path

import pytest

from kvm.vcpu import (
    INTERRUPTED,
    HaltExit,
    IoExit,
)
from kvm.vcpu_thread import VcpuThread

from .machines import CODE, IMAGE, IN_TO_2000, OUT_FOREVER, SPIN, Program, TinyGuest, needs_kvm

pytestmark = needs_kvm

WAIT = 20.0  # seconds; a bound for a hang, no test waits that long when all is well


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


def test_kvm_has_made_its_first_run_before_anybody_waits_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    with Program(OUT_FOREVER) as program:
        runs: list[object] = []
        run_once = program.vcpu.run_once
        monkeypatch.setattr(program.vcpu, "run_once", lambda: runs.append(run_once()) or runs[-1])
        thread = VcpuThread(program.vcpu, recorder.handle_exit)
        thread.start()
        assert runs == [INTERRUPTED] and recorder.exits == []
        assert program.vcpu.get_regs().rip == CODE
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
