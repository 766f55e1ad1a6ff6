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

from qemumig.channels import sockets
from qemumig.channels.address import Address, UnixAddress, parse_uri
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
        ("unix:/" + "x" * 200, "is too long"),
        ("tcp:no.such.host.invalid:1", "address resolution failed for no.such.host.invalid:1"),
        ("tcp:127.0.0.1:no-such-service", "address resolution failed"),
        ("tcp:localhost:1,numeric", "address resolution failed for localhost:1"),
        ("tcp:localhost:1,ipv4=off,ipv6=off", "Cannot disable IPv4 and IPv6 at same time"),
        ("vsock:a:1", "Failed to parse cid 'a'"),
        ("vsock:1:2:3", "Failed to parse port '2:3'"),
        ("vsock:1:4294967296", "Failed to parse port '4294967296'"),
        ("file:{tmp}/zero\0byte", "embedded null byte"),
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
        ("vsock:-1:1", "Failed to parse cid '-1'"),
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


def test_a_listener_on_every_address_takes_both_families(quit_event: QuitEvent) -> None:
    listener = incoming(parse_uri("tcp::0"), quit_event.fd, no_fd)
    six, four = listener.socket_addresses()
    assert six["host"] == "::" and six["ipv6"] and four["host"] == "0.0.0.0" and four["ipv4"]
    for host, address in (("[::1]", six), ("127.0.0.1", six), ("127.0.0.1", four)):
        source = connect(parse_uri(f"tcp:{host}:{address['port']}"), quit_event)
        talk(source, listener.accept())
    listener.close()


def test_ipv6_alone_leaves_ipv4_to_others(quit_event: QuitEvent) -> None:
    listener = incoming(parse_uri("tcp::0,ipv4=off"), quit_event.fd, no_fd)
    (where,) = listener.socket_addresses()
    assert where["host"] == "::"
    with pytest.raises(ChannelError, match="Connection refused"):
        connect(parse_uri(f"tcp:127.0.0.1:{where['port']}"), quit_event)
    listener.close()


def test_keep_alive_reaches_the_kernel_on_both_ends(quit_event: QuitEvent) -> None:
    words = "keep-alive,keep-alive-count=4,keep-alive-idle=33,keep-alive-interval=7"
    listener = incoming(parse_uri(f"tcp:127.0.0.1:0,{words}"), quit_event.fd, no_fd)
    source = connect(parse_uri(f"tcp:127.0.0.1:{listener.socket_addresses()[0]['port']},{words}"), quit_event)
    destination = listener.accept()
    for channel in (source, destination):
        with socket.socket(fileno=os.dup(channel.read_fd)) as sock:
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            options = (socket.TCP_KEEPCNT, socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL)
            assert [sock.getsockopt(socket.IPPROTO_TCP, option) for option in options] == [4, 33, 7]
        channel.close()
    listener.close()


def test_no_control_of_congestion_paces_what_goes_from_this_host_to_itself(quit_event: QuitEvent) -> None:
    listener = incoming(parse_uri("tcp:127.0.0.1:0"), quit_event.fd, no_fd)
    source = connect(parse_uri(f"tcp:127.0.0.1:{listener.socket_addresses()[0]['port']}"), quit_event)
    destination = listener.accept()
    for channel in (source, destination):
        with socket.socket(fileno=os.dup(channel.read_fd)) as sock:
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0") == b"reno"
        channel.close()
    listener.close()


def test_a_keep_alive_that_the_kernel_refuses_is_named(quit_event: QuitEvent) -> None:
    finding = r"Unable to set keep-alive-count of 127.0.0.1:\d+ to 4000000000: Invalid argument"
    words = "keep-alive,keep-alive-count=4000000000"
    with pytest.raises(ChannelError, match=finding):
        incoming(parse_uri(f"tcp:127.0.0.1:0,{words}"), quit_event.fd, no_fd)
    listener = incoming(parse_uri("tcp:127.0.0.1:0"), quit_event.fd, no_fd)
    with pytest.raises(ChannelError, match=finding):
        connect(parse_uri(f"tcp:127.0.0.1:{listener.socket_addresses()[0]['port']},{words}"), quit_event)
    listener.close()


@pytest.mark.parametrize("tight", [True, False], ids=["tight", "filled-up"])
def test_abstract_unix_sockets(tight: bool, tmp_path: Path, quit_event: QuitEvent) -> None:
    address = UnixAddress(f"qemumig-test-{os.getpid()}", abstract=True, tight=tight)
    listener = incoming(address, quit_event.fd, no_fd)
    assert listener.socket_addresses() == [{"type": "unix", "path": address.path, "abstract": True}]
    if not tight:
        with pytest.raises(ChannelError, match="Connection refused"):
            connect(UnixAddress(address.path, abstract=True), quit_event)
    source = connect(address, quit_event)
    talk(source, listener.accept())
    listener.close()


def test_a_full_unix_listener_is_waited_for(tmp_path: Path, quit_event: QuitEvent, monkeypatch: pytest.MonkeyPatch) -> None:
    paused = threading.Event()
    pause = sockets.pause

    def pause_and_tell(duration_ms: int, quit_fd: int) -> None:
        paused.set()
        pause(duration_ms, quit_fd)

    monkeypatch.setattr(sockets, "pause", pause_and_tell)
    with socket.socket(socket.AF_UNIX) as full:
        full.bind(f"{tmp_path}/s")
        full.listen(0)
        ends: list[Channel | socket.socket] = [connect(parse_uri(f"unix:{tmp_path}/s"), quit_event)]

        def take() -> None:
            paused.wait()
            ends.extend(full.accept()[0] for _ in range(2))

        thread = threading.Thread(target=take)
        thread.start()
        ends.append(connect(parse_uri(f"unix:{tmp_path}/s"), quit_event))
        thread.join()
        for end in ends:
            end.close()


def test_a_listening_descriptor_takes_connections(quit_event: QuitEvent) -> None:
    passed = socket.create_server(("127.0.0.1", 0))
    port = passed.getsockname()[1]
    names = {"mig": passed.detach()}
    listener = incoming(parse_uri("fd:mig"), quit_event.fd, names.pop)
    assert listener.socket_addresses() == [{"type": "inet", "host": "127.0.0.1", "port": str(port), "ipv4": True}]
    source = connect(parse_uri(f"tcp:127.0.0.1:{port}"), quit_event)
    talk(source, listener.accept())
    listener.close()


@pytest.mark.parametrize(("there", "is_cut"), [(None, False), (b"keep", False), (b"keep and more", True), (b"ke", True)])
def test_only_a_file_of_another_length_is_cut(
    there: bytes | None, is_cut: bool, tmp_path: Path, quit_event: QuitEvent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ext4 writes a file that was cut to the disk when it is closed, which whoever loads it then has to wait for."""
    if there is not None:
        (tmp_path / "f").write_bytes(there)
    cuts: list[int] = []
    cut = os.ftruncate
    monkeypatch.setattr(os, "ftruncate", lambda fd, length: cuts.append(length) or cut(fd, length))
    offset = "" if there is None else ",offset=4"
    connect(parse_uri(f"file:{tmp_path}/f{offset}"), quit_event).close()
    assert cuts == ([4] if is_cut else [])
    assert (tmp_path / "f").stat().st_size == (0 if there is None else 4)


def test_a_plain_file_by_descriptor(tmp_path: Path, quit_event: QuitEvent) -> None:
    """It is written from where it stands, and read from where it stands."""
    path = tmp_path / "f"
    path.write_bytes(b"before")
    fd = os.open(path, os.O_RDWR | os.O_APPEND)
    channel = outgoing(parse_uri("fd:f"), quit_event.fd, {"f": fd}.pop)()
    out = OutputStream(channel)
    out.write(b" and after")
    out.flush()
    assert not channel.can_return
    channel.close()
    assert path.read_bytes() == b"before and after"
    fd = os.open(path, os.O_RDONLY)
    os.lseek(fd, 7, os.SEEK_SET)
    destination = incoming(parse_uri("fd:f"), quit_event.fd, {"f": fd}.pop).accept()
    assert InputStream(destination).read(9) == b"and after"
    destination.close()


def test_a_path_may_mean_a_descriptor_that_somebody_keeps(tmp_path: Path, quit_event: QuitEvent) -> None:
    (tmp_path / "kept").write_bytes(b"keep old old old")
    asked: list[tuple[str, int]] = []

    def open_path(path: str, flags: int) -> int | None:
        asked.append((path, flags & os.O_ACCMODE))
        return os.open(tmp_path / "kept", os.O_RDWR) if path == "/dev/fdset/7" else None

    address = parse_uri("file:/dev/fdset/7,offset=5")
    channel = outgoing(address, quit_event.fd, no_fd, open_path=open_path)()
    out = OutputStream(channel)
    out.write(b"new")
    out.flush()
    channel.close()
    assert (tmp_path / "kept").read_bytes() == b"keep new"
    destination = incoming(address, quit_event.fd, no_fd, open_path=open_path).accept()
    assert InputStream(destination).read(3) == b"new"
    destination.close()
    assert asked == [("/dev/fdset/7", os.O_WRONLY), ("/dev/fdset/7", os.O_RDONLY)]


def test_vsock_between_a_host_and_itself(quit_event: QuitEvent) -> None:
    if reason := missing_vsock_loopback():
        pytest.skip(reason)
    listener = incoming(parse_uri(f"vsock:{socket.VMADDR_CID_ANY}:0"), quit_event.fd, no_fd)
    (where,) = listener.socket_addresses()
    source = connect(parse_uri(f"vsock:1:{where['port']}"), quit_event)
    talk(source, listener.accept())
    listener.close()


def missing_vsock_loopback() -> str:
    """ "" when this host's kernel lets it talk to itself over vsock, else what is missing."""
    try:
        with socket.socket(socket.AF_VSOCK) as server, socket.socket(socket.AF_VSOCK) as client:
            server.bind((socket.VMADDR_CID_ANY, socket.VMADDR_PORT_ANY))
            server.listen()
            client.connect((1, server.getsockname()[1]))
    except OSError as error:
        return f"no vsock loopback ({error.strerror}); `modprobe vsock_loopback` brings it where the kernel has it"
    return ""


def test_vsock_listens_and_says_where(quit_event: QuitEvent) -> None:
    try:
        socket.socket(socket.AF_VSOCK).close()
    except OSError as error:
        pytest.skip(f"no vsock sockets ({error.strerror}); a kernel with them is needed")
    listener = incoming(parse_uri(f"vsock:{socket.VMADDR_CID_ANY}:0"), quit_event.fd, no_fd)
    (where,) = listener.socket_addresses()
    assert where["type"] == "vsock" and where["cid"] == str(socket.VMADDR_CID_ANY) and int(where["port"]) > 0
    listener.close()
    with pytest.raises(ChannelError, match=r"Failed to bind socket to vsock:77:1: "):
        incoming(parse_uri("vsock:77:1"), quit_event.fd, no_fd)


def test_the_quit_event_ends_the_wait_for_a_name_server(monkeypatch: pytest.MonkeyPatch, quit_event: QuitEvent) -> None:
    asked, answer = threading.Event(), threading.Event()
    real = socket.getaddrinfo

    def hanging(host: bytes, *arguments: object) -> object:
        if host != b"slow.test":
            return real(host, *arguments)  # type: ignore[arg-type]
        if arguments[-1] == socket.AI_NUMERICHOST:
            raise socket.gaierror(socket.EAI_NONAME, "not a number")
        asked.set()
        answer.wait()
        return []

    monkeypatch.setattr(socket, "getaddrinfo", hanging)
    canceller = threading.Thread(target=lambda: (asked.wait(), quit_event.set()))
    canceller.start()
    with pytest.raises(MigrationCancelled):
        connect(parse_uri("tcp:slow.test:1"), quit_event)
    canceller.join()
    answer.set()


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
