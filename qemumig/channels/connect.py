"""From an address to a channel.

Outgoing   `outgoing(address)` opens what opens at once (fd, exec, file) and reports errors at once; for sockets it gives
           back the act of connecting, which waits, and therefore happens in the migration's own thread.
Incoming   `incoming(address)` binds at once and gives back a Listener, whose `accept` waits.

A listener goes away with the first channel: there is one channel until multifd, and a second sender has nothing to add.
"""

from __future__ import annotations

import os
import select
import socket
import stat
from collections.abc import Callable
from typing import Any

from ..errors import ChannelError
from .address import Address, ExecAddress, FdAddress, FileAddress, InetAddress, UnixAddress
from .channel import Channel, SocketChannel, channel_from_fd, wait_ready
from .exec import ExecChannel
from .file import open_incoming_file, open_outgoing_file

TakeFd = Callable[[str], int]


def outgoing(address: Address, quit_fd: int, take_fd: TakeFd) -> Callable[[], Channel]:
    """A function that gives the connected channel; it may wait.  *take_fd* hands out a named descriptor.

    Raises ChannelError at once where nothing has to be waited for; otherwise the function does.
    """
    if isinstance(address, InetAddress | UnixAddress):
        return lambda: _connect(address, quit_fd)
    channel = _open_outgoing(address, quit_fd, take_fd)
    return lambda: channel


def _open_outgoing(address: Address, quit_fd: int, take_fd: TakeFd) -> Channel:
    if isinstance(address, FdAddress):
        return channel_from_fd(str(address), take_fd(address.name), quit_fd)
    if isinstance(address, ExecAddress):
        return ExecChannel(address, quit_fd)
    assert isinstance(address, FileAddress)
    return open_outgoing_file(address, quit_fd)


def incoming(address: Address, quit_fd: int, take_fd: TakeFd) -> Listener:
    """A listener on *address*, bound; ChannelError when that fails."""
    if isinstance(address, InetAddress):
        return SocketListener(_bind_inet(address), address, quit_fd)
    if isinstance(address, UnixAddress):
        return SocketListener(_bind_unix(address), address, quit_fd)
    if isinstance(address, FdAddress):
        return Listener(channel_from_fd(str(address), _incoming_fd(address, take_fd), quit_fd))
    if isinstance(address, ExecAddress):
        return Listener(ExecChannel(address, quit_fd))
    return Listener(open_incoming_file(address, quit_fd))


def _incoming_fd(address: FdAddress, take_fd: TakeFd) -> int:
    """A number is an inherited descriptor, anything else a name given before."""
    if not address.name.isdigit():
        return take_fd(address.name)
    number = int(address.name)
    try:
        mode = os.fstat(number).st_mode
    except (OSError, OverflowError) as error:
        text = f"File descriptor {address.name} is not open"
        raise ChannelError(text, channel=str(address)) from error
    if not (stat.S_ISSOCK(mode) or stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISCHR(mode)):
        raise ChannelError(f"File descriptor {number} is not a socket, pipe or file", channel=str(address))
    return number


class Listener:
    """Where the main channel comes from; here one that is open already."""

    def __init__(self, channel: Channel | None = None) -> None:
        self._channel = channel

    def accept(self) -> Channel:
        """The main channel; it belongs to the caller.  May wait; MigrationCancelled when told to quit."""
        channel, self._channel = self._channel, None
        assert channel is not None, "accept() called twice"
        return channel

    def socket_addresses(self) -> list[dict[str, Any]]:
        """Where it listens, in QAPI's form (qmp.md §5); empty for what is no socket."""
        return []

    def close(self) -> None:
        """Stop listening; a channel that nobody took is closed, too."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None


class SocketListener(Listener):
    """A listening socket; the path of a unix socket goes away with it."""

    def __init__(self, sock: socket.socket, address: InetAddress | UnixAddress, quit_fd: int) -> None:
        super().__init__()
        self._socket: socket.socket | None = sock
        self._address = address
        self._quit_fd = quit_fd
        self._addresses = [_socket_address(sock)]

    def accept(self) -> Channel:
        assert self._socket is not None
        while True:
            wait_ready(self._socket.fileno(), select.POLLIN, self._quit_fd)
            try:
                connection, _ = self._socket.accept()
            except (BlockingIOError, ConnectionAbortedError):
                continue  # the peer has gone again
            if isinstance(self._address, InetAddress) and self._address.keep_alive:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            return SocketChannel(str(self._address), connection, self._quit_fd)

    def socket_addresses(self) -> list[dict[str, Any]]:
        return self._addresses if self._socket is not None else []

    def close(self) -> None:
        sock, self._socket = self._socket, None
        if sock is None:
            return
        sock.close()
        if isinstance(self._address, UnixAddress):
            _unlink_socket(self._address.path)


def _resolve(address: InetAddress, *, passive: bool) -> list[tuple[Any, ...]]:
    family = socket.AF_UNSPEC
    if address.ipv4 is not None or address.ipv6 is not None:
        ipv4 = address.ipv4 if address.ipv4 is not None else not address.ipv6
        ipv6 = address.ipv6 if address.ipv6 is not None else not address.ipv4
        family = socket.AF_UNSPEC if ipv4 and ipv6 else socket.AF_INET if ipv4 else socket.AF_INET6
    flags = socket.AI_PASSIVE if passive else 0
    try:
        # as text an ordinary name, too, would go through the tables of international ones: milliseconds, the first time
        host = address.host.encode("ascii" if address.host.isascii() else "idna")
        return socket.getaddrinfo(host or None, address.port, family, socket.SOCK_STREAM, 0, flags)
    except (socket.gaierror, UnicodeError, OverflowError) as error:
        reason = error.strerror if isinstance(error, socket.gaierror) else str(error)
        raise ChannelError(f"address resolution failed for {address}: {reason}", channel=str(address)) from error


def _connect(address: InetAddress | UnixAddress, quit_fd: int) -> Channel:
    targets: list[tuple[Any, Any]]
    if isinstance(address, UnixAddress):
        targets = [(socket.AF_UNIX, address.path)]
    else:
        targets = [(entry[0], entry[4]) for entry in _resolve(address, passive=False)]
    reason = 0
    for family, target in targets:
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            reason = _try_connect(sock, target, quit_fd)
        except BaseException:
            sock.close()
            raise
        if reason == 0:
            if isinstance(address, InetAddress) and address.keep_alive:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            return SocketChannel(str(address), sock, quit_fd)
        sock.close()
    text = f"Failed to connect to '{address}': {os.strerror(reason)}"
    raise ChannelError(text, channel=str(address), errno=reason)


def _try_connect(sock: socket.socket, target: Any, quit_fd: int) -> int:
    """Connect without blocking the quit event; returns 0 or the errno."""
    sock.setblocking(False)
    try:
        sock.connect(target)
        return 0
    except BlockingIOError:
        wait_ready(sock.fileno(), select.POLLOUT, quit_fd)
        return sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    except OSError as error:
        if error.errno is None:  # a path that is too long never gets as far as the kernel
            raise ChannelError(f"Failed to connect to '{target}': {error}", channel=str(target)) from error
        return error.errno


def _bind_inet(address: InetAddress) -> socket.socket:
    reason: OSError | None = None
    for family, kind, protocol, _, (host, port, *_rest) in _resolve(address, passive=True):
        for candidate in range(port, (address.to or port) + 1):
            sock = socket.socket(family, kind, protocol)
            try:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                sock.bind((host, candidate))
                sock.listen(1)
                sock.setblocking(False)
                return sock
            except OSError as error:
                sock.close()
                reason = error
    assert reason is not None
    text = f"Failed to find an available port for {address}: {os.strerror(reason.errno or 0)}"
    raise ChannelError(text, channel=str(address), errno=reason.errno) from reason


def _bind_unix(address: UnixAddress) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _unlink_socket(address.path)
        sock.bind(address.path)
        sock.listen(1)
        sock.setblocking(False)
        return sock
    except OSError as error:
        sock.close()
        reason = os.strerror(error.errno) if error.errno else str(error)
        text = f"Failed to bind socket to {address.path}: {reason}"
        raise ChannelError(text, channel=address.path, errno=error.errno) from error


def _unlink_socket(path: str) -> None:
    """Remove a socket that an earlier listener left; anything else at that path stays."""
    try:
        if stat.S_ISSOCK(os.stat(path).st_mode):
            os.unlink(path)
    except OSError:
        pass  # nothing there: bind() says what is wrong, if anything is


def _socket_address(sock: socket.socket) -> dict[str, Any]:
    name = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        return {"type": "unix", "path": name}
    version = "ipv6" if sock.family == socket.AF_INET6 else "ipv4"
    return {"type": "inet", "host": name[0], "port": str(name[1]), version: True}
