"""Streams that lie: the loader answers each with one sentence, and nothing of them takes effect."""

from __future__ import annotations

import contextlib
import random
import re
import struct
import tempfile
import threading
from functools import cache

import pytest

from qemumig.channels.address import FileAddress
from qemumig.destination.loader import StreamLoader
from qemumig.errors import ChannelError, StreamError
from qemumig.options import MigrationOptions
from qemumig.qapi import RunState
from qemumig.savevm import commands, sections
from qemumig.savevm.sections import SectionHeader
from qemumig.source.migration import Migration
from qemumig.wire.format import SectionType
from qemumig.wire.stream import InputStream, OutputStream
from tests.support.fake_machine import FakeMachine
from tests.support.memory import channel_pair
from tests.support.pair import no_fd, wait_for

RAM_SIZE = 40 * 4096


@cache
def small_stream() -> bytes:
    """A whole stream of a small paused machine, as the source writes it to a file."""
    machine = FakeMachine(RAM_SIZE)
    machine.write(machine.ram, 5 * 4096, b"a page that is not zero")
    machine.stop(RunState.PAUSED)
    with tempfile.NamedTemporaryFile() as file:
        migration = Migration(machine, MigrationOptions(), emit=lambda name, data=None: None, take_fd=no_fd)
        migration.start(FileAddress(file.name))
        wait_for(lambda: not migration.is_running, "the stream to be written")
        assert migration.status.value == "completed", migration.query()
        migration.close()
        return file.read()


class Load:
    """One load of *data* by a fresh machine; `error` is what it raised."""

    def __init__(self, data: bytes, *, options: MigrationOptions | None = None) -> None:
        self.machine = FakeMachine(RAM_SIZE, incoming=True)
        self.pongs: list[int] = []
        self.opened = 0
        self.error: BaseException | None = None
        with channel_pair() as (left, right):
            writer = threading.Thread(target=self._write, args=(left, data))
            writer.start()
            self.loader = StreamLoader(
                self.machine,
                options or MigrationOptions(),
                InputStream(right),
                open_return_path=self._open,
                pong=self.pongs.append,
                look_round=lambda: None,
            )
            try:
                self.loader.load()
            except StreamError as error:
                self.error = error
            right.shutdown()
            writer.join()
        assert self.machine.loads == 0 and self.machine.history == [RunState.INMIGRATE]

    def _open(self) -> None:
        self.opened += 1

    @staticmethod
    def _write(channel: object, data: bytes) -> None:
        out = OutputStream(channel)
        with contextlib.suppress(ChannelError):  # the loader has seen enough
            out.write(data)
            out.flush()
        channel.finish()


def test_the_whole_stream_loads() -> None:
    load = Load(small_stream())
    assert load.error is None
    assert load.machine.read(load.machine.ram, 5 * 4096, 23) == b"a page that is not zero"
    assert load.loader.runstate is RunState.PAUSED
    names = [section.idstr for section, _ in load.loader.staged]
    assert names == [section.idstr for section in load.machine.sections()]
    assert not load.loader.description_missing


def test_a_stream_that_ends_anywhere_before_its_end_mark_is_refused() -> None:
    stream = small_stream()
    end = stream.rindex(b"\x00\x06", 0, stream.rindex(b'{"configuration"'))
    for length in range(end + 1):
        error = Load(stream[:length]).error
        assert isinstance(error, StreamError), f"cut to {length} bytes"
        # half a subsection is no subsection: it stands where the footer is expected
        assert re.search("stream ends inside|expected its footer", str(error)), f"cut to {length} bytes: {error}"
        assert error.offset is not None and error.offset <= length
    assert Load(stream[: end + 1]).loader.description_missing
    for length in (end + 2, end + 6, end + 7, len(stream) - 1):
        assert "VM description" in str(Load(stream[:length]).error)


def test_a_byte_that_is_wrong_is_refused_or_harmless_but_never_a_surprise() -> None:
    stream = small_stream()
    chance = random.Random(3)
    interesting = [i for i in range(len(stream)) if not 4096 < i < 4096 * 2 or i % 50 == 0]
    for position in chance.sample(interesting, min(1500, len(interesting))):
        mutated = bytearray(stream)
        mutated[position] ^= 1 << chance.randrange(8)
        Load(bytes(mutated))  # any StreamError is fine; anything else fails the test


def frame(*elements: bytes) -> bytes:
    """Header and configuration, then *elements*."""
    configuration, _ = sections.encode_configuration(sections.Configuration.of("microvm"))
    return sections.encode_file_header() + configuration + b"".join(elements)


def section(idstr: str, instance: int, version: int, payload: bytes, *, section_id: int = 5) -> bytes:
    header = SectionHeader(SectionType.QEMU_VM_SECTION_FULL, section_id, idstr, instance, version)
    return sections.encode_section_header(header) + payload + sections.encode_section_footer(section_id)


def start(idstr: str, version: int, payload: bytes, *, kind: SectionType = SectionType.QEMU_VM_SECTION_START) -> bytes:
    header = sections.encode_section_header(SectionHeader(kind, 1, idstr, 0, version))
    return header + payload + sections.encode_section_footer(1)


EOS = struct.pack(">Q", 0x10)
LIES = {
    "not a stream": (b"GET / HTTP/1.1\r\n\r\n", "magic 0x47455420 found, expected 0x5145564d"),
    "obsolete version": (struct.pack(">II", 0x5145564D, 2), "version 2 is obsolete, expected 3"),
    "later version": (struct.pack(">II", 0x5145564D, 4), "version 4 found, expected 3"),
    "no configuration": (sections.encode_file_header() + b"\x01", "0x01 found, expected the configuration"),
    "another machine": (
        sections.encode_file_header() + sections.encode_configuration(sections.Configuration.of("pc-q35-10.0"))[0],
        "machine type 'pc-q35-10.0' received, this machine is 'microvm'",
    ),
    "a machine name of 4 GiB": (sections.encode_file_header() + b"\x07\xff\xff\xff\xff", "4294967295"),
    "unknown element": (frame(b"\x42"), "section type 0x42 found, expected START"),
    "subsection at the top": (frame(b"\x05"), "section type 0x05 found"),
    "unknown section": (frame(section("warp-drive", 0, 1, b"")), "section 'warp-drive' instance 0"),
    "another instance": (frame(section("cpu", 7, 12, b"")), "section 'cpu' instance 7: this machine has cpu instance 0"),
    "newer version": (frame(section("cpu", 0, 13, b"")), "section 'cpu' instance 0: version 13 received"),
    "older version": (frame(section("cpu", 0, 10, b"")), "section 'cpu' instance 0: version 10 received"),
    "other ram version": (frame(start("ram", 3, EOS)), "section 'ram' instance 0: version 3 received"),
    "empty name": (frame(section("", 0, 1, b"")), "has an empty name"),
    "part of nothing": (
        frame(start("", 0, EOS, kind=SectionType.QEMU_VM_SECTION_PART)),
        "section id 1 was never started",
    ),
    "device state in parts": (
        frame(start("timer", 2, bytes(24)), start("", 0, b"", kind=SectionType.QEMU_VM_SECTION_PART)),
        "'timer' at 0x[0-9a-f]+ is device state, it cannot come in parts",
    ),
    "footer of another": (
        frame(sections.encode_section_header(SectionHeader(SectionType.QEMU_VM_SECTION_FULL, 9, "timer", 0, 2)),
              bytes(24), sections.encode_section_footer(8)),
        "section 'timer': footer at offset 0x[0-9a-f]+ has id 8, expected 9",
    ),
    "no footer": (
        frame(sections.encode_section_header(SectionHeader(SectionType.QEMU_VM_SECTION_FULL, 9, "timer", 0, 2)),
              bytes(30)),
        "section 'timer': 0x00 found at offset 0x[0-9a-f]+, expected its footer",
    ),
    "unknown run state": (
        frame(section("globalstate", 0, 1, struct.pack(">I100s", 5, b"flying"))),
        "run state b'flying' found, expected one of QEMU's run states",
    ),
    "unknown command": (frame(b"\x08\x00\x63\x00\x00"), "0x63"),
    "command with a wrong length": (frame(b"\x08\x00\x02\x00\x05\x00\x00\x00\x00\x00"), "5 bytes, expected 4"),
    "postcopy": (frame(commands.encode_command(commands.PostcopyListen())), "not built in this version"),
    "description of 4 GiB": (frame(b"\x00\x06\xff\xff\xff\xff"), "4294967295 bytes long, expected at most"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_answered_with_its_place_and_value(lie: str) -> None:
    data, finding = LIES[lie]
    load = Load(data)
    assert load.error is not None, "the lie was believed"
    assert re.search(finding, str(load.error)), str(load.error)
    assert "\n" not in str(load.error)


def test_commands_reach_the_return_path() -> None:
    ping = commands.encode_command(commands.Ping(7))
    load = Load(frame(commands.encode_command(commands.OpenReturnPath()), ping, ping, b"\0"))
    assert load.error is None and load.opened == 1 and load.pongs == [7, 7]


def test_switchover_start_is_taken_from_a_newer_source() -> None:
    assert Load(frame(commands.encode_command(commands.SwitchoverStart()), b"\0")).error is None


def test_sections_may_be_missing_repeated_and_in_any_order() -> None:
    early = section("timer", 0, 2, struct.pack(">qqq", 1, 0, 2))
    late = section("timer", 0, 2, struct.pack(">qqq", 3, 0, 4))
    load = Load(frame(early, start("ram", 4, EOS), late, b"\0"))
    assert load.error is None
    ((_, record),) = load.loader.staged
    assert (record.cpu_ticks_offset, record.cpu_clock_offset) == (3, 4)
    assert load.loader.runstate is None


def test_without_configuration_or_footers_when_both_sides_say_so() -> None:
    options = MigrationOptions()
    options.set_property("send-configuration", "off")
    options.set_property("send-section-footer", "off")
    header = sections.encode_section_header(SectionHeader(SectionType.QEMU_VM_SECTION_FULL, 9, "timer", 0, 2))
    load = Load(sections.encode_file_header() + header + bytes(24) + b"\0", options=options)
    assert load.error is None
