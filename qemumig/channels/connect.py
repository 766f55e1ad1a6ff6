"""From an address to a channel.

Outgoing   `outgoing(address)` opens what opens at once (fd, exec, file) and reports errors at once; for sockets it gives
           back the act of connecting, which waits, and therefore happens in the migration's own thread.
Incoming   `incoming(address)` binds at once and gives back a Listener, whose `accept` waits.

Both take what TLS asks for (tls.py): the source's handshake is part of its act of connecting, the destination's are done
by the listener, many at once.

A listener goes away with the first channel, unless there are to be more: then it stays to tell who is one too many.
"""

from __future__ import annotations

import os
import select
import socket
import stat
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from .. import trace
from ..errors import ChannelError
from ..options import MigrationOptions
from .address import Address, ExecAddress, FdAddress, FileAddress, InetAddress, UnixAddress, VsockAddress
from .channel import Channel, SocketChannel, channel_from_fd, wait_any
from .exec import ExecChannel
from .file import OpenPath, no_path, open_incoming_file, open_outgoing_file
from .sockets import SocketAddress, bind, connect, describe_socket, is_listening, remove_path

if TYPE_CHECKING:  # most migrations have no TLS: its library is loaded by those that do
    from .objects import FindObject
    from .tls import Reception, TlsClient, TlsServer

TakeFd = Callable[[str], int]


def no_tls() -> None:
    """What an incoming side without TLS finds in its parameters."""


def outgoing(
    address: Address,
    quit_fd: int,
    take_fd: TakeFd,
    *,
    tls: Callable[[], TlsClient | None] = no_tls,
    open_path: OpenPath = no_path,
) -> Callable[[], Channel]:
    """A function that gives the connected channel; it may wait.

    *take_fd* hands out a named descriptor, *open_path* one for a path that means a set of descriptors.  *tls* is asked
    when there is a connection, as in QEMU, so what is wrong with it is an error of the migration.

    Raises ChannelError at once where nothing has to be waited for; otherwise the function does.
    """
    if isinstance(address, InetAddress | UnixAddress | VsockAddress):
        connecting = partial(connect, address, quit_fd)
    else:
        connecting = partial(_itself, _open_outgoing(address, quit_fd, take_fd, open_path))
    return lambda: _encipher(connecting(), tls)


def _itself(channel: Channel) -> Channel:
    return channel


def _encipher(channel: Channel, tls: Callable[[], TlsClient | TlsServer | None]) -> Channel:
    """*channel*, after the handshake if there is to be one; it is closed when that fails."""
    try:
        side = tls()
    except BaseException:
        channel.close()
        raise
    return channel if side is None else side.wrap(channel)


def tls_of_source(options: MigrationOptions, find: FindObject, address: Address) -> TlsClient | None:
    """What the source's parameters say about TLS on a way to *address*; OptionError when it cannot be had.

    *find* gives the object with an id, or None.
    """
    if not options.parameter("tls-creds"):
        return None
    from .tls import client_for

    return client_for(options, find, address)


def tls_of_destination(options: MigrationOptions, find: FindObject) -> TlsServer | None:
    """What the destination's parameters say about TLS; OptionError when it cannot be had."""
    if not options.parameter("tls-creds"):
        return None
    from .tls import server_for

    return server_for(options, find)


def no_object(object_id: str) -> Any:
    """A finder where there are no objects."""


def _open_outgoing(address: Address, quit_fd: int, take_fd: TakeFd, open_path: OpenPath) -> Channel:
    if isinstance(address, FdAddress):
        return channel_from_fd(str(address), take_fd(address.name), quit_fd)
    if isinstance(address, ExecAddress):
        return ExecChannel(address, quit_fd)
    assert isinstance(address, FileAddress)
    return open_outgoing_file(address, quit_fd, open_path)


def incoming(
    address: Address,
    quit_fd: int,
    take_fd: TakeFd,
    *,
    tls: Callable[[], TlsServer | None] = no_tls,
    open_path: OpenPath = no_path,
) -> Listener:
    """A listener on *address*, bound; ChannelError when that fails.

    *tls* is asked anew for each connection: parameters may be set after the listener was made.
    """
    if isinstance(address, InetAddress | UnixAddress | VsockAddress):
        return SocketListener(bind(address), address, quit_fd, tls)
    if isinstance(address, FdAddress):
        return _listen_on_fd(address, quit_fd, take_fd, tls)
    if isinstance(address, ExecAddress):
        return Listener(ExecChannel(address, quit_fd), tls)
    return Listener(open_incoming_file(address, quit_fd, open_path), tls)


def _listen_on_fd(address: FdAddress, quit_fd: int, take_fd: TakeFd, tls: Callable[[], TlsServer | None]) -> Listener:
    """A listening socket takes connections, anything else is the connection."""
    fd = _incoming_fd(address, take_fd)
    if not is_listening(fd):
        return Listener(channel_from_fd(str(address), fd, quit_fd), tls)
    sock = socket.socket(fileno=fd)
    sock.setblocking(False)
    return SocketListener([sock], address, quit_fd, tls)


def _incoming_fd(address: FdAddress, take_fd: TakeFd) -> int:
    """A number is an inherited descriptor, anything else a name given before."""
    if not address.name.isdigit():
        return take_fd(address.name)
    number = int(address.name[:10])
    try:
        mode = os.fstat(number).st_mode
    except (OSError, OverflowError) as error:
        text = f"File descriptor {address.name} is not open"
        raise ChannelError(text, channel=str(address)) from error
    if not (stat.S_ISSOCK(mode) or stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISCHR(mode)):
        raise ChannelError(f"File descriptor {number} is not a socket, pipe or file", channel=str(address))
    return number


class Listener:
    """Where the main channel comes from; here one that is open already.

    *takes_more*: others may come behind it.
    """

    takes_more = False

    def __init__(self, channel: Channel | None, tls: Callable[[], TlsServer | None] = no_tls) -> None:
        self._channel = channel
        self._tls = tls

    def accept(self, *, speaks: bool = True) -> Channel:
        """The main channel; it belongs to the caller.  May wait; MigrationCancelled when told to quit."""
        channel, self._channel = self._channel, None
        assert channel is not None, "accept() called twice"
        return _encipher(channel, self._tls)

    def accept_among(self, events: Mapping[int, int], timeout_ms: int | None = None) -> Channel | None:
        """The next channel; None when one of *events* (descriptor: select.POLLIN, …) or the end of the time comes first."""
        return self.accept()

    @property
    def receives(self) -> bool:
        """Whether somebody has connected and is not a channel yet: there is a handshake to be done."""
        return False

    def expect(self, channels: int) -> None:
        """Make room for that many to come at once."""

    def socket_addresses(self) -> list[dict[str, Any]]:
        """Where it listens, in QAPI's form (qmp.md §5); empty for what is no socket."""
        return []

    def close(self) -> None:
        """Stop listening; a channel that nobody took is closed, too."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None


class SocketListener(Listener):
    """Listening sockets; the path of a unix socket goes away with them."""

    takes_more = True

    def __init__(
        self,
        sockets: list[socket.socket],
        address: SocketAddress | FdAddress,
        quit_fd: int,
        tls: Callable[[], TlsServer | None] = no_tls,
    ) -> None:
        super().__init__(None, tls)
        self._sockets = sockets
        self._address = address
        self._quit_fd = quit_fd
        self._addresses = [describe_socket(sock) for sock in sockets]
        for sock in sockets:
            trace.qio_channel_socket_listen_complete(str(address), sock.fileno())
        self._reception: Reception | None = None
        self._expected = 1  # channels that may come at once

    def accept(self, *, speaks: bool = True) -> Channel:
        """The next channel; with TLS one whose peer has proved who it is.

        *speaks*: the peer sends the first byte.  With TLS, a peer that leaves before that is as good as none.
        """
        if self._reception is not None and not speaks:
            self._reception.let_silent_in()  # it may have come together with the one before
        while (channel := self.accept_among({}, speaks=speaks)) is None:
            pass
        return channel

    def accept_among(
        self, events: Mapping[int, int], timeout_ms: int | None = None, *, speaks: bool = True
    ) -> Channel | None:
        if self._reception is not None and (enciphered := self._reception.take()) is not None:
            return enciphered
        connection = self._next_connection(events, timeout_ms)
        if connection is not None:
            server = self._server_for(connection)
            if server is None:
                return connection
            self._receive(connection, server, speaks)
        return self._reception.take() if self._reception is not None else None

    @property
    def receives(self) -> bool:
        return self._reception is not None and bool(self._reception.waits())

    def expect(self, channels: int) -> None:
        self._expected = channels
        for sock in self._sockets:
            sock.listen(channels)

    def _next_connection(self, events: Mapping[int, int], timeout_ms: int | None) -> Channel | None:
        """Wait for something; a connection when that was one, else None, maybe after a step of some handshake."""
        listening = {sock.fileno(): sock for sock in self._sockets}
        handshakes = self._reception.waits() if self._reception is not None else {}
        ready = wait_any({**dict.fromkeys(listening, select.POLLIN), **handshakes, **events}, self._quit_fd, timeout_ms)
        if self._reception is not None:
            self._reception.advance(ready)
        arrived = next((listening[fd] for fd in ready if fd in listening), None)
        if arrived is None:
            return None
        try:
            connection, _ = arrived.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return None  # the peer has gone again
        trace.qio_channel_socket_accept_complete(str(self._address), connection.fileno())
        return SocketChannel(str(self._address), connection, self._quit_fd)

    def _server_for(self, connection: Channel) -> TlsServer | None:
        try:
            return self._tls()
        except BaseException:
            connection.close()
            raise

    def _receive(self, connection: Channel, server: TlsServer, speaks: bool) -> None:
        if self._reception is None:
            from .tls import Reception

            self._reception = Reception(room=self._expected)
        self._reception.admit(connection, server, speaks=speaks)

    def socket_addresses(self) -> list[dict[str, Any]]:
        return self._addresses if self._sockets else []

    def close(self) -> None:
        sockets, self._sockets = self._sockets, []
        for sock in sockets:
            sock.close()
        if sockets and isinstance(self._address, UnixAddress):
            remove_path(self._address)
        if self._reception is not None:
            self._reception.close()
            self._reception = None
