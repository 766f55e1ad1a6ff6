"""Back ends that speak with a client: one at a time, the next is greeted when the first has gone."""

from __future__ import annotations

import abc
import array
import asyncio
import contextlib
import os
import select
import socket
import stat

from ..keyval import UsageError
from .backend import READ_SIZE, CharBackend, close_descriptors, reason

MAX_DESCRIPTORS = 16  # taken from one message; the kernel drops the rest
ACCEPT_PAUSE = 1.0  # seconds without accepting after descriptors ran out


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
