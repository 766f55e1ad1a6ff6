"""Whole migrations over every kind of channel, between machines without KVM."""

from __future__ import annotations

import os
import re
import select
import socket
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qemumig.channels.address import Address, FdAddress, FileAddress, parse_channels, parse_uri
from qemumig.destination.incoming import IncomingMigration
from qemumig.options import MigrationOptions
from qemumig.qapi import MigrationStatus, RunState
from qemumig.source.migration import Migration
from tests.support.fake_machine import FakeMachine
from tests.support.pair import wait_for

pytestmark = pytest.mark.usefixtures("no_leaks")

BRIDGE = """
import os, socket
sock = socket.socket(socket.AF_UNIX)
sock.connect({path!r})
while data := os.read(0, 65536):
    sock.sendall(data)
"""


class Ends:
    """Two machines and their migrations, with options *here* and *there*.

    Descriptors that are passed wait in `fds`, objects in `objects`, sets of descriptors in `paths`.
    """

    def __init__(self, ram: int = 4 << 20) -> None:
        self.source, self.destination = FakeMachine(ram, guest=True), FakeMachine(ram, guest=True, incoming=True)
        for offset in range(0, ram, 1 << 20):
            self.source.write(self.source.ram, offset, os.urandom(1 << 19))
        self.fds: dict[str, int] = {}
        self.objects: dict[str, Any] = {}
        self.paths: dict[str, int] = {}
        self.here, self.there = MigrationOptions(), MigrationOptions()
        self.here.set_parameters({"max-bandwidth": 0})
        finders: dict[str, Any] = {"find_object": self.objects.get, "open_path": self._open_path}
        self.outgoing = Migration(self.source, self.here, emit=lambda name, data: None, take_fd=self.fds.pop, **finders)
        self.incoming = IncomingMigration(
            self.destination,
            self.there,
            emit=lambda name, data: None,
            take_fd=self.fds.pop,
            autostart=False,
            **finders,
        )

    def _open_path(self, path: str, flags: int) -> int | None:
        return self.paths.pop(path, None)

    def listen(self, address: Address) -> list[dict[str, Any]]:
        """Where the destination listens."""
        self.incoming.listen(address, exit_on_error=False)
        return list(self.incoming.query().get("socket-address", []))

    def send(self, address: Address) -> None:
        self.outgoing.start(address)
        wait_for(lambda: not self.outgoing.is_running, "the source to end")
        assert self.outgoing.status is MigrationStatus.COMPLETED, self.outgoing.query()

    def assert_arrived(self) -> None:
        ends = (MigrationStatus.COMPLETED, MigrationStatus.FAILED)
        wait_for(lambda: self.incoming.status in ends, "the destination to end")
        assert self.incoming.query() == {"status": "completed"}
        assert self.destination.runstate is RunState.PRELAUNCH
        for here, there in zip(self.source.ram_blocks, self.destination.ram_blocks, strict=True):
            assert self.source.read(here, 0, here.used_length) == self.destination.read(there, 0, there.used_length)

    def close(self) -> None:
        self.outgoing.close()
        self.incoming.close()
        self.source.close()
        self.destination.close()


@pytest.fixture
def ends() -> Iterator[Ends]:
    ends = Ends()
    yield ends
    ends.close()


def json(**addr: Any) -> Address:
    return parse_channels([{"channel-type": "main", "addr": addr}], incoming=False)


@pytest.mark.parametrize(
    ("there", "here"),
    [
        ("tcp:127.0.0.1:0", "tcp:127.0.0.1:{port}"),
        ("tcp:[::1]:0", "tcp:[::1]:{port}"),
        ("tcp::0", "tcp:localhost:{port},ipv4"),
        ("tcp:127.0.0.1:0,keep-alive=on", "tcp:127.0.0.1:{port},keep-alive=on"),
        ("unix:{tmp}/s", "unix:{tmp}/s"),
    ],
)
def test_sockets_by_uri(there: str, here: str, ends: Ends, tmp_path: Path) -> None:
    where = ends.listen(parse_uri(there.format(tmp=tmp_path)))
    ends.send(parse_uri(here.format(tmp=tmp_path, port=where[0].get("port"))))
    ends.assert_arrived()


@pytest.mark.parametrize("family", ["inet", "unix", "abstract"])
def test_sockets_by_json(family: str, ends: Ends, tmp_path: Path) -> None:
    addr: dict[str, Any] = {"transport": "socket", "type": "unix", "path": f"{tmp_path}/s"}
    if family == "inet":
        addr = {"transport": "socket", "type": "inet", "host": "127.0.0.1", "port": "0"}
    elif family == "abstract":
        addr |= {"path": f"qemumig-test-{os.getpid()}", "abstract": True}
    (where,) = ends.listen(json(**addr))
    ends.send(json(**addr | ({"port": where["port"]} if family == "inet" else {})))
    ends.assert_arrived()


def test_the_next_port_of_a_range(ends: Ends) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        (where,) = ends.listen(parse_uri(f"tcp:127.0.0.1:{port},to={min(port + 50, 65535)}"))
    assert int(where["port"]) > port
    ends.send(parse_uri(f"tcp:127.0.0.1:{where['port']}"))
    ends.assert_arrived()


@pytest.mark.parametrize("listening", [True, False], ids=["listening", "connected"])
def test_descriptors(listening: bool, ends: Ends) -> None:
    if listening:
        server = socket.create_server(("127.0.0.1", 0))
        client = socket.create_connection(server.getsockname())
        ends.fds |= {"there": server.detach(), "here": client.detach()}
    else:
        left, right = socket.socketpair()
        ends.fds |= {"there": left.detach(), "here": right.detach()}
    ends.listen(FdAddress("there"))
    ends.send(json(transport="socket", type="fd", str="here"))
    ends.assert_arrived()


def test_a_plain_file_by_descriptor(ends: Ends, tmp_path: Path) -> None:
    path = tmp_path / "stream"
    ends.fds["here"] = os.open(path, os.O_WRONLY | os.O_CREAT)
    ends.send(FdAddress("here"))
    ends.fds["there"] = os.open(path, os.O_RDONLY)
    ends.listen(FdAddress("there"))
    ends.assert_arrived()


def test_a_file_from_an_offset_on(ends: Ends, tmp_path: Path) -> None:
    path = tmp_path / "stream"
    path.write_bytes(b"a header of somebody else's")
    ends.send(parse_uri(f"file:{path},offset=0x1000"))
    assert path.read_bytes().startswith(b"a header of somebody else's\0")
    ends.listen(FileAddress(str(path), 0x1000))
    ends.assert_arrived()


def test_a_file_out_of_a_set_of_descriptors(ends: Ends, tmp_path: Path) -> None:
    path = tmp_path / "stream"
    ends.paths["/dev/fdset/1"] = os.open(path, os.O_WRONLY | os.O_CREAT)
    ends.send(parse_uri("file:/dev/fdset/1,offset=4096"))
    ends.paths["/dev/fdset/2"] = os.open(path, os.O_RDONLY)
    ends.listen(FileAddress("/dev/fdset/2", 4096))
    ends.assert_arrived()


def test_commands_with_and_without_a_shell(ends: Ends, tmp_path: Path) -> None:
    ends.send(parse_uri(f"exec:cat >{tmp_path}/stream"))
    ends.listen(json(transport="exec", args=["/bin/cat", f"{tmp_path}/stream"]))
    ends.assert_arrived()


def test_a_command_that_speaks_to_a_listener(ends: Ends, tmp_path: Path) -> None:
    ends.listen(parse_uri(f"unix:{tmp_path}/s"))
    ends.send(json(transport="exec", args=[sys.executable, "-c", BRIDGE.format(path=f"{tmp_path}/s")]))
    ends.assert_arrived()


def cancel(ends: Ends) -> None:
    ends.outgoing.cancel()
    wait_for(lambda: not ends.outgoing.is_running, "the cancel")
    assert ends.outgoing.status is MigrationStatus.CANCELLED


def test_a_connect_that_hangs_is_cancelled(ends: Ends) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        clients = [socket.socket() for _ in range(4)]
        for client in clients:
            client.setblocking(False)
            client.connect_ex(server.getsockname())
        ends.outgoing.start(parse_uri(f"tcp:127.0.0.1:{server.getsockname()[1]}"))
        assert ends.outgoing.status is MigrationStatus.SETUP
        cancel(ends)
        for client in clients:
            client.close()


@pytest.mark.parametrize("how", ["cancel", "reset"])
def test_a_stream_that_nobody_reads_is_ended(how: str, no_leaks: None) -> None:
    ends = Ends(ram=64 << 20)
    with socket.create_server(("127.0.0.1", 0)) as server:
        ends.outgoing.start(parse_uri(f"tcp:127.0.0.1:{server.getsockname()[1]}"))
        peer, _ = server.accept()
    select.select([peer], [], [])
    if how == "cancel":
        cancel(ends)
    else:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        peer.close()
        wait_for(lambda: not ends.outgoing.is_running, "the source to end")
        reason = ends.outgoing.query()["error-desc"]
        assert re.search("socket: (Connection reset by peer|Broken pipe)", reason), reason
    peer.close()
    ends.close()
