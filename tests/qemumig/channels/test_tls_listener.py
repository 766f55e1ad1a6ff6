"""TLS at a listener: what a hostile peer costs, and that every wait can be ended."""

from __future__ import annotations

import os
import select
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from qemumig.channels import tls
from qemumig.channels.address import UnixAddress
from qemumig.channels.channel import QuitEvent, SocketChannel
from qemumig.channels.connect import SocketListener, incoming, outgoing, tls_of_destination
from qemumig.channels.tls import TlsChannel, TlsClient, TlsServer
from qemumig.errors import ChannelError, MigrationCancelled, OptionError
from qemumig.wire.stream import InputStream

from .tls_ends import MIB, Parameters, attempt, certificates, in_thread, pair, send, x509

PATIENCE_S = 20.0


@dataclass
class Door:
    """A listener with TLS, and how to come to it."""

    listener: SocketListener
    path: str
    client: TlsClient
    quit_event: QuitEvent

    def knock(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(self.path)
        return sock

    def come(self) -> Callable[[], TlsChannel]:
        """An honest source: it says QEVM when it is in."""
        address, fd = UnixAddress(self.path), self.quit_event.fd

        def run() -> Any:
            channel = outgoing(address, fd, lambda name: -1, tls=lambda: self.client)()
            send(channel, b"QEVM")
            return channel

        return in_thread(run)


@pytest.fixture
def door(tmp_path: Path, quit_event: QuitEvent) -> Iterator[Door]:
    client, server = certificates(tmp_path)
    listener = incoming(UnixAddress(f"{tmp_path}/s"), quit_event.fd, lambda name: -1, tls=lambda: server)
    assert isinstance(listener, SocketListener)
    too_long = threading.Timer(PATIENCE_S, quit_event.set)  # a guest who is not let in is a failure, not a wait for ever
    too_long.start()
    yield Door(listener, f"{tmp_path}/s", client, quit_event)
    too_long.cancel()
    too_long.join()
    listener.close()


def let_in(door: Door, source: Callable[[], TlsChannel]) -> None:
    channel = door.listener.accept()
    assert InputStream(channel).read(4) == b"QEVM"
    source().close()
    channel.close()


HOSTILE: dict[str, Callable[[socket.socket], None]] = {
    "silent": lambda sock: None,
    "noise": lambda sock: sock.sendall(os.urandom(5000)),
    "plain": lambda sock: sock.sendall(b"QEVM\0\0\0\3" + bytes(100)),
    "half": lambda sock: sock.sendall(b"\x16\x03\x01\x02\x00\x01\x00"),
    "huge": lambda sock: sock.sendall(b"\x16\x03\x01\xff\xff" + bytes(65535)),
    "gone": lambda sock: sock.close(),
    "deaf": lambda sock: sock.shutdown(socket.SHUT_RD),
}


@pytest.mark.parametrize("behaviour", HOSTILE)
def test_a_hostile_peer_costs_its_own_connection_only(behaviour: str, door: Door) -> None:
    waiting = in_thread(door.listener.accept)
    hostile = door.knock()
    HOSTILE[behaviour](hostile)
    source = door.come()
    channel = waiting()
    assert InputStream(channel).read(4) == b"QEVM"
    source().close()
    channel.close()
    hostile.close()


def test_who_need_not_speak_may_have_come_before_that_was_known(door: Door) -> None:
    """As the channel of urgent pages does, when it is opened right behind the main one."""
    address, fd = UnixAddress(door.path), door.quit_event.fd
    silent = in_thread(outgoing(address, fd, lambda name: -1, tls=lambda: door.client))
    waiting = in_thread(door.listener.accept)
    opened = silent()  # its handshake was done by who waits for the other
    source = door.come()
    main = waiting()
    assert InputStream(main).read(4) == b"QEVM"
    second = door.listener.accept(speaks=False)
    for channel in (main, second, source(), opened):
        channel.close()


def test_a_peer_that_leaves_after_its_handshake_is_not_the_source(door: Door, capfd: pytest.CaptureFixture[str]) -> None:
    waiting = in_thread(door.listener.accept)
    scout = door.client.wrap(SocketChannel("scout", door.knock(), door.quit_event.fd))
    scout.close()
    source = door.come()
    channel = waiting()
    assert InputStream(channel).read(4) == b"QEVM"
    source().close()
    channel.close()
    assert "the peer ended the connection before it had sent anything" in capfd.readouterr().err


def test_many_peers_that_hang_do_not_keep_the_source_out(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls, "MOST_HANDSHAKES", 4)
    waiting = in_thread(door.listener.accept)
    hanging = []
    for _ in range(20):
        address = UnixAddress(door.path)
        hanging.append(outgoing(address, door.quit_event.fd, lambda name: -1)())
    source = door.come()
    channel = waiting()
    assert InputStream(channel).read(4) == b"QEVM"
    assert sum(select.select([end.read_fd], [], [], 0)[0] != [] for end in hanging) >= 16, "the oldest were dropped"
    source().close()
    channel.close()
    for end in hanging:
        end.close()


def test_two_who_are_ready_at_once_are_both_let_in(door: Door) -> None:
    sources = [door.come(), door.come()]
    for _ in sources:
        channel = door.listener.accept()
        assert InputStream(channel).read(4) == b"QEVM"
        channel.close()
    for source in sources:
        source().close()


def test_wrong_parameters_are_found_out_with_the_first_connection(tmp_path: Path, quit_event: QuitEvent) -> None:
    def ask() -> TlsServer | None:
        return tls_of_destination(Parameters("creds"), {}.get)

    listener = incoming(UnixAddress(f"{tmp_path}/s"), quit_event.fd, lambda name: -1, tls=ask)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(f"{tmp_path}/s")
        with pytest.raises(OptionError, match="No TLS credentials"):
            listener.accept()
        assert client.recv(1) == b""
    listener.close()


# ---- waits that are ended ----


def full_socket(channel: TlsChannel) -> None:
    """Write until nothing goes any more, and on: waits for the peer to read."""
    send(channel, bytes(64 * MIB))


@pytest.mark.parametrize("how", ["cancel", "yank"])
@pytest.mark.parametrize("where", ["write", "read"])
def test_a_hung_stream_is_ended(how: str, where: str, tmp_path: Path, quit_event: QuitEvent) -> None:
    source, destination = pair(tmp_path, quit_event)
    action = (lambda: full_socket(source)) if where == "write" else (lambda: InputStream(source).read(1))

    def act() -> Exception | None:
        try:
            action()
        except Exception as error:
            return error
        return None

    waiting = in_thread(act)
    if where == "write":
        select.select([destination.read_fd], [], [])
    (quit_event.set if how == "cancel" else source.shutdown)()
    assert isinstance(waiting(), MigrationCancelled if how == "cancel" else ChannelError)
    source.close()
    destination.close()


@pytest.mark.parametrize("side", ["client", "server", "listener"])
def test_a_hung_handshake_is_cancelled(side: str, door: Door, tmp_path: Path, quit_event: QuitEvent) -> None:
    left, right = socket.socketpair()
    channel = SocketChannel("left", left, quit_event.fd)
    server = TlsServer(x509(tmp_path / "x509", "server"), None)
    actions: dict[str, Callable[[], Any]] = {
        "client": lambda: attempt(door.client.wrap, channel),
        "server": lambda: attempt(server.wrap, channel),
        "listener": lambda: attempt(lambda _: door.listener.accept(), channel),  # type: ignore[arg-type,return-value]
    }
    knocking = door.knock()
    waiting = in_thread(actions[side])
    if side == "client":
        select.select([right], [], [])  # its first message is there
    quit_event.set()
    assert isinstance(waiting(), MigrationCancelled)
    for sock in (knocking, right, left):
        sock.close()


def test_a_close_that_finds_the_way_blocked_does_not_hang(tmp_path: Path, quit_event: QuitEvent) -> None:
    source, destination = pair(tmp_path, quit_event)
    os.set_blocking(source.write_fd, False)
    waiting = in_thread(lambda: attempt(lambda _: full_socket(source), source))  # type: ignore[arg-type,return-value]
    select.select([destination.read_fd], [], [])
    quit_event.set()
    waiting()
    source.close()
    destination.close()
