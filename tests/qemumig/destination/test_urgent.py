"""The channel of urgent pages, and who has the processors while the guest is about to start at the destination.

A source that is a script of bytes; the destination is real, with a fake machine whose start a test can hold back.
"""

from __future__ import annotations

import socket
import struct
import threading
from types import TracebackType

import pytest

from qemumig.channels.address import InetAddress
from qemumig.destination import postcopy
from qemumig.destination.incoming import IncomingMigration
from qemumig.options import MigrationOptions
from qemumig.qapi import MigrationStatus, RunState
from qemumig.savevm import sections
from qemumig.savevm.commands import (
    OpenReturnPath,
    PostcopyListen,
    PostcopyRamDiscard,
    PostcopyRun,
    encode_command,
)
from qemumig.wire.format import SectionType
from tests.support.fake_machine import FakeMachine
from tests.support.pair import no_fd, wait_for
from tests.support.vmm import Leaks

from .test_postcopy import ADVISE, PAGE, block_list, packaged, ram_section

pytestmark = pytest.mark.needs("userfaultfd")

BLOCK = "microvm.ram"
CONTENTS = b"\x5a" * PAGE
PAGE_FLAG, EOS = 0x08, struct.pack(">Q", 0x10)


def record(page: int) -> bytes:
    """A page full of CONTENTS."""
    return struct.pack(">QB", page * PAGE | PAGE_FLAG, len(BLOCK)) + BLOCK.encode() + CONTENTS


class Rig:
    """A destination that has been told to forget two pages, and both channels to it."""

    MISSING = (3, 7)

    def __init__(self) -> None:
        self.leaks = Leaks()
        self.machine = FakeMachine(1 << 20, incoming=True)
        self.may_start = threading.Event()
        start = self.machine.start
        self.machine.start = lambda: (self.may_start.wait(), start())[1]  # type: ignore[method-assign]
        options = MigrationOptions()
        options.set_capabilities([("postcopy-ram", True), ("postcopy-preempt", True)])
        self.incoming = IncomingMigration(self.machine, options, emit=lambda name, data=None: None, take_fd=no_fd)
        self.incoming.listen(InetAddress("127.0.0.1", "0"), exit_on_error=False)
        self._port = int(self.incoming.query()["socket-address"][0]["port"])
        self.main = self.connect()
        configuration, _ = sections.encode_configuration(sections.Configuration.of("microvm"))
        self.main.sendall(sections.encode_file_header() + configuration)
        self.main.sendall(encode_command(OpenReturnPath()) + encode_command(ADVISE))
        self.main.sendall(ram_section(SectionType.QEMU_VM_SECTION_START, block_list(self.machine)))
        wait_for(lambda: self.incoming._postcopy is not None, "the destination to begin")
        self.urgent = self.connect()
        ranges = tuple((page * PAGE, PAGE) for page in self.MISSING)
        self.main.sendall(encode_command(PostcopyRamDiscard(BLOCK, ranges)))

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self._port))

    def hand_over(self) -> None:
        self.main.sendall(packaged(PostcopyListen(), PostcopyRun()))

    def is_here(self, page: int) -> bool:
        """Whether a page was placed; its contents are looked at only then, for a look at a missing page waits."""
        destination = self.incoming._postcopy
        memory = destination._memory if destination is not None else None
        if memory is None or not memory.received[0].test(page):
            return False
        assert self.machine.read(self.machine.ram, page * PAGE, PAGE) == CONTENTS
        return True

    def __enter__(self) -> Rig:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.may_start.set()
        for link in (self.main, self.urgent):
            link.close()
        self.incoming.close()
        self.machine.close()
        self.leaks.check()


def test_the_main_channel_waits_until_the_guest_has_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is urgent comes meanwhile."""
    monkeypatch.setattr(postcopy, "SETTLE_S", 3600)
    with Rig() as rig:
        rig.hand_over()
        rig.main.sendall(ram_section(SectionType.QEMU_VM_SECTION_PART, record(3) + EOS))
        rig.urgent.sendall(record(7))
        wait_for(lambda: rig.is_here(7), "the urgent page")
        assert not rig.is_here(3) and rig.machine.runstate is not RunState.RUNNING
        rig.may_start.set()
        wait_for(lambda: rig.is_here(3), "the page of the main channel")
        assert rig.machine.runstate is RunState.RUNNING


def test_the_main_channel_is_read_when_the_start_takes_too_long() -> None:
    """A start that waits for what only the main channel can bring must not wait for ever."""
    with Rig() as rig:
        rig.hand_over()
        rig.main.sendall(ram_section(SectionType.QEMU_VM_SECTION_PART, record(3) + EOS))
        wait_for(lambda: rig.is_here(3), "the page of the main channel")
        assert rig.machine.runstate is not RunState.RUNNING


def test_urgent_pages_that_come_early_wait_for_the_memory_that_they_belong_to() -> None:
    with Rig() as rig:
        rig.urgent.sendall(record(7) + record(3))
        wait_for(lambda: rig.incoming._postcopy._preempt_channel is not None, "the channel")  # type: ignore[union-attr]
        rig.may_start.set()
        rig.hand_over()
        wait_for(lambda: rig.is_here(3) and rig.is_here(7), "both pages")


@pytest.mark.parametrize("noise", [b"\xff" * 64, record(7)[:20], record(1 << 40), struct.pack(">QB", PAGE_FLAG, 2) + b"no"])
def test_noise_on_the_channel_of_urgent_pages_pauses_or_refuses_and_loses_nothing(noise: bytes) -> None:
    """It is noticed before the guest is here, which the source hears, or after, and then both sides can recover."""
    with Rig() as rig:
        rig.may_start.set()
        rig.urgent.sendall(noise)
        rig.urgent.shutdown(socket.SHUT_WR)
        rig.hand_over()
        ends = (MigrationStatus.FAILED, MigrationStatus.POSTCOPY_PAUSED)
        wait_for(lambda: rig.incoming.status in ends, "the end of the connection")
        ran = RunState.RUNNING in rig.machine.history
        assert ran == (rig.incoming.status is MigrationStatus.POSTCOPY_PAUSED)


def test_a_channel_of_urgent_pages_that_ends_before_the_guest_came_leaves_no_thread() -> None:
    with Rig() as rig:
        rig.urgent.close()
        rig.main.close()
        wait_for(lambda: rig.incoming.status is MigrationStatus.FAILED, "the failure")
        assert RunState.RUNNING not in rig.machine.history
