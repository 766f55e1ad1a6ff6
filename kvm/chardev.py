"""Character devices: where the bytes of a serial port or a monitor come from and go to (cli.md §5).

In    bytes of a device (any thread) or of a monitor (loop thread), through `write`
Out   bytes and descriptors from outside, handed to the attached front end on the loop thread

                     write ─▶ Output ─▶ descriptor            file, stdio, pipe, connected socket
      received(data, fds)  ◀─ loop    ◀─ descriptor

Life      made (nothing happens) → `open` (files made, sockets listen; UsageError) → `start` (the loop watches; a
          socket with wait=on comes back once it has a client) → `close` (our socket files are removed)
Threads   `write` may be called from any thread and does not wait for a reader: what a full pipe or socket does not
          take is kept and sent later by the loop, until `OUTPUT_LIMIT` bytes wait.  All else belongs to the loop thread.
Holds     (1) bytes leave in the order of the calls to `write`, each once
          (2) one client at a time; the next is greeted when the first has gone
          (3) without a client output is dropped, as QEMU does
"""

from __future__ import annotations

import abc
import array
import asyncio
import contextlib
import os
import select
import socket
import stat
import termios
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .keyval import UsageError

OUTPUT_LIMIT = 1 << 20  # bytes; a reader that leaves so many waiting gets no more
LOW_WATER = 1 << 16  # `drain` comes back when at most this many bytes are left
READ_SIZE = 1 << 16
PIPE_PIECE = 4096  # a pipe that polls as writable takes this much without blocking (PIPE_BUF)
MAX_DESCRIPTORS = 16  # taken from one message; the kernel drops the rest
ACCEPT_PAUSE = 1.0  # seconds without accepting after descriptors ran out

Send = Callable[[bytes], int]  # takes some bytes, returns how many, raises BlockingIOError for none


def _ignore(*_arguments: object) -> None:
    """The front end nobody attached."""


def close_descriptors(descriptors: Sequence[int]) -> None:
    """Close descriptors that came with a message and that nobody wants."""
    for descriptor in descriptors:
        os.close(descriptor)


@dataclass
class FrontEnd:
    """Who uses a back end; everything is called on the loop thread."""

    received: Callable[[bytes, list[int]], None] = _ignore  # owns the descriptors from then on
    connected: Callable[[], None] = _ignore
    disconnected: Callable[[], None] = _ignore
    lets_go: bool = True  # a client that has closed its end while input is paused may give way to the next one


class Output:
    """Bytes on their way out, to one descriptor at a time."""

    def __init__(self, broken: Callable[[], None], limit: int = OUTPUT_LIMIT) -> None:
        # Set before start.
        self._broken = broken
        self._limit = limit
        self._loop: asyncio.AbstractEventLoop | None = None
        self._progress = asyncio.Event()
        # Under lock.
        self._lock = threading.Lock()
        self._descriptor = -1
        self._send: Send = len
        self._pending = bytearray()

    @property
    def pending(self) -> int:
        """How many bytes the reader has not taken yet."""
        return len(self._pending)

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """From now on *loop* sends what was kept."""
        with self._lock:
            self._loop = loop
            if self._pending:
                self._ask_for_flush()

    def connect(self, descriptor: int, send: Send) -> None:
        """Bytes go to *descriptor* through *send* from now on."""
        with self._lock:
            self._descriptor, self._send = descriptor, send
            self._pending.clear()

    def disconnect(self) -> None:
        """Nobody listens any more; what was kept is dropped.  Loop thread."""
        with self._lock:
            if self._loop is not None and self._pending and self._descriptor >= 0:
                self._loop.remove_writer(self._descriptor)
            self._descriptor, self._send = -1, len
            self._pending.clear()
        self._progress.set()

    def write(self, data: bytes) -> int:
        """Send or keep *data*; how many bytes were taken: all, or none when too many wait already."""
        with self._lock:
            if self._descriptor < 0:
                return len(data)
            if len(self._pending) >= self._limit:
                return 0
            sent = 0 if self._pending else self._send_some(data)
            if sent < len(data):
                if not self._pending:
                    self._ask_for_flush()
                self._pending += data[sent:]
            return len(data)

    async def drain(self, enough: int = LOW_WATER) -> None:
        """Wait until the reader has taken all but *enough* bytes, or has gone."""
        while len(self._pending) > enough:
            self._progress.clear()
            await self._progress.wait()

    def _send_some(self, data: bytes | bytearray) -> int:
        sent = 0
        view = memoryview(data)
        try:
            while sent < len(data):
                sent += self._send(view[sent:])  # type: ignore[arg-type]
        except (BlockingIOError, InterruptedError):
            pass
        except OSError:  # the reader went away, or the disk is full: the rest is dropped
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._broken)
            sent = len(data)
        finally:
            view.release()
        return sent

    def _ask_for_flush(self) -> None:
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._watch)

    def _watch(self) -> None:
        with self._lock:
            if self._loop is not None and self._pending and self._descriptor >= 0:
                self._loop.add_writer(self._descriptor, self._flush)

    def _flush(self) -> None:
        with self._lock:
            del self._pending[: self._send_some(self._pending)]
            if not self._pending and self._loop is not None and self._descriptor >= 0:
                self._loop.remove_writer(self._descriptor)
        self._progress.set()


class CharBackend:
    """A back end that swallows output and has no input (`null`); the others build on it."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.option = ""  # the words on the command line, for messages
        self.in_use = False  # a device or a monitor is attached
        self.report: Callable[[str], None] = _ignore  # says a line to the user
        self.front_end = FrontEnd()
        self.output = Output(self.drop_client)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._input = -1  # the descriptor the loop reads from
        self._paused = False

    @property
    def description(self) -> str:
        """How query-chardev calls it."""
        return "null"

    def attach(self, front_end: FrontEnd) -> None:
        """*front_end* gets the input from now on; before `start`."""
        self.front_end = front_end
        self.in_use = True

    def set_receiver(self, receive: Callable[[bytes], None]) -> None:
        """Attach a front end that only wants bytes; it may `pause`."""

        def received(data: bytes, descriptors: list[int]) -> None:
            close_descriptors(descriptors)
            receive(data)

        self.attach(FrontEnd(received, lets_go=False))

    def open(self) -> None:
        """Make files, listen or connect; UsageError says what failed."""

    async def start(self) -> None:
        """Let the running loop watch this back end."""
        self._loop = asyncio.get_running_loop()
        self.output.start(self._loop)
        self.front_end.connected()

    def write(self, data: bytes) -> int:
        """Send *data*; the number of bytes taken (all of them when nobody listens).  Any thread."""
        return self.output.write(data)

    def pause(self) -> None:
        """Take no more input until `resume`."""
        self._paused = True
        self._unwatch_input()

    def resume(self) -> None:
        """Take input again."""
        self._paused = False
        self._watch_input(self._input)

    def drop_client(self) -> None:
        """Close the connection, if this is one; a server then waits for the next."""

    def close(self) -> None:
        """Give everything back; nothing is sent or received afterwards."""
        self._unwatch_input()
        self._input = -1
        self.output.disconnect()

    def _watch_input(self, descriptor: int) -> None:
        self._input = descriptor
        if self._loop is None or self._paused or descriptor < 0:
            return
        try:
            self._loop.add_reader(descriptor, self._on_readable)
        except PermissionError:  # a regular file: epoll does not take it, it is always readable
            self._loop.call_soon(self._read_file)

    def _unwatch_input(self) -> None:
        if self._loop is not None and self._input >= 0:
            self._loop.remove_reader(self._input)

    def _read_file(self) -> None:
        if self._input >= 0 and not self._paused:
            descriptor = self._input
            self._on_readable()
            if self._input == descriptor and self._loop is not None:
                self._loop.call_soon(self._read_file)

    def _on_readable(self) -> None:
        try:
            data = os.read(self._input, READ_SIZE)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if data:
            self.front_end.received(data, [])
        else:
            self._end_of_input()

    def _end_of_input(self) -> None:
        self._unwatch_input()
        self._input = -1
        self.front_end.disconnected()


def descriptor_sender(descriptor: int) -> Send:
    """A `Send` for a file, pipe or terminal that leaves its blocking mode as it is: others may share it."""
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return lambda data: os.write(descriptor, data)
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)

    def send(data: bytes) -> int:
        if not poll.poll(0):
            raise BlockingIOError
        return os.write(descriptor, data[:PIPE_PIECE])

    return send


def open_path(path: str, flags: int) -> int:
    """Open *path*; UsageError "Could not open …" with the system's reason."""
    try:
        return os.open(path, flags | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise UsageError(f"Could not open '{path}': {os.strerror(error.errno or 0)}") from error


class FileBackend(CharBackend):
    """Output to a file, byte by byte as it comes; the file is emptied first unless *append*."""

    def __init__(self, label: str, path: str, append: bool = False) -> None:
        super().__init__(label)
        self._path = path
        self._append = append
        self._descriptor = -1

    @property
    def description(self) -> str:
        return "file"

    def open(self) -> None:
        flags = os.O_WRONLY | os.O_CREAT | (os.O_APPEND if self._append else os.O_TRUNC)
        # A FIFO is opened for reading too: opening then waits for nobody, and a reader may come and go.
        with contextlib.suppress(OSError):
            if stat.S_ISFIFO(os.stat(self._path).st_mode):
                flags = os.O_RDWR
        self._descriptor = open_path(self._path, flags)
        self.output.connect(self._descriptor, descriptor_sender(self._descriptor))

    def close(self) -> None:
        super().close()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class PipeBackend(CharBackend):
    """Two FIFOs, PATH.in and PATH.out, or one file PATH for both directions."""

    def __init__(self, label: str, path: str) -> None:
        super().__init__(label)
        self._path = path
        self._descriptors: list[int] = []

    @property
    def description(self) -> str:
        return "pipe"

    def open(self) -> None:
        try:
            self._descriptors = [open_path(f"{self._path}.in", os.O_RDWR)]
            self._descriptors.append(open_path(f"{self._path}.out", os.O_RDWR))
        except UsageError:
            close_descriptors(self._descriptors)
            self._descriptors = [open_path(self._path, os.O_RDWR)]
        self.output.connect(self._descriptors[-1], descriptor_sender(self._descriptors[-1]))

    async def start(self) -> None:
        await super().start()
        self._watch_input(self._descriptors[0])

    def close(self) -> None:
        super().close()
        close_descriptors(self._descriptors)
        self._descriptors = []


class StdioBackend(CharBackend):
    """Standard input and output; a terminal gives each key at once, unechoed, and is put right again at the end."""

    def __init__(self, label: str, signals: bool = True) -> None:
        super().__init__(label)
        self._signals = signals
        self._saved: list | None = None

    @property
    def description(self) -> str:
        return "stdio"

    def open(self) -> None:
        self.output.connect(1, descriptor_sender(1))

    async def start(self) -> None:
        self._enter_raw_mode()
        await super().start()
        self._watch_input(0)

    def close(self) -> None:
        super().close()
        if self._saved is not None:
            termios.tcsetattr(0, termios.TCSANOW, self._saved)
            self._saved = None

    def _enter_raw_mode(self) -> None:
        try:
            self._saved = termios.tcgetattr(0)
        except termios.error:  # no terminal
            return
        mode = termios.tcgetattr(0)
        mode[0] &= ~(termios.BRKINT | termios.ICRNL | termios.INLCR | termios.ISTRIP | termios.IXON)
        mode[3] &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.IEXTEN)
        if not self._signals:
            mode[3] &= ~termios.ISIG
        termios.tcsetattr(0, termios.TCSANOW, mode)


class SocketBackend(CharBackend, abc.ABC):
    """A stream socket: a server with one client at a time, or a client that connects once.

    Where the front end lets go, a client that has closed its end while its input is paused gives way to the next one.
    """

    def __init__(self, label: str, server: bool, wait: bool) -> None:
        super().__init__(label)
        self._server = server
        self._wait = wait
        self._listener: socket.socket | None = None
        self._client: socket.socket | None = None
        self._farewell: select.epoll | None = None  # readable once the client has closed its end; watched in a pause
        self._leaving = False  # it has
        self._first_client = asyncio.Event()

    @property
    @abc.abstractmethod
    def address(self) -> str:
        """The address as on the command line, e.g. "unix:/run/vm.sock"."""

    @property
    def description(self) -> str:
        state = "" if self._client is not None else "disconnected:"
        return f"{state}{self.address}{',server=on' if self._server else ''}"

    def open(self) -> None:
        if self._server:
            self._listener = self._listen()
            self._listener.setblocking(False)
        else:
            self._client = self._connect()

    @abc.abstractmethod
    def _listen(self) -> socket.socket:
        """A listening socket on the address; UsageError when that fails."""

    @abc.abstractmethod
    def _connect(self) -> socket.socket:
        """A socket connected to the address; UsageError when that fails."""

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.output.start(self._loop)
        if self._client is not None:
            self._use_client(self._client)
        elif self._wait:
            about = f"{self.option}: " if self.option else ""
            self.report(f"{about}info: QEMU waiting for connection on: {self.description}")
        self._watch_listener()
        if self._wait and self._server:
            await self._first_client.wait()

    def pause(self) -> None:
        super().pause()
        if self._client is None or self._loop is None or self._leaving or not self.front_end.lets_go:
            return
        if self._farewell is None:
            self._farewell = select.epoll()
            self._farewell.register(self._client.fileno(), select.EPOLLRDHUP)
        self._loop.add_reader(self._farewell.fileno(), self._on_farewell)

    def resume(self) -> None:
        self._unwatch_farewell()
        super().resume()

    def _on_farewell(self) -> None:
        self._unwatch_farewell()
        self._leaving = True
        self._watch_listener()

    def _unwatch_farewell(self) -> None:
        if self._farewell is not None and self._loop is not None:
            self._loop.remove_reader(self._farewell.fileno())

    def _forget_farewell(self) -> None:
        self._unwatch_farewell()
        if self._farewell is not None:
            self._farewell.close()
            self._farewell = None
        self._leaving = False

    def drop_client(self) -> None:
        client, self._client = self._client, None
        if client is None:
            return
        self._unwatch_input()
        self._forget_farewell()
        self._input = -1
        self._paused = False
        self.output.disconnect()
        client.close()
        self.front_end.disconnected()
        self._watch_listener()

    def close(self) -> None:
        super().close()
        if self._listener is not None:
            if self._loop is not None:
                self._loop.remove_reader(self._listener.fileno())
            self._listener.close()
            self._listener = None
        self._forget_farewell()
        if self._client is not None:
            self._client.close()
            self._client = None

    def _watch_listener(self) -> None:
        is_free = self._client is None or self._leaving
        if self._listener is not None and is_free and self._loop is not None:
            self._loop.add_reader(self._listener.fileno(), self._on_connection)

    def _on_connection(self) -> None:
        assert self._listener is not None and self._loop is not None
        try:
            client, _ = self._listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError:  # out of descriptors: the connection stays in the backlog, look again later
            self._loop.remove_reader(self._listener.fileno())
            self._loop.call_later(ACCEPT_PAUSE, self._watch_listener)
            return
        self.drop_client()
        self._loop.remove_reader(self._listener.fileno())
        self._use_client(client)
        self._first_client.set()

    def _use_client(self, client: socket.socket) -> None:
        client.setblocking(False)
        if client.family != socket.AF_UNIX:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._client = client
        self.output.connect(client.fileno(), client.send)
        self.front_end.connected()
        if self._client is client:  # the front end may have dropped it already
            self._watch_input(client.fileno())

    def _on_readable(self) -> None:
        assert self._client is not None
        try:
            data, descriptors = receive(self._client)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data, descriptors = b"", []
        if data:
            self.front_end.received(data, descriptors)
        else:
            close_descriptors(descriptors)
            self.drop_client()


def receive(client: socket.socket) -> tuple[bytes, list[int]]:
    """Bytes from a socket and the descriptors that came with them; no bytes at the end of the stream."""
    if client.family != socket.AF_UNIX:
        return client.recv(READ_SIZE), []
    space = socket.CMSG_SPACE(MAX_DESCRIPTORS * array.array("i").itemsize)
    data, messages, _, _ = client.recvmsg(READ_SIZE, space, socket.MSG_CMSG_CLOEXEC)
    descriptors = array.array("i")
    for level, kind, content in messages:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors.frombytes(content[: len(content) - len(content) % descriptors.itemsize])
    return data, list(descriptors)


class UnixBackend(SocketBackend):
    """A socket in the file system."""

    def __init__(self, label: str, path: str, server: bool = False, wait: bool = True) -> None:
        super().__init__(label, server, wait)
        self._path = path
        self._bound: tuple[int, int] | None = None  # device and inode of the file we made

    @property
    def address(self) -> str:
        return f"unix:{self._path}"

    def _listen(self) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX)
        try:
            with contextlib.suppress(OSError):
                if stat.S_ISSOCK(os.lstat(self._path).st_mode):
                    os.unlink(self._path)
            listener.bind(self._path)
            made = os.lstat(self._path)
            self._bound = made.st_dev, made.st_ino
            listener.listen(16)
        except OSError as error:
            listener.close()
            raise UsageError(f"Failed to bind socket to {self._path}: {reason(error)}") from error
        return listener

    def _connect(self) -> socket.socket:
        client = socket.socket(socket.AF_UNIX)
        try:
            client.connect(self._path)
        except OSError as error:
            client.close()
            raise UsageError(f"Failed to connect to '{self._path}': {reason(error)}") from error
        return client

    def close(self) -> None:
        super().close()
        if self._bound is not None:
            with contextlib.suppress(OSError):
                found = os.lstat(self._path)
                if (found.st_dev, found.st_ino) == self._bound:  # not one that somebody put there since
                    os.unlink(self._path)
            self._bound = None


class TcpBackend(SocketBackend):
    """A TCP socket; an empty host is every address when listening."""

    def __init__(self, label: str, host: str, port: str, server: bool = False, wait: bool = True) -> None:
        super().__init__(label, server, wait)
        self._host = host
        self._port = port

    @property
    def address(self) -> str:
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"tcp:{host}:{self._port}"

    def _addresses(self) -> list:
        flags = socket.AI_PASSIVE if self._server else 0
        try:
            return socket.getaddrinfo(self._host or None, self._port, type=socket.SOCK_STREAM, flags=flags)
        except (socket.gaierror, UnicodeError) as error:
            text = error.strerror if isinstance(error, socket.gaierror) else str(error)
            raise UsageError(f"address resolution failed for {self._host}:{self._port}: {text}") from error

    def _listen(self) -> socket.socket:
        failure = UsageError("no address")
        for family, kind, protocol, _, address in self._addresses():
            listener = socket.socket(family, kind, protocol)
            try:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(address)
                listener.listen(16)
            except OSError as error:
                listener.close()
                failure = UsageError(f"Failed to bind to '{self._host}:{self._port}': {reason(error)}")
                continue
            self._port = str(listener.getsockname()[1])
            return listener
        raise failure

    def _connect(self) -> socket.socket:
        failure = UsageError("no address")
        for family, kind, protocol, _, address in self._addresses():
            client = socket.socket(family, kind, protocol)
            try:
                client.connect(address)
            except OSError as error:
                client.close()
                failure = UsageError(f"Failed to connect to '{self._host}:{self._port}': {reason(error)}")
                continue
            return client
        raise failure


class DescriptorBackend(SocketBackend):
    """A socket inherited from the parent process: listening or connected."""

    def __init__(self, label: str, descriptor: int, wait: bool = True) -> None:
        super().__init__(label, False, wait)
        self._descriptor = descriptor

    @property
    def address(self) -> str:
        return f"fd:{self._descriptor}"

    def open(self) -> None:
        try:
            inherited = socket.socket(fileno=self._descriptor)
            self._server = bool(inherited.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
        except OSError:
            raise UsageError(f"File descriptor '{self._descriptor}' is not a socket") from None
        self._inherited = inherited
        super().open()

    def _listen(self) -> socket.socket:
        return self._inherited

    def _connect(self) -> socket.socket:
        return self._inherited


def reason(error: OSError) -> str:
    """The system's words for *error*."""
    return os.strerror(error.errno) if error.errno else str(error)
