"""A background snapshot: the guest runs on while its memory as of one instant goes out (ram.md §11).

    header, START ─▶ stop ─▶ device state into memory, every page protected ─▶ run ─▶ all pages, once ─▶ device state

A vCPU that writes to a protected page waits until that page has left; then the protection goes.  So each page leaves as it
was at the stop, and the stream is that of a guest that stood still: it loads like any other, here and in QEMU.

Threads   `mig/snapshot` does all of it, but for the start of the guest, which might itself write to memory: that is left to
          a thread of its own, `mig/snapshot/go`, joined here.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time

from ..channels.channel import Channel
from ..errors import MachineError, MigrationCancelled
from ..postcopy.serve import PageServer
from ..postcopy.uffd import WRITE_PROTECT, WRITE_PROTECT_MISSING, WRITE_PROTECT_SHARED, Userfaultfd, offered_features
from ..qapi import MigrationStatus, RunState
from ..threads import start_thread
from ..wire.format import RamSaveFlag, SectionType
from .attempt import Attempt

PART_S = 0.05
STEP_BYTES, STEP_PAGES = 1 << 20, 1024  # at a time, before the clock and a cancel are looked at
_MADV_POPULATE_READ = 22  # not in Python's mmap of 3.11

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class SnapshotAttempt(Attempt):
    """An attempt with capability `background-snapshot`."""

    thread_name = "mig/snapshot"
    _logs_writes = False
    _go: threading.Thread | None = None
    _sent = 0, 0  # pages, as zero and in full

    def _wants_return_path(self, channel: Channel) -> bool:
        return False

    def _send_rounds(self) -> None:
        """There is one round, and it comes after the instant."""

    def _switch_over(self) -> None:
        assert self.writer is not None and self.ram is not None
        uffd = Userfaultfd(WRITE_PROTECT | WRITE_PROTECT_MISSING | WRITE_PROTECT_SHARED)
        try:
            for block in self.ram.blocks:
                uffd.register_protected(block.host_address, block.used_length, block.idstr)
                _populate(block.host_address, block.used_length, block.idstr)
            server = PageServer(self.ram.dirty)
            server.connect(self.writer.out)
            server.unprotect_by(uffd)
            try:
                devices = self._freeze(server)
                self._send_all(server)
            finally:
                server.close()
                self._sent = server.zero_pages, server.normal_pages
        finally:
            self._thaw(uffd)
        self.writer.out.write(devices)
        self.writer.out.flush()
        self.total_s = time.monotonic() - self.start_s
        self._move(MigrationStatus.ACTIVE, MigrationStatus.COMPLETED)

    def _freeze(self, server: PageServer) -> bytes:
        """The instant: the guest stops, its devices are saved, its pages protected, and it runs again."""
        assert self.writer is not None
        self._stop_s = time.monotonic()
        noted = self._noted_runstate = self.machine.runstate
        if noted is RunState.RUNNING:
            self.machine.stop(RunState.PAUSED)
        devices = b""
        try:
            devices = self.writer.devices_in_one_piece(self.machine, noted)
            server.protect_all()
        finally:
            if noted is RunState.RUNNING:
                self._go = start_thread("mig/snapshot/go", self.machine.start)
        self.downtime_s = time.monotonic() - self._stop_s
        return devices

    def _send_all(self, server: PageServer) -> None:
        assert self.writer is not None
        done = False
        while not done:
            deadline = time.monotonic() + PART_S
            self.writer.begin_section(SectionType.QEMU_VM_SECTION_PART)
            while not done and time.monotonic() < deadline:
                done = server.serve(STEP_BYTES, STEP_PAGES)
            self.writer.out.write_be64(RamSaveFlag.RAM_SAVE_FLAG_EOS)
            self.writer.end_section()
            if self._quit.is_set():
                raise MigrationCancelled("the migration was cancelled")

    def _thaw(self, uffd: Userfaultfd) -> None:
        """Whoever waits for a page goes on; nothing is protected any more."""
        assert self.ram is not None
        for block in self.ram.blocks:
            uffd.release(block.host_address, block.used_length)
        uffd.close()
        if self._go is not None:
            self._go.join()

    @property
    def pages(self) -> tuple[int, int]:
        return self._sent


def check_protection() -> None:
    """MachineError when the kernel does not tell of writes to pages that it protects."""
    if not offered_features() & WRITE_PROTECT:
        raise MachineError("userfaultfd here has no write protection; Linux 5.7 has")


def _populate(address: int, length: int, name: str) -> None:
    """Have every page exist, if only as the zero page: the kernel cannot protect what does not."""
    if _libc.madvise(address, length, _MADV_POPULATE_READ) != 0:
        reason = os.strerror(ctypes.get_errno())
        raise MachineError(f"RAM block '{name}' cannot be populated for a background snapshot: {reason}; Linux 5.14 can")
