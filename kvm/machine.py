"""The machine: RAM, a board of devices, vCPUs, and the run state they share.  Fulfils qemumig.machine.Machine.

                      start                         stop(state)
    prelaunch ──────────▶ running ─────────────────────────▶ paused, finish-migrate, …
    inmigrate ──────────▶    │                                   │ set_runstate
        │                    │ a vCPU cannot go on               ▼
        └─▶ paused, …        └──▶ internal-error             postmigrate, …   ─── start ──▶ running

    running ── the guest asks for it ──▶ suspended ── wake ──▶ running, from the reset vector     a PC only
                                             ▲ └ stop ▶ paused ┐
                                             └───── start ─────┘

    vCPU thread ─ exit ─▶ port or memory bus ─▶ device
                └ what stops everybody (reset, failure) ─▶ `vm/control`, for a vCPU cannot wait for itself

A guest that resets itself (by a triple fault, or the event device's register) is reset by `vm/control`; when a stop comes
first, the stop does it, so that a half-reset guest is never saved.  A guest that suspends itself is stopped likewise.

Threads   `stop`, `start`, `reset`, save and load: any thread but a vCPU's, one at a time (the transition lock).  Handling
          an exit never takes that lock, so whoever holds it may wait for vCPUs.  `vm/control` is started and joined here,
          vCPU threads by their processors.
Holds     (1) the run state is RUNNING exactly while vCPUs may run
          (2) the run state changes in `_enter`, along NEXT, and nowhere else
          (3) clocks are noted after the last vCPU has stopped and set before the first one runs
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from qemumig.errors import MachineError, StateError
from qemumig.machine import DeviceSection
from qemumig.qapi import RunState
from qemumig.ram.block import RAMBlock
from qemumig.threads import named_thread

from . import trace
from .boot import load_firmware
from .config import MachineConfig
from .cpuid import CpuModel, host_brand
from .devices import pc
from .devices.blobs import LogWithBlobs
from .devices.board import Board, BoardEvents
from .devices.client_time import ClientTime
from .devices.irqchip import InputPins
from .devices.memory import GuestMemory
from .devices.processor import Processor
from .devices.virtio_blk import DiskEvents
from .diagnostics import Diagnostics
from .dirty import MachineDirtyLog
from .dirty_log import DirtyLog
from .errors import KvmError
from .exits import access_memory, access_ports, describe
from .first_touched import first_touched
from .memory import HostMemory
from .paging import ControlRegisters
from .physical import PhysicalView
from .runstates import IN_TRANSIT, require_next, require_rename
from .state.host import HostState
from .structs import KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN
from .system import Kvm
from .throttle import Throttle
from .vcpu import Exit, IoExit, MmioExit, ShutdownExit, SystemEventExit

IDENTITY_MAP_ADDRESS = 0xFEFFC000
TSS_ADDRESS = 0xFEFFD000
PAGE_SIZE = 4096

Emit = Callable[[str, dict | None], None]


class MicroVM:
    """A microvm, or a minimal PC, of *config*; *emit* is told of events by their QMP names, from any thread.

    Made stopped: `prelaunch`, or `inmigrate` with empty memory when the configuration says incoming.  Raises KvmError,
    FirmwareError, CpuModelError, MachineError; nothing is left behind then.

    on_shutdown     called once the guest has ended, in `vm/control`; None: the machine stays, in run state `shutdown`
    reboots         False: a guest that resets itself is shut down instead
    """

    def __init__(self, config: MachineConfig, emit: Emit, warn: Callable[[str], None] | None = None) -> None:
        # Set before any thread starts.
        self.machine_type = config.machine_type.wire_name
        self.uuid = config.uuid
        self.on_shutdown: Callable[[bool, str], None] | None = None
        self.reboots = True
        self.migration_blockers: list[str] = []  # complete once it is made
        self._config = config
        self._emit = emit
        self._warn = warn or Diagnostics().say
        own = config.machine_type.is_pc and not config.bios
        self._firmware = pc.firmware() if own else load_firmware(config.bios)
        self._closers = ExitStack()
        # Under the transition lock; the run state is read without it.
        self._transition = threading.RLock()
        self._runstate = RunState.INMIGRATE if config.incoming else RunState.PRELAUNCH
        # Set by vCPU threads, cleared under the transition lock.
        self._guest_wants_reset = False
        self._guest_wants_suspend = False
        self._failure: str | None = None
        # To `vm/control`.
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._control = named_thread("vm/control", self._do_work)
        with ExitStack() as undo:
            undo.callback(self._closers.close)
            self._build()
            undo.pop_all()

    # -- construction

    def _build(self) -> None:
        config, closers = self._config, self._closers
        kvm = closers.enter_context(Kvm())
        supported = kvm.supported_cpuid()
        model = CpuModel(config.cpu_model, config.cpu_features, supported, host_brand=host_brand())
        for warning in model.warnings:
            self._warn(f"warning: {warning}")
        if model.has("invtsc"):
            self.migration_blockers.append("State blocked by non-migratable CPU device (invtsc flag)")
        memory_closer = closers.enter_context(ExitStack())  # guest memory outlives the VM that maps it
        self._vm = closers.enter_context(kvm.create_vm())
        self._vm.set_identity_map_address(IDENTITY_MAP_ADDRESS)
        self._vm.set_tss_address(TSS_ADDRESS)
        log = DirtyLog(self._vm, manual=config.manual_dirty_log)
        host = HostState.of(self._vm, model, supported)

        ram = config.ram_backend or HostMemory.anonymous(-(-config.ram_size // PAGE_SIZE) * PAGE_SIZE)
        memory_closer.callback(ram.close)
        low = config.machine_type.low_memory(ram.size)
        self._memory = GuestMemory(self._vm, ram, config.ram_idstr, len(self._firmware), low)
        memory_closer.callback(self._memory.close)
        events = BoardEvents(
            disks=DiskEvents(self._emit, self._stop_for_disk),
            power_off=lambda: self.request_shutdown(True, "guest-shutdown"),
            suspend=self._want_suspend,
            reset=self._want_guest_reset,
            failed=lambda error: self._fail("a timer", f"{type(error).__name__}: {error}"),
        )
        self._board = Board(self._vm, config, self._memory, events, self._warn)
        self.physical = PhysicalView(self._memory, self._board.mmio, self._board.ports)
        closers.callback(self._board.close)
        self.migration_blockers += self._board.migration_blockers
        self._log_ram(log)
        if not config.incoming:
            self._board.claim_disks()
        self._processors = [self._make_processor(index, model, host) for index in range(config.cpus)]
        if not config.incoming:
            self._reset_everything()
        for processor in self._processors:
            processor.thread.start()
            closers.callback(processor.thread.stop)
        self._throttle = Throttle(lambda: [processor.thread for processor in self._processors])
        closers.callback(self._throttle.set, 0)
        self._control.start()
        closers.callback(self._end_control)

    def _log_ram(self, log: DirtyLog) -> None:
        """Guest memory and the board's blobs are RAM, and every write of ours to them is seen."""
        self.ram_blocks = self._memory.blocks
        self.dirty_log: MachineDirtyLog | LogWithBlobs = MachineDirtyLog(
            log, self._memory.logged_slots, lambda: self.running
        )
        blobs = self._board.blobs
        if blobs is not None:
            self.ram_blocks = sorted((*self._memory.blocks, *blobs.blocks), key=lambda block: -block.max_length)
            self.dirty_log = LogWithBlobs(self.dirty_log, blobs)
            blobs.report_writes_to(self.dirty_log.mark)
        self._memory.report_writes_to(self.dirty_log.mark)

    def _make_processor(self, index: int, model: CpuModel, host: HostState) -> Processor:
        return Processor(
            self._vm,
            index,
            self._config.cpus,
            model,
            host,
            handle_exit=self._handle_exit,
            on_error=self._on_thread_error,
            warn=self._warn,
        )

    def close(self) -> None:
        """End all threads and give everything back; twice is allowed."""
        self._end_control()  # before the lock: what it does takes the lock
        with self._transition:
            self._closers.close()

    # -- run state

    @property
    def runstate(self) -> RunState:
        """What the machine is doing now."""
        return self._runstate

    @property
    def running(self) -> bool:
        """True while vCPUs may run."""
        return self._runstate is RunState.RUNNING

    def stop(self, state: RunState) -> RunState:
        """Stop every vCPU and enter *state*, from the one returned; a machine that is stopped only changes its state.

        Event STOP, once for each time the machine ran.  StateError when the state cannot follow.
        """
        with self._transition:
            before = self._runstate
            require_next(before, state)
            if not self.running or state is RunState.RUNNING:
                self._enter(state)
                if before is RunState.SUSPENDED and state is not before:
                    self._emit("STOP", None)
                return before
            self._hold()
            self._enter(state)
            self._emit("STOP", None)
            return before

    def _hold(self) -> None:
        """Let nothing run any more, and carry out what the guest had asked for."""
        self._pause()
        self._carry_out_guest_reset()
        with _kvm_refusals("stopping the machine"):
            self._board.stop()
        for processor in self._processors:
            processor.note_stop()
        if self._guest_wants_suspend:
            self._guest_wants_suspend = False
            self._board.asleep = True

    def start(self) -> None:
        """Let the vCPUs run; event RESUME.  Nothing happens when they do already."""
        with self._transition:
            if self.running:
                return
            require_next(self._runstate, RunState.RUNNING)
            if self._failure is not None:
                raise MachineError(f"the machine has failed and has to be reset first: {self._failure}")
            self._board.claim_disks()
            if self._board.asleep:
                if self._runstate is not RunState.SUSPENDED:
                    self._enter(RunState.SUSPENDED)
                    self._emit("RESUME", None)
                return
            self._let_go()
            self._emit("RESUME", None)
            self._resume()

    def _let_go(self) -> None:
        """Everything is about to run."""
        with _kvm_refusals("starting the machine"):
            self._board.start()
        for processor in self._processors:
            processor.note_start()
        self._enter(RunState.RUNNING)

    def wake(self) -> None:
        """Wake a guest that has suspended itself, at the reset vector; event WAKEUP.  StateError for any other."""
        with self._transition:
            if self._runstate is not RunState.SUSPENDED:
                text = "Unable to wake up: guest is not in suspended state"
                raise StateError(text, state=self._runstate, required=RunState.SUSPENDED)
            with _kvm_refusals("waking the machine"):
                self._board.wake(self._firmware)
            self._reset_processors()
            self._let_go()
            self._emit("WAKEUP", None)
            self._resume()

    def set_runstate(self, state: RunState) -> None:
        """Rename the state of a machine that is stopped."""
        with self._transition:
            require_rename(self._runstate, state)
            self._enter(state)

    def reset(self) -> None:
        """Begin again from power-on, RAM untouched; a running machine runs on, a stopped one is `prelaunch` then."""
        with self._transition:
            if self.running:
                self._pause()
                self._reset_everything()
                self._resume()
            else:
                self._reset_everything()
                if self._runstate not in IN_TRANSIT:
                    self._enter(RunState.PRELAUNCH)

    def request_shutdown(self, guest: bool, reason: str) -> None:
        """The machine is to end, by its *guest*'s wish or another's; *reason* as QMP spells it.  Any thread."""
        self._work.put(lambda: self._shut_down(guest, reason))

    def press_power_button(self) -> bool:
        """Ask the guest to end, as somebody at the machine would; False when there is no ACPI to ask it by.  Any thread."""
        return self._board.press_power_button()

    def control_registers(self, cpu: int) -> ControlRegisters:
        """What translates virtual addresses of vCPU *cpu*; a running machine stands still for the moment."""
        with self._transition:
            if self.running:
                self._pause()
            try:
                sregs = self._processors[cpu].vcpu.get_sregs()
            finally:
                if self.running:
                    self._resume()
        return ControlRegisters(sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer)

    @property
    def client_time(self) -> ClientTime | None:
        """Virtual time, where a test harness moves it; None where the guest's running does."""
        return self._board.client_time

    @property
    def pins(self) -> InputPins:
        """The input pins of the first I/O APIC."""
        return self._board.pins

    def _enter(self, state: RunState) -> None:
        """The one place where the run state changes."""
        require_next(self._runstate, state)
        if state is RunState.FINISH_MIGRATE:
            self._board.release_disks()
        trace.runstate_set(self._runstate.value, state.value)
        self._runstate = state

    # -- vCPUs, all at once; under the transition lock

    def _pause(self) -> None:
        """Kick all first, then wait: they stop together."""
        for processor in self._processors:
            processor.thread.request_pause()
        for processor in self._processors:
            processor.thread.wait_paused()

    def _resume(self) -> None:
        if not self._config.runs_guest:
            return
        for processor in self._processors:
            processor.thread.resume()

    def throttle_vcpus(self, percentage: int) -> None:
        """Take that share of their time from all vCPUs, until told otherwise; 0: none of it."""
        self._throttle.set(percentage)

    def _reset_everything(self) -> None:
        self._guest_wants_reset = self._guest_wants_suspend = False
        self._failure = None
        with _kvm_refusals("resetting the machine"):
            self._board.reset(self._firmware)
        self._reset_processors()

    def _reset_processors(self) -> None:
        for processor in self._processors:
            processor.reset(self._config.entry_points.get(processor.index))

    def _carry_out_guest_reset(self) -> None:
        """Reset if the guest wanted it; no vCPU runs."""
        if self._guest_wants_reset:
            self._reset_everything()
            self._emit("RESET", {"guest": True, "reason": "guest-reset"})

    def vcpu_thread_ids(self) -> list[int]:
        """The kernel's numbers of the vCPU threads."""
        return [processor.thread.thread_id or 0 for processor in self._processors]

    # -- exits; in the vCPU's thread

    def _handle_exit(self, processor: Processor, exit: Exit) -> None:
        kind = type(exit)
        if kind is IoExit:
            access_ports(self._board.ports, exit)  # type: ignore[arg-type]
        elif kind is MmioExit:
            access_memory(self._board.mmio, exit)  # type: ignore[arg-type]
        else:
            self._handle_rare_exit(processor, exit)

    def _handle_rare_exit(self, processor: Processor, exit: Exit) -> None:
        """Exits after which this vCPU cannot simply go on: it parks itself."""
        processor.thread.request_pause()
        if isinstance(exit, ShutdownExit) or (isinstance(exit, SystemEventExit) and exit.type == KVM_SYSTEM_EVENT_RESET):
            self._want_guest_reset()
        elif isinstance(exit, SystemEventExit) and exit.type == KVM_SYSTEM_EVENT_SHUTDOWN:
            self.request_shutdown(True, "guest-shutdown")
        else:
            self._fail(f"vCPU {processor.index}", f"{describe(exit)} at RIP {processor.vcpu.get_regs().rip:#x}")

    def _on_thread_error(self, processor: Processor, error: BaseException) -> None:
        self._fail(f"vCPU {processor.index}", f"{type(error).__name__}: {error}")

    def _want_guest_reset(self) -> None:
        self._guest_wants_reset = True
        self._work.put(self._reset_for_guest)

    def _want_suspend(self) -> None:
        """A vCPU is in the middle of it: none of them shall get far."""
        self._guest_wants_suspend = True
        for processor in self._processors:
            processor.thread.request_pause()
        self._work.put(self._suspend_for_guest)

    def _fail(self, who: str, what: str) -> None:
        self._failure = f"{who}: {what}"
        self._work.put(self._stop_after_failure)

    # -- `vm/control`

    def _do_work(self) -> None:
        while (work := self._work.get()) is not None:
            try:
                work()
            except Exception as error:
                self._warn(f"the machine could not be stopped or reset: {error}")

    def _end_control(self) -> None:
        if self._control.is_alive():
            self._work.put(None)
            self._control.join()

    def _reset_for_guest(self) -> None:
        with self._transition:
            if not (self._guest_wants_reset and self.running):
                return  # a stop, or a reset from outside, was first
            if not self.reboots:
                self._guest_wants_reset = False
                self._shut_down(True, "guest-reset")
                return
            self._pause()
            self._carry_out_guest_reset()
            self._resume()

    def _suspend_for_guest(self) -> None:
        with self._transition:
            if not (self._guest_wants_suspend and self.running):
                return  # a stop, or a reset, was first
            self._hold()
            self._enter(RunState.SUSPENDED)
            self._emit("SUSPEND", None)

    def _stop_after_failure(self) -> None:
        with self._transition:
            if self._failure is None:
                return  # a reset was first
            self._warn(self._failure)
            if self.running:
                self.stop(RunState.INTERNAL_ERROR)

    def _stop_for_disk(self) -> None:
        """A disk cannot go on; called in its thread, which the stop waits for."""
        self._work.put(self._stop_after_disk_error)

    def _stop_after_disk_error(self) -> None:
        with self._transition:
            if self.running:
                self.stop(RunState.IO_ERROR)

    def _shut_down(self, guest: bool, reason: str) -> None:
        self._emit("SHUTDOWN", {"guest": guest, "reason": reason})
        self.stop(RunState.SHUTDOWN)
        if self.on_shutdown is not None:
            self.on_shutdown(guest, reason)

    # -- migration

    def sections(self) -> Sequence[DeviceSection]:
        """Every device section this machine can send or take, in QEMU's order (machine.md §4)."""
        board = self._board
        sections = [one.section for one in board.first_sections]
        for processor in self._processors:
            sections += [processor.common_section, processor.cpu_section]
            if processor.index == 0:
                sections += [one.section for one in board.sections_after_first_cpu]
            sections.append(processor.apic_section)
        return [*sections, *(one.section for one in board.last_sections)]

    def save_device_state(self) -> Sequence[tuple[DeviceSection, Any]]:
        """The records of all sections, in that order; StateError while the machine runs."""
        with self._transition:
            self._require_stopped("saved")
            if self._failure is not None:
                raise MachineError(f"the machine has failed and cannot be saved: {self._failure}")
            board = self._board
            with _kvm_refusals("saving device state"):
                saved = [(one.section, one.save()) for one in board.first_sections]
                for processor in self._processors:
                    common, cpu, apic = processor.save(processor.index == 0 and board.pic_asks)
                    saved += [(processor.common_section, common), (processor.cpu_section, cpu)]
                    if processor.index == 0:
                        saved += [(one.section, one.save()) for one in board.sections_after_first_cpu]
                    saved.append((processor.apic_section, apic))
                saved += [(one.section, one.save()) for one in board.last_sections]
            return saved

    def first_touched(self) -> Sequence[tuple[RAMBlock, int]]:
        """Where in RAM the vCPUs go on, as (block, offset); StateError while they run."""
        with self._transition, _kvm_refusals("looking where the vCPUs are"):
            self._require_stopped("looked at")
            read = self._memory.read_or_zeroes
            pages = dict.fromkeys(page for one in self._processors for page in first_touched(one.vcpu, read))
            return self._memory.places(pages)

    def rehearse_load(self) -> None:
        """Set the processors to what they are out of reset, as a load sets them; StateError while the machine runs."""
        with self._transition, _kvm_refusals("rehearsing the load of device state"):
            self._require_stopped("loaded")
            self._reset_processors()

    def load_device_state(self, loaded: Sequence[tuple[DeviceSection, Any]]) -> None:
        """Put *loaded* into effect: APICs first, then devices, then the vCPUs' registers.

        The machine is stopped; when KVM refuses something (MachineError), it is of no further use but to be reset.
        """
        with self._transition:
            self._require_stopped("loaded")
            loads = [(*self._loader(section), section, record) for section, record in loaded]
            for _, load, section, record in sorted(loads, key=lambda one: one[0]):  # stable: of two alike the last one wins
                with _refusals_of(section):
                    load(record)
            self._memory.not_fresh()
            if self._board.blobs is not None:
                self._board.blobs.not_fresh()

    def discard_ram(self) -> None:
        """Forget all guest memory that is ours alone: it reads as zeroes again."""
        with self._transition, _kvm_refusals("discarding RAM"):
            self._require_stopped("emptied")
            self._memory.discard()
            if self._board.blobs is not None:
                self._board.blobs.discard()

    def read_physical(self, address: int, size: int) -> bytes:
        """*size* bytes at guest-physical *address*; where there is no RAM they are zero.  Any thread."""
        return self._memory.read_or_zeroes(address, size)

    def _require_stopped(self, what: str) -> None:
        if self.running:
            raise StateError(f"the machine is running, it must be stopped to be {what}", state=self._runstate)

    def _loader(self, section: DeviceSection) -> tuple[int, Callable[[Any], None]]:
        """When a section is loaded, and by whom."""
        wanted = section.idstr, section.instance_id
        board = self._board
        for one in (*board.first_sections, *board.sections_after_first_cpu, *board.last_sections):
            if wanted == (one.section.idstr, one.section.instance_id):
                return 1, one.load
        for processor in self._processors:
            if wanted == (processor.apic_section.idstr, processor.index):
                return 0, processor.load_apic
            if wanted == (processor.common_section.idstr, processor.index):
                return 1, processor.load_common
            if wanted == (processor.cpu_section.idstr, processor.index):
                return 2, processor.load_cpu
        raise MachineError(f"this machine has no section {section.idstr!r} instance {section.instance_id}")


@contextmanager
def _refusals_of(section: DeviceSection) -> Iterator[None]:
    """Let what KVM or a device refuses inside say whose state it was."""
    try:
        yield
    except (KvmError, MachineError) as error:
        raise MachineError(str(error), section=section.idstr, instance_id=section.instance_id) from error


@contextmanager
def _kvm_refusals(doing: str) -> Iterator[None]:
    """Turn what KVM refuses inside into a MachineError."""
    try:
        yield
    except KvmError as error:
        raise MachineError(f"{doing}: {error}") from error
