"""The QMP client against a server that says what the test wants."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator

import pytest

from qemumig.cli.qmp import QmpClient, QmpEnded, QmpError

GREETING = b'{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": "x"}, "capabilities": []}}\r\n'
Connected = tuple[QmpClient, socket.socket]


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    yield ours, theirs
    ours.close()
    theirs.close()


@pytest.fixture
def connect(pair: tuple[socket.socket, socket.socket]) -> Callable[..., Connected]:
    """Connect a client; *answers* lie ready before it asks, which QMP cannot tell from later ones."""

    def connected(*answers: bytes, timeout: float = 5) -> Connected:
        ours, theirs = pair
        theirs.sendall(GREETING + b'{"return": {}}\r\n' + b"".join(answers))
        return QmpClient("vmm", ours, timeout), theirs

    return connected


def test_client_negotiates_and_knows_the_version(connect: Callable[..., Connected]) -> None:
    client, server = connect()
    assert json.loads(server.recv(100)) == {"execute": "qmp_capabilities"}
    assert client.version == "10.0.2 (x)"


def test_command_gives_the_result_and_keeps_events_in_order(connect: Callable[..., Connected]) -> None:
    client, server = connect(b'{"event": "STOP"}\r\n{"event": "RESUME"}\r\n{"return": [1]}\r\n')
    assert client.command("query-x", a_b=1) == [1]
    assert b'{"execute": "query-x", "arguments": {"a-b": 1}}' in server.recv(1000)
    assert [event["event"] for event in client.events] == ["STOP", "RESUME"]


def test_waiting_takes_the_event_with_the_wanted_data(connect: Callable[..., Connected]) -> None:
    client, _ = connect(
        b'{"event": "MIGRATION", "data": {"status": "setup"}}\r\n{"event": "MIGRATION", "data": {"status": "active"}}\r\n'
    )
    assert client.wait_event("MIGRATION", 5, status="active")["data"] == {"status": "active"}
    assert [event["data"]["status"] for event in client.events] == ["setup"]


def test_refused_command_raises_the_description(connect: Callable[..., Connected]) -> None:
    client, _ = connect(b'{"error": {"class": "GenericError", "desc": "no such thing"}}\r\n')
    with pytest.raises(QmpError, match="vmm refuses query-x: no such thing") as refusal:
        client.command("query-x")
    assert not isinstance(refusal.value, QmpEnded)


@pytest.mark.parametrize(
    ("answer", "what"),
    [(b"garbage\r\n", "sent no JSON instead of the answer to stop"), (b"[1]\r\n", r"sent b'\[1\]\\r' instead of")],
)
def test_nonsense_is_refused(connect: Callable[..., Connected], answer: bytes, what: str) -> None:
    client, _ = connect(answer)
    with pytest.raises(QmpError, match=what):
        client.command("stop")


def test_closed_monitor_raises(connect: Callable[..., Connected]) -> None:
    client, server = connect()
    server.shutdown(socket.SHUT_WR)
    with pytest.raises(QmpEnded, match="closed while waiting for the answer to stop"):
        client.command("stop")


def test_silent_monitor_is_waited_for_no_longer_than_the_timeout(connect: Callable[..., Connected]) -> None:
    client, _ = connect()
    client.timeout = 0.05
    with pytest.raises(QmpError, match="waited in vain for the answer to stop"):
        client.command("stop")
