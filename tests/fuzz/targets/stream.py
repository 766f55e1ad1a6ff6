"""The main channel as a whole: header, configuration, sections of devices, commands, packages (stream.md, postcopy.md §3).

    input    choices · piece · stream, folded

Nothing of it takes effect on the machine, whatever is taken.  There is no return path to listen by, so LISTEN is refused.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import Any

from qemumig.channels.channel import QuitEvent
from qemumig.destination.loader import StreamLoader
from qemumig.destination.postcopy import PostcopyDestination
from qemumig.options import MigrationOptions
from qemumig.qapi import RunState
from qemumig.savevm import commands, sections
from qemumig.savevm.sections import SectionHeader
from qemumig.states import DESTINATION, StatusMachine
from qemumig.wire.format import SectionType
from qemumig.wire.stream import InputStream
from tests.fuzz.delivery import ROOM, delivered, piece_length
from tests.fuzz.folding import fold, taken_apart
from tests.fuzz.oracle import Fault, outcome_of
from tests.support.fake_machine import FakeMachine
from tests.support.fuzz_ram import EOS

POSTCOPY, IGNORE_SHARED, BARE = 1, 2, 4  # bits of the choices; BARE: neither configuration nor footers
RAM_SIZE = 8 * 4096


def is_shared(choices: int) -> bool:
    """Whether memory that both ends have is left out, which does not go together with postcopy."""
    return choices & (POSTCOPY | IGNORE_SHARED) == IGNORE_SHARED


def run(data: bytes) -> str:
    (choices, piece), wire = taken_apart(data, 2, ROOM)
    options = MigrationOptions()
    options.set_capabilities([("postcopy-ram", bool(choices & POSTCOPY)), ("x-ignore-shared", is_shared(choices))])
    if choices & BARE:
        for name in ("send-configuration", "send-section-footer"):
            options.set_property(name, "off")
    machine = FakeMachine(RAM_SIZE, incoming=True)
    event = QuitEvent()
    with delivered(wire, piece_length(piece)) as channel:
        postcopy = None
        if choices & POSTCOPY:
            states = StatusMachine(DESTINATION, lambda status: None)
            listener: Any = None  # nobody else connects
            postcopy = PostcopyDestination(
                machine,
                options,
                states,
                channel=channel,
                listener=listener,
                quit_event=event,
                end_packets=lambda: None,
                hold_events=lambda: None,
            )
        loader = StreamLoader(
            machine,
            options,
            InputStream(channel),
            open_return_path=lambda: None,
            pong=lambda value: None,
            look_round=lambda: None,
            postcopy=postcopy,
        )
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # where it says what it ignores
                outcome = outcome_of(loader.load)
        finally:
            event.set()
            if postcopy is not None:
                postcopy.close()
            event.close()
    if machine.loads or machine.history != [RunState.INMIGRATE]:
        raise Fault(f"the machine has taken what came: {machine.history}")
    return outcome


# ---- to begin with ----


def frame(*elements: bytes, capabilities: tuple[str, ...] = (), bare: bool = False) -> bytes:
    """Header and configuration, then *elements*, then the end."""
    configuration, _ = sections.encode_configuration(sections.Configuration.of("microvm", capabilities=capabilities))
    return sections.encode_file_header() + (b"" if bare else configuration) + b"".join(elements) + b"\0"


def section(kind: SectionType, number: int, body: bytes, *identity: Any, bare: bool = False) -> bytes:
    footer = b"" if bare else sections.encode_section_footer(number)
    return sections.encode_section_header(SectionHeader(kind, number, *identity)) + body + footer


def block_list(machine: FakeMachine, address: bool) -> bytes:
    data = (sum(block.used_length for block in machine.ram_blocks) | 0x4).to_bytes(8, "big")
    for block in machine.ram_blocks:
        data += bytes([len(block.idstr)]) + block.idstr.encode() + block.used_length.to_bytes(8, "big")
        data += block.guest_address.to_bytes(8, "big") if address else b""
    return data


def seeds() -> Iterator[bytes]:
    machine = FakeMachine(RAM_SIZE)
    end = EOS.to_bytes(8, "big")
    start, part, full = (
        SectionType.QEMU_VM_SECTION_START,
        SectionType.QEMU_VM_SECTION_PART,
        SectionType.QEMU_VM_SECTION_FULL,
    )
    page = (3 * 4096 | 0x8).to_bytes(8, "big") + b"\x0bmicrovm.ram" + b"x" * 4096
    said = [
        commands.OpenReturnPath(),
        commands.Ping(7),
        commands.PostcopyAdvise(4096, 4096),
        commands.PostcopyAdvise(),
        commands.PostcopyRamDiscard("microvm.ram", ((4096, 8192),)),
        commands.PostcopyListen(),
        commands.PostcopyRun(),
        commands.RecvBitmap("microvm.ram"),
        commands.PostcopyResume(),
        commands.SwitchoverStart(),
    ]
    words = [commands.encode_command(one) for one in said]
    for choices in range(8):
        shared, bare = is_shared(choices), bool(choices & BARE)
        capabilities = ("x-ignore-shared",) if shared else ()
        ram = section(start, 1, block_list(machine, shared) + end, "ram", 0, 4, bare=bare)
        ram += section(part, 1, page + end, bare=bare)
        devices = [
            section(full, 2 + n, one.vmstate.save(record)[0], one.idstr, one.instance_id, one.vmstate.version_id, bare=bare)
            for n, (one, record) in enumerate(machine.save_device_state())
        ]
        for elements in ([ram, *devices], [ram, *words[:2]], [*words[:3], ram, words[4]], *([one] for one in devices)):
            yield bytes([choices, 0]) + fold(frame(*elements, capabilities=capabilities, bare=bare))
        package = words[5] + b"".join(devices[:3]) + words[1] + words[6]
        packaged = commands.encode_command(commands.Packaged(len(package))) + package
        yield bytes([choices, 0]) + fold(frame(*words[:3], ram, packaged, capabilities=capabilities, bare=bare))
    for word in words:
        yield bytes([POSTCOPY, 0]) + fold(frame(words[2], word))
    yield b"\0\0" + fold(frame() + b"\6\0\0\0\2{}")
