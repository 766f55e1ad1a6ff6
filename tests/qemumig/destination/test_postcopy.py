"""What a source may not say in postcopy: the destination refuses it with a reason, and nothing ran or is left there."""

from __future__ import annotations

import re
import socket
import struct

import pytest

from qemumig.channels.address import InetAddress
from qemumig.destination.incoming import IncomingMigration
from qemumig.options import MigrationOptions
from qemumig.qapi import MigrationStatus, RunState
from qemumig.savevm import sections
from qemumig.savevm.commands import (
    Command,
    OpenReturnPath,
    Packaged,
    PostcopyAdvise,
    PostcopyListen,
    PostcopyRamDiscard,
    PostcopyRun,
    encode_command,
)
from qemumig.savevm.sections import SectionHeader
from qemumig.wire.format import SectionType
from tests.support.fake_machine import FakeMachine
from tests.support.pair import no_fd, wait_for
from tests.support.vmm import Leaks

pytestmark = pytest.mark.needs("userfaultfd")

PAGE = 4096
ADVISE = PostcopyAdvise(PAGE, PAGE)


def ram_section(kind: SectionType, body: bytes) -> bytes:
    header = sections.encode_section_header(SectionHeader(kind, 1, "ram", 0, 4))
    return header + body + sections.encode_section_footer(1)


def block_list(machine: FakeMachine) -> bytes:
    entries = b"".join(
        bytes([len(block.idstr)]) + block.idstr.encode() + struct.pack(">Q", block.used_length)
        for block in machine.ram_blocks
    )
    total = sum(block.used_length for block in machine.ram_blocks)
    return struct.pack(">Q", total | 4) + entries + struct.pack(">Q", 0x10)


def packaged(*parts: Command | bytes) -> bytes:
    data = b"".join(part if isinstance(part, bytes) else encode_command(part) for part in parts)
    return encode_command(Packaged(len(data))) + data


def refusal(*parts: Command | bytes, capability: bool = True) -> str:
    """Feed a stream with a head and *parts* to a destination; what it says when it has refused."""
    machine = FakeMachine(1 << 20, incoming=True)
    options = MigrationOptions()
    options.set_capabilities([("postcopy-ram", capability)])
    said: list[str] = []
    leaks = Leaks()
    incoming = IncomingMigration(machine, options, emit=lambda name, data=None: None, take_fd=no_fd, on_failure=said.append)
    incoming.listen(InetAddress("127.0.0.1", "0"), exit_on_error=False)
    port = int(incoming.query()["socket-address"][0]["port"])
    configuration, _ = sections.encode_configuration(sections.Configuration.of("microvm"))
    with socket.create_connection(("127.0.0.1", port)) as link:
        head = sections.encode_file_header() + configuration + encode_command(OpenReturnPath())
        start = ram_section(SectionType.QEMU_VM_SECTION_START, block_list(machine))
        body = b"".join(part if isinstance(part, bytes) else encode_command(part) for part in parts)
        link.sendall(head + body.replace(b"START", start))
        wait_for(lambda: incoming.status is MigrationStatus.FAILED, "the refusal")
        error = str(incoming.error)
    incoming.close()
    assert RunState.RUNNING not in machine.history
    assert set(machine.digests().values()) == set(FakeMachine(1 << 20).digests().values())
    machine.close()
    leaks.check()
    return error


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ((PostcopyListen(),), "POSTCOPY_LISTEN at offset 0x.* in postcopy phase 'none', expected 'advise' or 'discard'"),
        ((PostcopyRun(),), "POSTCOPY_RUN .* phase 'none', expected 'listening'"),
        ((ADVISE, ADVISE), "POSTCOPY_ADVISE .* phase 'advise', expected 'none'"),
        ((PostcopyAdvise(0x201000, PAGE),), "host and target pages of 0x201000 and 0x1000 bytes at the source, 0x1000"),
        ((PostcopyAdvise(PAGE, 0x2000),), "of 0x1000 and 0x2000 bytes at the source"),
        ((PostcopyRamDiscard("microvm.ram", ((0, PAGE),)),), "POSTCOPY_RAM_DISCARD .* phase 'none'"),
        ((ADVISE, b"START", PostcopyRamDiscard("rom", ((0, PAGE),))), "block 'rom' does not exist here, this machine has"),
        ((ADVISE, b"START", PostcopyRamDiscard("microvm.ram", ((1, PAGE),))), "0x1000 bytes at 0x1 of block 'microvm.ram'"),
        ((ADVISE, b"START", PostcopyRamDiscard("microvm.ram", ((0, 0),))), "expected whole host pages of 0x1000 bytes"),
        ((ADVISE, b"START", PostcopyRamDiscard("microvm.ram", ((1 << 20, PAGE),))), "bytes below 0x100000"),
        ((ADVISE, b"START", packaged(PostcopyRun())), "POSTCOPY_RUN .* phase 'advise', expected 'listening'"),
        ((ADVISE, b"START", packaged(PostcopyListen(), b"\0")), "package .*: the end of the stream in it"),
        ((ADVISE, b"START", packaged(PostcopyListen(), b"\2\0\0\0\1")), "section 'ram' .* inside a package"),
        ((ADVISE, b"START", packaged(PostcopyListen(), b"\4\0\0")), "stream ends inside"),
        ((ADVISE, b"START", packaged(PostcopyListen(), PostcopyListen())), "POSTCOPY_LISTEN .* phase 'listening'"),
    ],
)
def test_what_is_wrong_or_comes_at_the_wrong_time_is_refused(parts: tuple[Command | bytes, ...], text: str) -> None:
    assert re.search(text, error := refusal(*parts)), error


def test_postcopy_that_nobody_switched_on_here_is_refused_with_the_remedy() -> None:
    error = refusal(ADVISE, capability=False)
    assert "the source has capability 'postcopy-ram' on, RAM postcopy is disabled here" in error
    assert "migrate_set_capability postcopy-ram off" in error
