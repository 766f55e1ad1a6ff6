"""Channels over every transport: both ends, their errors, and that nothing stays behind."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qemumig.channels.address import Address, parse_uri
from qemumig.channels.channel import Channel, QuitEvent
from qemumig.channels.connect import incoming, outgoing
from qemumig.errors import ChannelError, MigrationCancelled
from qemumig.wire.stream import InputStream, OutputStream


def no_fd(name: str) -> int:
    raise ChannelError(f"File descriptor named '{name}' has not been found")


@pytest.fixture
def quit_event() -> Iterator[QuitEvent]:
    before = open_descriptors()
    event = QuitEvent()
    yield event
    event.close()
    assert open_descriptors() == before


def open_descriptors() -> list[str]:
    return sorted(fd for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}"))


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def connect(address: Address, quit_event: QuitEvent) -> Channel:
    return outgoing(address, quit_event.fd, no_fd)()


def talk(source: Channel, destination: Channel) -> None:
    """Bytes get through, and the destination sees the end."""
    data = os.urandom(300000)

    def write() -> None:
        out = OutputStream(source)
        out.write(data)
        out.flush()
        source.close()

    thread = threading.Thread(target=write)
    thread.start()
    stream = InputStream(destination)
    assert stream.read(len(data)) == data
    assert stream.peek(1) == b""
    thread.join()
    destination.close()


@pytest.mark.parametrize("kind", ["tcp", "tcp6", "unix"])
def test_sockets(kind: str, tmp_path: Path, quit_event: QuitEvent) -> None:
    uri = {"tcp": "tcp:127.0.0.1:0", "tcp6": "tcp:[::1]:0", "unix": f"unix:{tmp_path}/s"}[kind]
    listener = incoming(parse_uri(uri), quit_event.fd, no_fd)
    (where,) = listener.socket_addresses()
    if kind == "unix":
        assert where == {"type": "unix", "path": f"{tmp_path}/s"}
        target = uri
    else:
        host = "127.0.0.1" if kind == "tcp" else "[::1]"
        assert where["type"] == "inet" and where["ipv4" if kind == "tcp" else "ipv6"] is True
        target = f"tcp:{host}:{where['port']}"
    source = connect(parse_uri(target), quit_event)
    destination = listener.accept()
    listener.close()
    assert source.can_return and destination.can_return
    talk(source, destination)
    assert not (tmp_path / "s").exists()


def test_exec_and_file_and_fd(tmp_path: Path, quit_event: QuitEvent) -> None:
    out = OutputStream(source := connect(parse_uri(f"exec:cat > {tmp_path}/x"), quit_event))
    out.write(b"through a command")
    out.flush()
    source.close()  # waits for the command: the file is whole
    assert (tmp_path / "x").read_bytes() == b"through a command"
    assert not source.can_return

    command = incoming(parse_uri(f"exec:cat {tmp_path}/x"), quit_event.fd, no_fd).accept()
    assert InputStream(command).read(17) == b"through a command"
    command.close()

    (tmp_path / "f").write_bytes(b"keep" + b"old contents, longer than the new")
    out = OutputStream(source := connect(parse_uri(f"file:{tmp_path}/f,offset=4"), quit_event))
    out.write(b"new")
    out.flush()
    assert source.stored
    source.close()
    assert (tmp_path / "f").read_bytes() == b"keepnew"
    destination = incoming(parse_uri(f"file:{tmp_path}/f,offset=4"), quit_event.fd, no_fd).accept()
    assert InputStream(destination).read(3) == b"new"
    destination.close()

    left, right = socket.socketpair()
    names = {"mig": left.detach()}
    source = outgoing(parse_uri("fd:mig"), quit_event.fd, names.pop)()
    destination = incoming(parse_uri(f"fd:{right.detach()}"), quit_event.fd, no_fd).accept()
    assert source.can_return
    talk(source, destination)


@pytest.mark.parametrize(
    ("uri", "finding"),
    [
        ("tcp:127.0.0.1:{port}", "Failed to connect to '127.0.0.1:{port}': Connection refused"),
        ("unix:{tmp}/none", "Failed to connect to '{tmp}/none': No such file or directory"),
        ("unix:/" + "x" * 200, "AF_UNIX path too long"),
        ("tcp:no.such.host.invalid:1", "address resolution failed for no.such.host.invalid:1"),
        ("tcp:127.0.0.1:no-such-service", "address resolution failed"),
        ("fd:nobody", "File descriptor named 'nobody' has not been found"),
        ("file:{tmp}/none/f", "Could not create '{tmp}/none/f': No such file or directory"),
    ],
)
def test_outgoing_errors(uri: str, finding: str, tmp_path: Path, quit_event: QuitEvent) -> None:
    names = {"tmp": str(tmp_path), "port": str(free_port())}
    with pytest.raises(ChannelError) as caught:
        connect(parse_uri(uri.format(**names)), quit_event)
    assert finding.format(**names) in str(caught.value)


@pytest.mark.parametrize(
    ("uri", "finding"),
    [
        ("unix:{tmp}/none/s", "Failed to bind socket to {tmp}/none/s: No such file or directory"),
        ("unix:{tmp}/precious", "Failed to bind socket to {tmp}/precious: Address already in use"),
        ("tcp:192.0.2.1:1", "Failed to find an available port for 192.0.2.1:1: Cannot assign requested address"),
        ("file:{tmp}/none", "Could not open '{tmp}/none': No such file or directory"),
        ("fd:99999", "File descriptor 99999 is not open"),
    ],
)
def test_incoming_errors(uri: str, finding: str, tmp_path: Path, quit_event: QuitEvent) -> None:
    (tmp_path / "precious").write_text("not a socket")
    with pytest.raises(ChannelError) as caught:
        incoming(parse_uri(uri.format(tmp=tmp_path)), quit_event.fd, no_fd)
    assert finding.format(tmp=tmp_path) in str(caught.value)
    assert (tmp_path / "precious").read_text() == "not a socket"


def test_a_port_range_is_searched(quit_event: QuitEvent) -> None:
    first = incoming(parse_uri("tcp:127.0.0.1:0"), quit_event.fd, no_fd)
    port = int(first.socket_addresses()[0]["port"])
    second = incoming(parse_uri(f"tcp:127.0.0.1:{port},to={port + 20}"), quit_event.fd, no_fd)
    assert port < int(second.socket_addresses()[0]["port"]) <= port + 20
    first.close()
    second.close()


@pytest.mark.parametrize("wait", ["accept", "connect"])
def test_the_quit_event_ends_waiting(wait: str, tmp_path: Path, quit_event: QuitEvent) -> None:
    threading.Timer(0.05, quit_event.set).start()
    if wait == "accept":
        listener = incoming(parse_uri(f"unix:{tmp_path}/s"), quit_event.fd, no_fd)
        with pytest.raises(MigrationCancelled):
            listener.accept()
        listener.close()
        return
    with socket.socket() as full:  # a listener that never accepts and whose queue is full
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        clients = []
        for _ in range(4):
            client = socket.socket()
            client.setblocking(False)
            client.connect_ex(full.getsockname())
            clients.append(client)
        with pytest.raises(MigrationCancelled):
            connect(parse_uri(f"tcp:127.0.0.1:{full.getsockname()[1]}"), quit_event)
        for client in clients:
            client.close()


def test_a_command_that_goes_on_is_ended_with_the_quit_event(quit_event: QuitEvent) -> None:
    channel = connect(parse_uri("exec:sleep 1000 & wait"), quit_event)
    children = subprocess.run(["pgrep", "-P", str(os.getpid())], capture_output=True, text=True, check=True).stdout.split()
    quit_event.set()
    start = time.monotonic()
    channel.close()
    assert time.monotonic() - start < 30
    assert not any(os.path.exists(f"/proc/{child}") for child in children if is_command(child))


def is_command(pid: str) -> bool:
    try:
        return b"sleep" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
