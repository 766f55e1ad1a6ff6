"""A destination that refuses: the same sentence wherever it is told, and nothing left of what was loaded."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from qemumig.channels.address import Address, FileAddress, InetAddress
from qemumig.destination.incoming import IncomingMigration
from qemumig.errors import MachineError
from qemumig.machine import DeviceSection
from qemumig.multifd import arrivals
from qemumig.multifd.packet import encode_init
from qemumig.options import MigrationOptions
from qemumig.qapi import MigrationStatus, RunState
from qemumig.savevm import sections
from tests.qemumig.destination.test_loader import RAM_SIZE, frame, section, small_stream
from tests.support.fake_machine import FakeMachine
from tests.support.pair import no_fd, wait_for

REFUSED = frame(section("i8254", 0, 3, b""))
REASON = (
    "section 'i8254' instance 0 at offset 0x14: this machine has no section of that name, it has 'ram', 'timer', 'fw_cfg', "
    "'cpu_common', 'cpu', 'kvm-tpr-opt', 'apic', 'ioapic', 'kvmclock', 'serial' and 'globalstate'; "
    "start the destination with -M pit=on"
)


class Incoming:
    """One load by *machine* that comes to an end, however."""

    def __init__(self, machine: FakeMachine, *, exit_on_error: bool = False) -> None:
        self.machine = machine
        self.last_words: list[str] = []
        self.migration = IncomingMigration(
            machine,
            MigrationOptions(),
            emit=lambda name, data=None: None,
            take_fd=no_fd,
            on_failure=self.last_words.append,
        )
        self._exit_on_error = exit_on_error

    def load(self, address: Address, feed: Callable[[int], None] = lambda port: None) -> dict[str, Any]:
        """What query-migrate says in the end; *feed* is told the port, where there is one."""
        self.migration.listen(address, exit_on_error=self._exit_on_error)
        try:
            for one in self.migration.query().get("socket-address", []):
                feed(int(one["port"]))
            ends = (MigrationStatus.COMPLETED, MigrationStatus.FAILED)
            wait_for(lambda: self.migration.status in ends, "the end of the load")
            return self.migration.query()
        finally:
            self.migration.close()


def stored(directory: Path, data: bytes) -> FileAddress:
    path = directory / "stream"
    path.write_bytes(data)
    return FileAddress(str(path))


@pytest.mark.parametrize("exit_on_error", [True, False])
def test_the_reason_is_one_sentence_wherever_it_is_told(
    exit_on_error: bool, directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    incoming = Incoming(FakeMachine(RAM_SIZE, incoming=True), exit_on_error=exit_on_error)
    report = incoming.load(stored(directory, REFUSED))
    assert report == {"status": "failed", "error-desc": REASON}
    told = f"load of migration failed: {REASON}"
    wait_for(lambda: bool(incoming.last_words) == exit_on_error, "the last words")
    assert incoming.last_words == ([told] if exit_on_error else [])
    assert capsys.readouterr().err == ("" if exit_on_error else f"{told}\n")
    assert incoming.machine.runstate is RunState.INMIGRATE


class Picky(FakeMachine):
    """Takes every section but the state of its CPU."""

    def load_device_state(self, loaded: Sequence[tuple[DeviceSection, Any]]) -> None:
        raise MachineError("vCPU 0: XCR0 is 0x0, expected 0x1 at least", section="cpu", instance_id=0)


def test_state_that_the_machine_refuses_is_told_with_its_place(directory: Path) -> None:
    report = Incoming(Picky(RAM_SIZE, incoming=True)).load(stored(directory, small_stream()))
    place, _, rest = report["error-desc"].partition(": ")
    offset = int(place.removeprefix("section 'cpu' instance 0 at offset "), 16)
    assert small_stream()[offset + 5 : offset + 9] == b"\3cpu"
    assert rest.startswith("vCPU 0: XCR0 is 0x0, expected 0x1 at least; both sides need the same -cpu")


class Watched(FakeMachine):
    """Somebody who sees it enter the run state that it arrived in asks how the migration stands."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        super().__init__(RAM_SIZE, incoming=True)
        self._pool = pool
        self.ask: Callable[[], dict[str, Any]] = dict

    def set_runstate(self, state: RunState) -> None:
        super().set_runstate(state)
        self.answer = self._pool.submit(self.ask)
        with pytest.raises(TimeoutError):
            self.answer.result(timeout=0.2)


def test_who_has_seen_the_run_state_is_told_that_the_guest_is_here(directory: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        machine = Watched(pool)
        incoming = Incoming(machine)
        machine.ask = incoming.migration.query
        incoming.load(stored(directory, small_stream()))
        assert machine.answer.result() == {"status": "completed"}


def told_by_socket(*pieces: bytes) -> str:
    """What a destination says of a source that sends these and closes the connection."""

    def feed(port: int) -> None:
        with socket.create_connection(("127.0.0.1", port)) as source:
            for piece in pieces:
                source.sendall(piece)

    report = Incoming(FakeMachine(RAM_SIZE, incoming=True)).load(InetAddress("127.0.0.1", "0"), feed)
    assert report["status"] == "failed"
    return str(report["error-desc"])


def test_a_source_that_leaves_before_any_contents_may_have_wanted_more_channels() -> None:
    start = sections.encode_section_header(
        sections.SectionHeader(sections.SectionType.QEMU_VM_SECTION_START, 1, "ram", 0, 4)
    )
    for stream in (b"", frame(), frame(start)):
        words = told_by_socket(stream)
        assert words.startswith("stream ends inside"), words
        assert words.endswith("has capability 'multifd' on, say 'migrate_set_capability multifd off' there"), words


def test_nothing_is_guessed_when_pages_came_or_the_reason_is_plain() -> None:
    stream = small_stream()
    page = stream.index(b"a page that is not zero") + 4096
    for data in (REFUSED, stream[:page], b"QEVM" + struct.pack(">I", 3) + b"\7\0\0\0\2pc"):
        assert "multifd" not in told_by_socket(data)


MISMATCH = (
    "capability 'multifd' is on at the source and off here, expected the same; "
    "say 'migrate_set_capability multifd off' at the source"
)


@pytest.mark.parametrize("how_far", ["it waits", "it leaves", "it sends a whole guest"])
def test_a_source_with_multifd_is_told_from_one_without(how_far: str, capsys: pytest.CaptureFixture[str]) -> None:
    """However its main channel goes on: pages that were to go by the others are missing."""
    stream = small_stream()

    def feed(port: int) -> None:
        address = ("127.0.0.1", port)
        with socket.create_connection(address) as main, socket.create_connection(address) as channel:
            main.sendall(stream[:-1])
            channel.sendall(encode_init(bytes(16), 0))
            assert not receive_some(channel)  # it is dropped
            main.sendall(stream[-1:] if how_far == "it sends a whole guest" else b"")
            if how_far == "it waits":
                assert not receive_some(main)

    report = Incoming(FakeMachine(RAM_SIZE, incoming=True)).load(InetAddress("127.0.0.1", "0"), feed)
    assert report == {"status": "failed", "error-desc": MISMATCH}
    assert "a connection is dropped: it is a channel of multifd, which is off here" in capsys.readouterr().err


def receive_some(sock: socket.socket) -> bytes:
    """Something, or b"" at the end, however it comes."""
    sock.settimeout(30)
    try:
        return sock.recv(1)
    except ConnectionResetError:
        return b""


STRANGERS = {
    "another guest": small_stream(),
    "a channel of another machine": encode_init(b"\1" * 16, 0),
    "a channel of another version": encode_init(bytes(16), 0)[:7] + b"\2" + bytes(56),
}


@pytest.mark.parametrize("who", STRANGERS)
def test_nobody_else_is_let_in_for_long(who: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second guest is refused then, rather than taken and forgotten; the first one is loaded."""
    monkeypatch.setattr(arrivals, "EXTRA_S", 0.3)
    stream = small_stream()

    def feed(port: int) -> None:
        with socket.create_connection(("127.0.0.1", port)) as main:
            main.sendall(stream[:100])
            with suppress(ConnectionError), socket.create_connection(("127.0.0.1", port)) as other:
                other.sendall(STRANGERS[who])
                assert not receive_some(other)
            wait_for(lambda: is_refused(port), "the end of listening")
            main.sendall(stream[100:])

    incoming = Incoming(FakeMachine(RAM_SIZE, incoming=True))
    assert incoming.load(InetAddress("127.0.0.1", "0"), feed)["status"] == "completed"


def is_refused(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except ConnectionRefusedError:
        return True
    return False
