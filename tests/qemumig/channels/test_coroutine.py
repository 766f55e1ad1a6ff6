"""Channels for coroutines: which loop watches, moving between loops in mid-stream, and one waiter a direction."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from qemumig.channels.channel import Channel, QuitEvent, SocketChannel, channel_from_fd
from qemumig.channels.coroutine import READ, WRITE, CoroutineChannel, Direction
from qemumig.channels.tls import TlsClient, TlsServer
from qemumig.errors import ChannelError, StreamError

from .pki import make, x509_directory

PATIENCE_S = 20
MIB = 1 << 20


class Watched(asyncio.SelectorEventLoop):
    """A loop in a thread of its own that remembers which descriptors it was asked to watch, and for what."""

    def __init__(self) -> None:
        super().__init__()
        self.watched: list[tuple[int, str]] = []
        self.thread = threading.Thread(target=self.run_forever)
        self.thread.start()

    def add_reader(self, fd: Any, callback: Callable[..., Any], *args: Any) -> None:
        assert threading.current_thread() is self.thread
        self.watched.append((fd, "read"))
        super().add_reader(fd, callback, *args)

    def add_writer(self, fd: Any, callback: Callable[..., Any], *args: Any) -> None:
        assert threading.current_thread() is self.thread
        self.watched.append((fd, "write"))
        super().add_writer(fd, callback, *args)

    def begin(self, coroutine: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(coroutine, self)

    def do(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return self.begin(coroutine).result(PATIENCE_S)

    def end(self) -> None:
        self.call_soon_threadsafe(self.stop)
        self.thread.join()
        assert self._selector.get_map() is not None and len(self._selector.get_map()) == 1, "only its own wake-up pipe"
        self.close()


@pytest.fixture
def loops(no_leaks: None) -> Iterator[list[Watched]]:
    """Three loops; the first serves the I/O handlers."""
    loops = [Watched() for _ in range(3)]
    yield loops
    for loop in loops:
        loop.end()


Ends = tuple[CoroutineChannel, socket.socket]


@pytest.fixture
def ends(loops: list[Watched], quit_event: QuitEvent) -> Iterator[Ends]:
    """A channel that follows its coroutines, and the other end."""
    near, far = socket.socketpair()
    channel = CoroutineChannel(SocketChannel("near", near, quit_event.fd), loops[0], follow_coroutine=True)
    yield channel, far
    channel.close()
    far.close()


def is_waiting(loop: Watched, channel: CoroutineChannel, direction: Direction) -> None:
    """Return once a coroutine waits in *direction*; every turn of the loop that it lives on is asked."""

    async def ask() -> bool:
        return channel.readiness.is_waiting(direction)

    while not loop.do(ask()):
        pass


def test_a_reader_on_one_loop_and_a_writer_on_another(loops: list[Watched], ends: Ends) -> None:
    """Both wait at once, each watched by its own loop and by no other, while megabytes go both ways."""
    channel, far = ends
    incoming, outgoing = os.urandom(2 * MIB), os.urandom(3 * MIB)
    reading = loops[1].begin(channel.read(len(incoming)))
    writing = loops[2].begin(channel.write(outgoing))
    is_waiting(loops[1], channel, READ)
    is_waiting(loops[2], channel, WRITE)
    sending = threading.Thread(target=far.sendall, args=(incoming,))
    sending.start()
    got = bytearray()
    while len(got) < len(outgoing):
        got += far.recv(65536)
    sending.join()
    assert bytes(got) == outgoing
    assert reading.result(PATIENCE_S) == incoming
    writing.result(PATIENCE_S)
    fd = channel.channel.read_fd
    assert set(loops[1].watched) == {(fd, "read")}
    assert set(loops[2].watched) == {(fd, "write")}
    assert loops[0].watched == []


def test_both_directions_on_the_same_loop_leave_each_other_alone(loops: list[Watched], ends: Ends) -> None:
    channel, far = ends
    reading = loops[1].begin(channel.read(4))
    is_waiting(loops[1], channel, READ)
    writing = loops[1].begin(channel.write(bytes(4 * MIB)))
    is_waiting(loops[1], channel, WRITE)
    far.sendall(b"ping")
    assert reading.result(PATIENCE_S) == b"ping"
    assert channel.readiness.is_waiting(WRITE)
    again = loops[1].begin(channel.read(4))
    left = 4 * MIB
    while left:
        left -= len(far.recv(min(left, MIB)))
    writing.result(PATIENCE_S)
    far.sendall(b"pong")
    assert again.result(PATIENCE_S) == b"pong"


def test_a_coroutine_moves_to_another_loop_in_mid_stream(loops: list[Watched], ends: Ends) -> None:
    """Each wait follows: nothing is attached or detached in between, and no byte is lost or doubled."""
    channel, far = ends
    message = os.urandom(6000)
    got = b""
    for turn in range(6):
        loop = loops[1 + turn % 2]
        reading = loop.begin(channel.read(1000))
        is_waiting(loop, channel, READ)
        far.sendall(message[turn * 1000 : (turn + 1) * 1000])
        got += reading.result(PATIENCE_S)
    assert got == message
    fd = channel.channel.read_fd
    assert loops[1].watched == loops[2].watched == [(fd, "read")] * 3
    assert loops[0].watched == []


async def read_here_and_there(channel: CoroutineChannel, other: Watched) -> tuple[bytes, bytes]:
    """One coroutine: its second read happens on *other*, with the first still on its stack."""
    first = await channel.read(5)
    second = await asyncio.wrap_future(other.begin(channel.read(5)))
    return first, second


def test_a_read_on_behalf_of_a_coroutine_elsewhere(loops: list[Watched], ends: Ends) -> None:
    channel, far = ends
    reading = loops[1].begin(read_here_and_there(channel, loops[2]))
    is_waiting(loops[1], channel, READ)
    far.sendall(b"first")
    while not loops[2].watched:
        loops[2].do(asyncio.sleep(0))
    far.sendall(b"other")
    assert reading.result(PATIENCE_S) == (b"first", b"other")
    assert len(loops[1].watched) == len(loops[2].watched) == 1


def test_by_default_the_io_handler_loop_watches(loops: list[Watched], ends: Ends) -> None:
    """Wherever the coroutine lives; it goes on where it was."""
    channel, far = ends
    channel.follow_coroutine = False

    async def read() -> tuple[bytes, bool]:
        data = await channel.read(5)
        return data, asyncio.get_running_loop() is loops[1]

    reading = loops[1].begin(read())
    writing = loops[2].begin(channel.write(bytes(2 * MIB)))
    is_waiting(loops[1], channel, READ)
    is_waiting(loops[2], channel, WRITE)
    far.sendall(b"hello")
    assert reading.result(PATIENCE_S) == (b"hello", True)
    left = 2 * MIB
    while left:
        left -= len(far.recv(min(left, MIB)))
    writing.result(PATIENCE_S)
    fd = channel.channel.read_fd
    assert loops[1].watched == loops[2].watched == []
    assert set(loops[0].watched) == {(fd, "read"), (fd, "write")}
    in_its_own = loops[0].begin(channel.read(3))
    is_waiting(loops[0], channel, READ)
    far.sendall(b"too")
    assert in_its_own.result(PATIENCE_S) == b"too"


def test_the_flag_counts_at_each_wait(loops: list[Watched], ends: Ends) -> None:
    channel, far = ends
    for follow in (False, True, False):
        channel.follow_coroutine = follow
        reading = loops[1].begin(channel.read(1))
        is_waiting(loops[1], channel, READ)
        far.sendall(b"x")
        assert reading.result(PATIENCE_S) == b"x"
    assert (len(loops[0].watched), len(loops[1].watched)) == (2, 1)


@pytest.mark.parametrize("follow", [True, False], ids=["follows", "default"])
def test_a_reader_can_be_woken_early(follow: bool, loops: list[Watched], ends: Ends) -> None:
    channel, far = ends
    channel.follow_coroutine = follow
    waiting = loops[1].begin(channel.readiness.wait(READ))
    is_waiting(loops[1], channel, READ)
    assert channel.wake_reader()  # from a thread without a loop
    waiting.result(PATIENCE_S)
    assert not channel.wake_reader()
    reading = loops[2].begin(channel.read(3))
    is_waiting(loops[2], channel, READ)
    assert channel.wake_reader()
    is_waiting(loops[2], channel, READ)  # it saw that nothing is there, and waits again
    far.sendall(b"now")
    assert reading.result(PATIENCE_S) == b"now"


@pytest.mark.parametrize("follow", [True, False], ids=["follows", "default"])
def test_many_wakes_from_everywhere_lose_nothing(follow: bool, loops: list[Watched], ends: Ends) -> None:
    """Readers on two loops by turns, while a third thread wakes whoever waits."""
    channel, far = ends
    channel.follow_coroutine = follow
    over = threading.Event()

    def wake() -> None:
        while not over.is_set():
            channel.wake_reader()

    waker = threading.Thread(target=wake)
    waker.start()
    message = os.urandom(100)
    got = b""
    for turn in range(100):
        reading = loops[1 + turn % 2].begin(channel.read(1))
        far.sendall(message[turn : turn + 1])
        got += reading.result(PATIENCE_S)
    over.set()
    waker.join()
    assert got == message


@pytest.mark.parametrize("direction", [READ, WRITE], ids=["read", "write"])
def test_a_second_waiter_is_a_mistake_that_is_told(direction: Direction, loops: list[Watched], ends: Ends) -> None:
    channel, _ = ends
    if direction is WRITE:
        fill(channel.channel)
    first = loops[1].begin(channel.readiness.wait(direction))
    is_waiting(loops[1], channel, direction)
    with pytest.raises(RuntimeError, match=f"two coroutines wait to {direction.value} descriptor"):
        loops[2].do(channel.readiness.wait(direction))
    with pytest.raises(RuntimeError, match=f"a coroutine waits to {direction.value} the channel"):
        channel.close()
    channel.readiness.wake(direction)
    first.result(PATIENCE_S)


def fill(channel: Channel) -> None:
    try:
        while True:
            os.write(channel.write_fd, bytes(65536))
    except BlockingIOError:
        pass


@pytest.mark.parametrize("follow", [True, False], ids=["follows", "default"])
def test_a_cancelled_waiter_leaves_nothing_behind(follow: bool, loops: list[Watched], ends: Ends) -> None:
    channel, far = ends
    channel.follow_coroutine = follow

    async def give_up() -> None:
        task = asyncio.ensure_future(channel.read(1))
        while not channel.readiness.is_waiting(READ):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    loops[1].do(give_up())
    assert not channel.readiness.is_waiting(READ)
    reading = loops[2].begin(channel.read(2))
    is_waiting(loops[2], channel, READ)
    far.sendall(b"ok")
    assert reading.result(PATIENCE_S) == b"ok"


def test_ends_and_breaks(loops: list[Watched], ends: Ends) -> None:
    channel, far = ends
    far.sendall(b"abc")
    far.shutdown(socket.SHUT_WR)
    with pytest.raises(StreamError, match="socket 'near' ends after 3 of 4 bytes"):
        loops[1].do(channel.read(4))
    assert loops[1].do(channel.read(4, may_end=True)) == b""
    far.close()
    with pytest.raises(ChannelError, match="Unable to write to socket: Broken pipe"):
        loops[1].do(channel.write(b"x"))


def test_files_are_always_ready(loops: list[Watched], quit_event: QuitEvent, tmp_path: Path) -> None:
    """The kernel watches none, so a wait for one returns at once."""
    (tmp_path / "f").write_bytes(b"contents")
    for follow in (True, False):
        fd = os.open(tmp_path / "f", os.O_RDONLY)
        channel = CoroutineChannel(channel_from_fd("f", fd, quit_event.fd), loops[0], follow_coroutine=follow)
        loops[1].do(channel.readiness.wait(READ))
        assert loops[1].do(channel.read(8)) == b"contents"
        channel.close()


@pytest.mark.parametrize("follow", [True, False], ids=["follows", "default"])
def test_tls_waits_as_the_channel_below_it_did(
    follow: bool, loops: list[Watched], quit_event: QuitEvent, tmp_path: Path
) -> None:
    directory = str(x509_directory(tmp_path / "x509"))
    client, server = (make("tls-creds-x509", dir=directory, endpoint=endpoint) for endpoint in ("client", "server"))
    near, far = (
        CoroutineChannel(SocketChannel("end", end, quit_event.fd), loops[0], follow_coroutine=follow)
        for end in socket.socketpair()
    )
    accepting = loops[2].begin(far.start_tls(TlsServer(server, None)))
    near = loops[1].do(near.start_tls(TlsClient(client, "localhost")))
    far = accepting.result(PATIENCE_S)
    assert near.follow_coroutine is far.follow_coroutine is follow
    data, answer = os.urandom(2 * MIB), os.urandom(MIB)
    busy = [
        loops[1].begin(near.write(data)),
        loops[2].begin(near.read(len(answer))),
        loops[2].begin(far.write(answer)),
        loops[1].begin(far.read(len(data))),
    ]
    results = [future.result(PATIENCE_S) for future in busy]
    assert results[3] == data and results[1] == answer
    assert (loops[0].watched == []) is follow
    assert (loops[1].watched == loops[2].watched == []) is not follow
    near.close()
    assert loops[2].do(far.read(1, may_end=True)) == b""
    far.close()


def test_a_failed_handshake_closes_the_channel(loops: list[Watched], quit_event: QuitEvent, tmp_path: Path) -> None:
    directory = str(x509_directory(tmp_path / "x509"))
    server = TlsServer(make("tls-creds-x509", dir=directory, endpoint="server"), None)
    near, far = socket.socketpair()
    channel = CoroutineChannel(SocketChannel("near", near, quit_event.fd), loops[0], follow_coroutine=True)
    starting = loops[1].begin(channel.start_tls(server))
    is_waiting(loops[1], channel, READ)
    far.sendall(b"GET / HTTP/1.0\r\n\r\n")
    with pytest.raises(ChannelError, match="TLS handshake failed: "):
        starting.result(PATIENCE_S)
    assert far.recv(65536) == b""
    far.close()
