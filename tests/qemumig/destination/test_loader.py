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
from qemumig.errors import ChannelError, MachineError, StreamError
from qemumig.options import MigrationOptions
from qemumig.qapi import RunState
from qemumig.ram.block import RAMBlock
from qemumig.ram.landing import Landing
from qemumig.ram.load import RamLoader
from qemumig.savevm import commands, sections
from qemumig.savevm.devices.cpu import CPU
from qemumig.savevm.devices.cpu_state import CpuState
from qemumig.savevm.sections import SectionHeader
from qemumig.source.migration import Migration
from qemumig.wire.format import SectionType
from qemumig.wire.stream import InputStream, OutputStream
from tests.support.fake_machine import FakeMachine
from tests.support.memory import Memory, channel_pair
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
    for length in [*range(0, end, 7), end]:
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
    for position in chance.sample(interesting, min(700, len(interesting))):
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


def block_list(name: bytes, length: int, *, total: int | None = None) -> bytes:
    """The body of a `ram` START with one block; *total*: what the list says of its own length."""
    head = struct.pack(">Q", (length if total is None else total) | 4)
    return head + bytes([len(name)]) + name + struct.pack(">Q", length) + EOS


LIES = {
    "not a stream": (b"GET / HTTP/1.1\r\n\r\n", "magic 0x47455420 found, expected 0x5145564d"),
    "obsolete version": (struct.pack(">II", 0x5145564D, 2), "version 2 is obsolete, expected 3"),
    "later version": (struct.pack(">II", 0x5145564D, 4), "version 4 found, expected 3"),
    "no configuration": (sections.encode_file_header() + b"\x01", "at offset 0x8: 0x01 found, expected its marker"),
    "another machine": (
        sections.encode_file_header() + sections.encode_configuration(sections.Configuration.of("pc-q35-10.0"))[0],
        "machine type 'pc-q35-10.0' received, this machine is 'microvm'",
    ),
    "a machine name of 4 GiB": (sections.encode_file_header() + b"\x07\xff\xff\xff\xff", "4294967295"),
    "unknown element": (frame(b"\x42"), "section at offset 0x14: type 0x42 found, expected START"),
    "subsection at the top": (frame(b"\x05"), "section at offset 0x14: type 0x05 found"),
    "unknown section": (frame(section("warp-drive", 0, 1, b"")), "section 'warp-drive' instance 0"),
    "another instance": (frame(section("cpu", 7, 12, b"")), "'cpu' instance 7 at offset 0x14: this machine has cpu"),
    "newer version": (frame(section("cpu", 0, 13, b"")), "section 'cpu' instance 0 at offset 0x14: version 13 received"),
    "older version": (frame(section("cpu", 0, 10, b"")), "section 'cpu' instance 0 at offset 0x14: version 10 received"),
    "other ram version": (frame(start("ram", 3, EOS)), "section 'ram' instance 0 at offset 0x14: version 3 received"),
    "empty name": (frame(section("", 0, 1, b"")), "has an empty name"),
    "part of nothing": (
        frame(start("", 0, EOS, kind=SectionType.QEMU_VM_SECTION_PART)),
        "section id 1 at offset 0x14 was never started, ids so far: none",
    ),
    "device state in parts": (
        frame(start("timer", 2, bytes(24)), start("", 0, b"", kind=SectionType.QEMU_VM_SECTION_PART)),
        "section 'timer' instance 0 at offset 0x44: device state in parts",
    ),
    "footer of another": (
        frame(sections.encode_section_header(SectionHeader(SectionType.QEMU_VM_SECTION_FULL, 9, "timer", 0, 2)),
              bytes(24), sections.encode_section_footer(8)),
        "section 'timer': footer at offset 0x[0-9a-f]+ has id 8, expected 9",
    ),
    "no footer": (
        frame(sections.encode_section_header(SectionHeader(SectionType.QEMU_VM_SECTION_FULL, 9, "timer", 0, 2)),
              bytes(30)),
        "section 'timer' at offset 0x3f: 0x00 found, expected its footer",
    ),
    "unknown run state": (
        frame(section("globalstate", 0, 1, struct.pack(">I100s", 5, b"flying"))),
        "run state b'flying' found, expected one of QEMU's run states",
    ),
    "unknown command": (frame(b"\x08\x00\x63\x00\x00"), "0x63"),
    "command with a wrong length": (frame(b"\x08\x00\x02\x00\x05\x00\x00\x00\x00\x00"), "5 bytes, expected 4"),
    "postcopy": (
        frame(commands.encode_command(commands.PostcopyAdvise(4096, 4096))),
        "MIG_CMD_POSTCOPY_ADVISE at offset 0x14: the source has capability 'postcopy-ram' on, .* not built .*"
        "; say 'migrate_set_capability postcopy-ram off' at the source$",
    ),
    "dirty bitmaps": (frame(commands.encode_command(commands.PostcopyAdvise())), "capability 'dirty-bitmaps' on"),
    "COLO": (frame(commands.encode_command(commands.EnableColo())), "capability 'x-colo' on"),
    "a multifd channel": (b"\x11\x22\x33\x44" + bytes(60), "magic 0x11223344 .*; .*migrate_set_capability multifd off"),
    "TLS": (b"\x16\x03\x01\x02\0\1\0\1\xfc\3\3", "magic 0x16030102 found, .*; this is TLS: set parameter tls-creds"),
    "footers left out": (
        frame(start("ram", 4, EOS)[:-5], b"\x02\0\0\0\1"),
        "section 'ram' at offset 0x2d: 0x02 found, expected its footer .*"
        "; start the destination with -global migration.send-section-footer=off",
    ),
    "more RAM": (
        frame(start("ram", 4, block_list(b"microvm.ram", 1 << 20))),
        r"section 'ram' instance 0 at offset 0x2d: block 'microvm.ram' has 0x28000 bytes here, the stream says 0x100000"
        "; start the destination with -m 1M$",
    ),
    "RAM of another name": (
        frame(start("ram", 4, block_list(b"mem0", 1 << 20))),
        "block 'mem0' does not exist here, this machine has 'microvm.ram', 'pc.bios'; start the destination with "
        "-m 1M -object memory-backend-ram,id=mem0,size=1M -M memory-backend=mem0$",
    ),
    "ACPI's RAM": (
        frame(start("ram", 4, block_list(b"/rom@etc/acpi/tables", 4096))),
        "block '/rom@etc/acpi/tables' does not exist here, .*; start the destination with -M acpi=on$",
    ),
    "a record of RDMA": (
        frame(start("ram", 4, struct.pack(">Q", 0x80))),
        r"section 'ram' instance 0, record at offset 0x25: head 0x80 has flags 0x80 \(HOOK\), expected .*"
        "; say 'migrate_set_capability rdma-pin-all off' at the source$",
    ),
    "a subsection of Xen": (
        frame(section("cpu", 0, 12, CPU.save(CpuState())[0] + b"\x05\x0ccpu/xen_vcpu\0\0\0\1" + bytes(40))),
        "section 'cpu' instance 0 at offset 0x[0-9a-f]+: unknown subsection 'cpu/xen_vcpu' of 'cpu'; the guest has a Xen",
    ),
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


@pytest.mark.parametrize(("name", "kind"), [("send-configuration", "0x07"), ("send-section-footer", "0x7e")])
def test_what_this_side_was_told_not_to_expect_is_named(name: str, kind: str) -> None:
    options = MigrationOptions()
    options.set_property(name, "off")
    error = str(Load(small_stream(), options=options).error)
    assert re.match(
        rf"section at offset 0x\w+: type {kind} found, .*; start .* without -global migration.{name}=off$", error
    )


def test_a_capability_that_is_on_here_alone_is_named() -> None:
    options = MigrationOptions()
    options.capabilities = lambda: {"mapped-ram": True}  # type: ignore[method-assign]
    error = str(Load(small_stream(), options=options).error)
    assert error.endswith("'migrate_set_capability mapped-ram off' at the destination")


def test_a_block_that_may_grow_takes_the_length_of_the_source() -> None:
    memory = Memory("rom", 8 * 4096)
    block = RAMBlock("rom", memory.block.host_address, 2 * 4096, max_length=8 * 4096, fresh=True, owner=memory)
    page = struct.pack(">Q", 5 * 4096 | 8) + b"\3rom" + b"x" * 4096
    body = block_list(b"rom", 6 * 4096)[:-8] + page + EOS
    with channel_pair() as (left, right):
        Load._write(left, body)
        RamLoader(InputStream(right), Landing([block])).load_body()
    assert (block.used_length, memory.read(5 * 4096, 1)) == (6 * 4096, b"x")


@pytest.mark.parametrize("length", [9 * 4096, 4095])
def test_a_block_does_not_grow_beyond_its_maximum_nor_by_half_a_page(length: int) -> None:
    memory = Memory("/rom@x", 8 * 4096)
    block = RAMBlock("/rom@x", memory.block.host_address, 2 * 4096, max_length=8 * 4096, owner=memory)
    with channel_pair() as (left, right):
        Load._write(left, block_list(b"/rom@x", length, total=9 * 4096))
        with pytest.raises(StreamError, match=f"block '/rom@x' has 0x2000 bytes here, the stream says {length:#x}$"):
            RamLoader(InputStream(right), Landing([block])).load_body()


def test_what_the_machine_cannot_take_is_placed_in_the_stream() -> None:
    loader = Load(small_stream()).loader
    error = loader.placed(MachineError("MSR 0x122 is 0x1", section="cpu", instance_id=0))
    assert re.match(r"section 'cpu' instance 0 at offset 0x\w+: MSR 0x122 is 0x1; .*-cpu qemu64", str(error)), error
    elsewhere = MachineError("no memory")
    assert loader.placed(elsewhere) is elsewhere
