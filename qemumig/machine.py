"""What a migration asks of a virtual machine, as Protocols: anything of this shape can be migrated.

`kvm/` fulfils them with a real machine, the tests with a fake one.  Nothing in qemumig knows more of either.

Threads   A migration calls from its own thread.  `stop` and `start` may be called from any thread; the rest is
          called by one thread at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from .qapi import RunState
from .ram.block import RAMBlock
from .savevm.devices.globalstate import GLOBALSTATE
from .savevm.vmstate import VMState

HoldEvents = Callable[[], AbstractContextManager[None]]
"""Around the time in which a guest stands still: inside, events may wait a little before they are told."""


class DirtyLog(Protocol):
    """The hypervisor's record of which pages the guest has written, and its write protection.

    With `manual_clear`, `fetch` leaves the pages writable and reports them again until `clear` has protected
    them anew: clear a page *before* its bytes are read, or a write in between is lost.  Without it `fetch`
    itself clears, and `clear` does nothing.
    """

    @property
    def manual_clear(self) -> bool:
        """Whether `clear` is what protects pages again."""

    def start(self) -> None:
        """Begin to log writes to all of RAM."""

    def fetch(self, block: RAMBlock, words: memoryview) -> None:
        """OR the pages of *block* written since they were last cleared into *words*.

        *words*: writable uint64 (format "Q"), bit k of word w is target page 64 w + k; at least
        ceil(pages / 64) words.  Bits that are set already stay set.
        """

    def clear(self, block: RAMBlock, first_page: int, page_count: int) -> None:
        """Protect the pages that the last `fetch` reported in [first_page, first_page + page_count) again.

        *first_page* is a multiple of 64, *page_count* too unless the range ends with the block.
        """

    def stop(self) -> None:
        """End logging; pages become writable without a trace."""


@dataclass(frozen=True)
class DeviceSection:
    """A piece of device state with an identity on the wire (stream.md §3.2)."""

    idstr: str
    instance_id: int
    vmstate: VMState


GLOBALSTATE_SECTION = DeviceSection("globalstate", 0, GLOBALSTATE)
"""The one section that no machine has: the run state, which migration itself sends and takes."""


class Machine(Protocol):
    """A virtual machine that can be migrated."""

    @property
    def machine_type(self) -> str:
        """The name in the configuration section, e.g. "microvm"."""

    @property
    def uuid(self) -> bytes | None:
        """16 bytes, or None when the user set none."""

    @property
    def ram_blocks(self) -> Sequence[RAMBlock]:
        """All of guest memory, in no particular order."""

    @property
    def dirty_log(self) -> DirtyLog:
        """The record of what the guest writes."""

    @property
    def migration_blockers(self) -> Sequence[str]:
        """Why this machine cannot be migrated now, each reason a sentence; the first one is what `migrate` says."""

    @property
    def runstate(self) -> RunState:
        """What the machine is doing now."""

    def stop(self, state: RunState) -> RunState:
        """Stop every vCPU and enter *state*; returns, when none of them runs any more, the state that it left."""

    def start(self) -> None:
        """Let the vCPUs run: RunState.RUNNING."""

    def throttle_vcpus(self, percentage: int) -> None:
        """Let every vCPU run only 100 − *percentage* (0 … 99) percent of the time, until told otherwise."""

    def set_runstate(self, state: RunState) -> None:
        """Rename the state of a machine that is stopped (finish-migrate → postmigrate, …)."""

    def sections(self) -> Sequence[DeviceSection]:
        """Every device section this machine can send or take, in the order in which QEMU sends them."""

    def save_device_state(self) -> Sequence[tuple[DeviceSection, Any]]:
        """The state of all devices of the stopped machine, as records of their vmstates, in that order."""

    def first_touched(self) -> Sequence[tuple[RAMBlock, int]]:
        """Pages that the stopped machine touches as soon as it goes on, each as its block and an offset in that; advice."""

    def rehearse_load(self) -> None:
        """Go through what `load_device_state` asks of the host, with the state that this incoming machine begins with."""

    def load_device_state(self, loaded: Sequence[tuple[DeviceSection, Any]]) -> None:
        """Put loaded records into effect, all at once; the machine is stopped.  A record is used once."""

    def discard_ram(self) -> None:
        """Forget all guest memory after a load that failed: every block reads as zeroes again, if it is private."""

    def vcpu_thread_ids(self) -> Sequence[int]:
        """The kernel's numbers of the threads that run the guest; 0 for one that does not exist yet."""
