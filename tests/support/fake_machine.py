"""A machine without KVM: what `qemumig/machine.py` asks for, from anonymous memory and plain Python.

    machine = FakeMachine(ram_size=8 << 20)                     RAM `microvm.ram` and `pc.bios`, devices of a microvm
    machine.write(machine.ram, 0x5000, b"...")                  a guest's store, seen by the dirty log
    guest = FakeGuest(machine); guest.step(100)                 a guest that checks itself, scripted …
    machine = FakeMachine(..., guest=True); machine.start()     … or running in a thread while the machine runs

The dirty log keeps two bits per page, as KVM's does in effect:

    store on a protected page      dirty := 1, protected := 0
    store on an unprotected page   nothing: the page is known to be dirty
    fetch                          reports dirty pages; without manual_clear also dirty := 0, protected := 1
    clear (manual_clear)           for pages that the last fetch reported: dirty := 0, protected := 1

So who reads a page before clearing it loses the writes in between, here as there.  A store and its mark are one
step under the log's lock, as the processor's are.

The guest keeps all its state in guest memory and therefore goes on wherever that memory arrives.
"""

from __future__ import annotations

import copy
import ctypes
import hashlib
import mmap
import struct
import threading
from array import array
from collections.abc import Sequence
from typing import Any

from qemumig.errors import MachineError
from qemumig.machine import DeviceSection, DirtyLog
from qemumig.qapi import RunState
from qemumig.ram.block import RAMBlock
from qemumig.savevm.devices.apic import APIC
from qemumig.savevm.devices.cpu import CPU
from qemumig.savevm.devices.cpu_common import CPU_COMMON
from qemumig.savevm.devices.fw_cfg import FW_CFG
from qemumig.savevm.devices.ioapic import IOAPIC
from qemumig.savevm.devices.kvm_tpr_opt import KVM_TPR_OPT
from qemumig.savevm.devices.kvmclock import KVMCLOCK
from qemumig.savevm.devices.serial import SERIAL
from qemumig.savevm.devices.timer import TIMER

PAGE = 4096
WORD_PAGES = 64


class FakeDirtyLog:
    """The log of all blocks; `lock` is held around a store and its mark."""

    def __init__(self, blocks: Sequence[RAMBlock], manual_clear: bool) -> None:
        self.manual_clear = manual_clear
        self.lock = threading.Lock()
        self.is_logging = False
        self.fetches = 0
        self.clears = 0
        self._dirty = {block.idstr: bytearray(block.pages) for block in blocks}
        self._protected = {block.idstr: bytearray(block.pages) for block in blocks}
        self._reported = {block.idstr: bytearray(block.pages) for block in blocks}

    def start(self) -> None:
        with self.lock:
            if self.is_logging:
                raise MachineError("the dirty log was started twice without a stop between")
            self.is_logging = True
            for idstr, protected in self._protected.items():
                protected[:] = b"\1" * len(protected)
                self._dirty[idstr] = bytearray(len(protected))
                self._reported[idstr] = bytearray(len(protected))

    def stop(self) -> None:
        with self.lock:
            self.is_logging = False
            for protected in self._protected.values():
                protected[:] = bytes(len(protected))

    def mark(self, block: RAMBlock, offset: int, length: int) -> None:
        """What the processor does before a store of *length* bytes; the caller holds the lock."""
        if not self.is_logging:
            return
        dirty, protected = self._dirty[block.idstr], self._protected[block.idstr]
        for page in range(offset // PAGE, (offset + length - 1) // PAGE + 1):
            if protected[page]:
                dirty[page], protected[page] = 1, 0

    def fetch(self, block: RAMBlock, words: memoryview) -> None:
        needed = -(-block.pages // WORD_PAGES)
        if words.format != "Q" or words.readonly or len(words) < needed:
            raise ValueError(f"block {block.idstr!r} needs {needed} writable uint64 words, got {words!r}")
        with self.lock:
            self._require_logging("fetch")
            self.fetches += 1
            dirty = self._dirty[block.idstr]
            page = dirty.find(1)
            while page >= 0:
                words[page // WORD_PAGES] |= 1 << page % WORD_PAGES
                page = dirty.find(1, page + 1)
            self._reported[block.idstr][:] = dirty
            if not self.manual_clear:
                self._clear_reported(block, 0, block.pages)

    def clear(self, block: RAMBlock, first_page: int, page_count: int) -> None:
        end = first_page + page_count
        ends_well = end == block.pages or page_count % WORD_PAGES == 0
        if first_page % WORD_PAGES or not ends_well or not 0 <= first_page <= end <= block.pages:
            raise ValueError(f"block {block.idstr!r}: [{first_page}, {end}) is no range of whole words in it")
        with self.lock:
            self._require_logging("clear")
            self.clears += 1
            if self.manual_clear:
                self._clear_reported(block, first_page, end)

    def _clear_reported(self, block: RAMBlock, first: int, end: int) -> None:
        reported = self._reported[block.idstr]
        page = reported.find(1, first, end)
        while page >= 0:
            self._dirty[block.idstr][page], self._protected[block.idstr][page], reported[page] = 0, 1, 0
            page = reported.find(1, page + 1, end)

    def _require_logging(self, what: str) -> None:
        if not self.is_logging:
            raise MachineError(f"{what} of a dirty log that was not started")


class FakeMachine:
    """Fulfils `qemumig.machine.Machine`.  *guest* gives it one that runs in a thread while the machine runs."""

    machine_type = "microvm"

    def __init__(
        self,
        ram_size: int = 8 << 20,
        *,
        cpus: int = 1,
        manual_clear: bool = True,
        incoming: bool = False,
        guest: bool = False,
        uuid: bytes | None = None,
        shared_ram: mmap.mmap | None = None,
        named: bool = True,
    ) -> None:
        """*shared_ram* is mapped shared and serves as RAM: of a file if it is *named*, else nobody else can have it."""
        self.uuid = uuid
        self._shared = shared_ram
        self._memory = {"microvm.ram": shared_ram or _private(ram_size), "pc.bios": _private(64 << 10)}
        self.ram_blocks: Sequence[RAMBlock] = [
            RAMBlock(
                name,
                _address(memory),
                len(memory),
                guest_address={"microvm.ram": 0, "pc.bios": 0xFFFF0000}[name],
                shared=memory is shared_ram,
                named=memory is shared_ram and named,
                fresh=incoming and memory is not shared_ram,
                owner=memory,
            )
            for name, memory in self._memory.items()
        ]
        self.ram = self.ram_blocks[0]
        self.log = FakeDirtyLog(self.ram_blocks, manual_clear)
        self.dirty_log: DirtyLog = self.log
        self.runstate = RunState.INMIGRATE if incoming else RunState.PRELAUNCH
        self.history = [self.runstate]  # every run state it ever had
        self._sections = _sections(cpus)
        self.records: dict[tuple[str, int], Any] = {
            (section.idstr, section.instance_id): section.vmstate.record() for section in self._sections
        }
        self.migration_blockers: list[str] = []
        self.refuses = ""  # why it takes no device state
        self.loads = 0
        self.rehearsals = 0
        self.throttled: list[int] = []  # every percentage that was asked for
        self.touched_first: list[tuple[RAMBlock, int]] = []
        self.guest = FakeGuest(self) if guest else None

    # --- memory

    def write(self, block: RAMBlock, offset: int, data: bytes) -> None:
        """A guest's store of *data* at *offset*; without a seam between the mark and the bytes."""
        memory = self._memory[block.idstr]
        if not 0 <= offset <= offset + len(data) <= len(memory):
            raise ValueError(f"block {block.idstr!r}: {len(data)} bytes at {offset:#x} pass its end")
        if data:
            with self.log.lock:
                self.log.mark(block, offset, len(data))
                memory[offset : offset + len(data)] = data

    def read(self, block: RAMBlock, offset: int, length: int) -> bytes:
        return self._memory[block.idstr][offset : offset + length]

    def digests(self) -> dict[str, str]:
        """SHA-256 of every block."""
        return {name: hashlib.sha256(memory).hexdigest() for name, memory in self._memory.items()}

    # --- run state

    def stop(self, state: RunState) -> RunState:
        before = self.runstate
        if self.guest is not None:
            self.guest.halt()
        self._enter(state)
        return before

    def start(self) -> None:
        self._enter(RunState.RUNNING)
        if self.guest is not None:
            self.guest.run()

    def throttle_vcpus(self, percentage: int) -> None:
        self.throttled.append(percentage)

    def set_runstate(self, state: RunState) -> None:
        self._require_stopped("rename the run state")
        self._enter(state)

    def _enter(self, state: RunState) -> None:
        self.runstate = state
        self.history.append(state)

    def _require_stopped(self, what: str) -> None:
        if self.runstate is RunState.RUNNING:
            raise MachineError(f"cannot {what} of a machine that runs")

    # --- devices

    def sections(self) -> Sequence[DeviceSection]:
        return self._sections

    def save_device_state(self) -> Sequence[tuple[DeviceSection, Any]]:
        self._require_stopped("save the device state")
        return [(s, copy.deepcopy(self.records[s.idstr, s.instance_id])) for s in self._sections]

    def first_touched(self) -> Sequence[tuple[RAMBlock, int]]:
        self._require_stopped("say where it goes on")
        return self.touched_first

    def rehearse_load(self) -> None:
        self._require_stopped("rehearse")
        self.rehearsals += 1

    def load_device_state(self, loaded: Sequence[tuple[DeviceSection, Any]]) -> None:
        self._require_stopped("load the device state")
        if self.refuses:
            raise MachineError(self.refuses, section="cpu", instance_id=0)
        self.loads += 1
        for section, record in loaded:
            self.records[section.idstr, section.instance_id] = record

    def discard_ram(self) -> None:
        """All memory that is ours alone reads as zeroes again."""
        self._require_stopped("discard the memory")
        for memory in self._memory.values():
            if memory is not self._shared:
                memory.madvise(mmap.MADV_DONTNEED)

    def vcpu_thread_ids(self) -> Sequence[int]:
        return [0]

    def close(self) -> None:
        """End the guest's thread; the memory goes with the last reference."""
        if self.guest is not None:
            self.guest.halt()


class FakeGuest:
    """Adds one to the first word of each page of a range, in order, and compares with the passes done.

    Its registers are the words at STATUS in guest memory: passes, position in the walk, first bad page + 1.

    Threads   `CPU 0/KVM` between `run` and `halt`, which joins it; `step` only while that does not run.
    """

    STATUS = 0x1000
    FIRST_PAGE = 16

    def __init__(self, machine: FakeMachine, pages: int = 256) -> None:
        self.machine = machine
        self.pages = min(pages, machine.ram.pages - self.FIRST_PAGE)
        self._halt = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def passes(self) -> int:
        return self._registers()[0]

    @property
    def bad_page(self) -> int | None:
        """The first page that was not what it should be, or None."""
        return self._registers()[2] - 1 if self._registers()[2] else None

    def step(self, count: int = 1) -> None:
        """Walk over the next *count* pages; a guest that found a bad page stands still."""
        passes, position, bad = self._registers()
        for _ in range(count):
            if bad:
                return
            offset = (self.FIRST_PAGE + position) * PAGE
            if self._word(offset) != passes:
                bad = offset // PAGE + 1
            else:
                self.machine.write(self.machine.ram, offset, struct.pack("<Q", passes + 1))
                position += 1
            if position == self.pages:
                passes, position = passes + 1, 0
            self.machine.write(self.machine.ram, self.STATUS, struct.pack("<3Q", passes, position, bad))

    def run(self) -> None:
        if self._thread is None:
            self._halt.clear()
            self._thread = threading.Thread(target=self._loop, name="CPU 0/KVM", daemon=True)
            self._thread.start()

    def halt(self) -> None:
        if self._thread is not None:
            self._halt.set()
            self._thread.join()
            self._thread = None

    def _loop(self) -> None:
        while not self._halt.wait(0.0005):  # leaves the processor to the migration in between
            self.step(16)

    def _registers(self) -> tuple[int, int, int]:
        passes, position, bad = struct.unpack("<3Q", self.machine.read(self.machine.ram, self.STATUS, 24))
        return passes, position, bad

    def _word(self, offset: int) -> int:
        return int.from_bytes(self.machine.read(self.machine.ram, offset, 8), "little")


def _private(size: int) -> mmap.mmap:
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _address(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def _sections(cpus: int) -> list[DeviceSection]:
    """What a microvm sends, in its order (machine.md §4)."""
    found = [DeviceSection("timer", 0, TIMER), DeviceSection("fw_cfg", 0, FW_CFG)]
    for index in range(cpus):
        found += [DeviceSection("cpu_common", index, CPU_COMMON), DeviceSection("cpu", index, CPU)]
        found += [DeviceSection("kvm-tpr-opt", 0, KVM_TPR_OPT)] if index == 0 else []
        found += [DeviceSection("apic", index, APIC)]
    found += [DeviceSection("ioapic", 0, IOAPIC), DeviceSection("kvmclock", 0, KVMCLOCK)]
    return [*found, DeviceSection("serial", 0, SERIAL)]


def empty_words(block: RAMBlock) -> memoryview:
    """Clear words for `fetch`, as many as *block* needs."""
    return memoryview(array("Q", bytes(8 * -(-block.pages // WORD_PAGES))))


def pages_in(words: memoryview) -> list[int]:
    """The pages whose bits are set."""
    return [64 * index + bit for index, word in enumerate(words) for bit in range(64) if word >> bit & 1]
