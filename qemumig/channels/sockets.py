"""Stream sockets of every family: resolve, connect, bind, describe (channels.md §1).

tcp     every address that a name stands for is tried in turn; a listener takes all of them at once
unix    a path, or an abstract name
vsock   between a host and its guests, or a host and itself where the kernel has a loopback for it
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import select
import socket
import stat
from typing import Any

from .. import trace
from ..errors import ChannelError
from ..threads import start_thread
from .address import InetAddress, UnixAddress, VsockAddress
from .channel import Channel, QuitEvent, SocketChannel, pause, wait_ready

SocketAddress = InetAddress | UnixAddress | VsockAddress
Target = tuple[int, int, Any]  # family, protocol, the kernel's address

IPPROTO_MPTCP = 262  # which the socket module does not name before Python 3.14
FULL_QUEUE_PAUSE_MS = 20
SUN_PATH = 108  # bytes of a unix socket's name, a leading zero of an abstract one included
UINT32 = (1 << 32) - 1
INT_MAX = (1 << 31) - 1


# ---- connect ----


def connect(address: SocketAddress, quit_fd: int) -> Channel:
    """A connected channel, after waiting for it.

    Raises ChannelError when nobody is there, MigrationCancelled when told to quit.
    """
    reason = 0
    for family, protocol, target in _targets(address, quit_fd):
        sock = _new_socket(address, family, protocol)
        trace.qio_channel_socket_connect_sync(target)
        try:
            reason = _try_connect(sock, target, quit_fd)
            if reason == 0:
                trace.qio_channel_socket_connect_complete(target, sock.fileno())
                if isinstance(address, InetAddress):
                    keep_alive(sock, address)
                return SocketChannel(str(address), sock, quit_fd)
        except BaseException:
            sock.close()
            raise
        trace.qio_channel_socket_connect_fail(target, os.strerror(reason))
        sock.close()
    text = f"Failed to connect to '{address}': {os.strerror(reason)}"
    raise ChannelError(text, channel=str(address), errno=reason)


def _targets(address: SocketAddress, quit_fd: int) -> list[Target]:
    if isinstance(address, UnixAddress):
        return [(socket.AF_UNIX, 0, _unix_name(address))]
    if isinstance(address, VsockAddress):
        return [(socket.AF_VSOCK, 0, _vsock_name(address))]
    return _resolve_waiting(address, quit_fd)


def _new_socket(address: SocketAddress, family: int, protocol: int) -> socket.socket:
    try:
        return socket.socket(family, socket.SOCK_STREAM, protocol)
    except OSError as error:
        text = f"Failed to create a socket for {address}: {os.strerror(error.errno or 0)}"
        raise ChannelError(text, channel=str(address), errno=error.errno) from error


def _try_connect(sock: socket.socket, target: Any, quit_fd: int) -> int:
    """Connect without blocking the quit event; returns 0 or the errno."""
    sock.setblocking(False)
    _do_without_pacing(sock, target)
    number = sock.connect_ex(target)
    while number == errno.EAGAIN and sock.family == socket.AF_UNIX:  # a full queue; nothing tells when it is not
        pause(FULL_QUEUE_PAUSE_MS, quit_fd)
        number = sock.connect_ex(target)
    if number == errno.EINPROGRESS:
        wait_ready(sock.fileno(), select.POLLOUT, quit_fd)
        number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    return number


def _do_without_pacing(sock: socket.socket, address: Any) -> None:
    """On the way from this host to itself, let the kernel send as fast as the other end reads.

    A host may be set up for a control of congestion that measures the way and hands bytes out by a timer (bbr): that takes
    processor time for every packet, and an urgent page waits for the timer.  The oldest one does neither, and is always
    built in.  It is chosen before the socket is connected: once the timer runs, it stays.
    """
    if sock.family in (socket.AF_INET, socket.AF_INET6) and ipaddress.ip_address(address[0]).is_loopback:
        with contextlib.suppress(OSError):  # it may be forbidden to choose: slower, and just as right
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")


# ---- listen ----


def bind(address: SocketAddress) -> list[socket.socket]:
    """Listening, non-blocking sockets, at least one; ChannelError when there can be none."""
    if isinstance(address, UnixAddress):
        return [_bind_unix(address)]
    if isinstance(address, VsockAddress):
        return [_bind_vsock(address)]
    sockets: list[socket.socket] = []
    reason: OSError | None = None
    # a socket for IPv6 often takes IPv4 as well, so it comes first; then IPv4's own is not missed
    for family, protocol, target in sorted(_resolve(address, passive=True), key=lambda entry: -entry[0]):
        try:
            sockets.append(_bind_inet(address, family, protocol, target))
        except OSError as error:
            reason = error
    if sockets:
        return sockets
    number = reason.errno or 0 if reason is not None else 0
    text = f"Failed to find an available port for {address}: {os.strerror(number)}"
    raise ChannelError(text, channel=str(address), errno=number) from reason


def _bind_inet(address: InetAddress, family: int, protocol: int, target: Any) -> socket.socket:
    """The first port of the range that is free; OSError of the last one when none is."""
    host, first, *rest = target
    last = max(first, address.to if address.to is not None else first)
    for port in range(first, last + 1):
        sock = socket.socket(family, socket.SOCK_STREAM, protocol)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, address.ipv4 is False)
            keep_alive(sock, address)
            _do_without_pacing(sock, target)
            sock.bind((host, port, *rest))
            return _listen(sock)
        except OSError:
            sock.close()
            if port == last:
                raise
        except ChannelError:
            sock.close()
            raise
    raise AssertionError("a range of ports has at least one")


def _bind_unix(address: UnixAddress) -> socket.socket:
    name = _unix_name(address)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        remove_path(address)
        sock.bind(name)
        return _listen(sock)
    except OSError as error:
        sock.close()
        text = f"Failed to bind socket to {address.path}: {os.strerror(error.errno or 0)}"
        raise ChannelError(text, channel=address.path, errno=error.errno) from error


def _bind_vsock(address: VsockAddress) -> socket.socket:
    name = _vsock_name(address)
    sock = _new_socket(address, socket.AF_VSOCK, 0)
    try:
        sock.bind((name[0], name[1] or socket.VMADDR_PORT_ANY))
        return _listen(sock)
    except OSError as error:
        sock.close()
        text = f"Failed to bind socket to vsock:{address}: {os.strerror(error.errno or 0)}"
        raise ChannelError(text, channel=str(address), errno=error.errno) from error


def _listen(sock: socket.socket) -> socket.socket:
    sock.listen(1)
    sock.setblocking(False)
    return sock


def remove_path(address: UnixAddress) -> None:
    """Remove a socket that an earlier listener left; anything else at that path stays."""
    if address.abstract:
        return
    with contextlib.suppress(OSError):  # nothing there: bind() says what is wrong, if anything is
        if stat.S_ISSOCK(os.stat(address.path).st_mode):
            os.unlink(address.path)


def is_listening(fd: int) -> bool:
    """Whether *fd* is a socket that takes connections."""
    if not stat.S_ISSOCK(os.fstat(fd).st_mode):
        return False
    sock = socket.socket(fileno=os.dup(fd))
    with sock:
        return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def describe_socket(sock: socket.socket) -> dict[str, Any]:
    """Where a socket listens, in QAPI's form."""
    name = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        if isinstance(name, bytes):
            return {"type": "unix", "path": name[1:].rstrip(b"\0").decode(errors="replace"), "abstract": True}
        return {"type": "unix", "path": name}
    if sock.family == socket.AF_VSOCK:
        return {"type": "vsock", "cid": str(name[0]), "port": str(name[1])}
    version = "ipv6" if sock.family == socket.AF_INET6 else "ipv4"
    return {"type": "inet", "host": name[0], "port": str(name[1]), version: True}


def keep_alive(sock: socket.socket, address: InetAddress) -> None:
    """Let the kernel look after a silent connection, if *address* asks for it; a listener's connections inherit that."""
    if not address.keep_alive:
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    wanted = (
        (socket.TCP_KEEPCNT, "keep-alive-count", address.keep_alive_count),
        (socket.TCP_KEEPIDLE, "keep-alive-idle", address.keep_alive_idle),
        (socket.TCP_KEEPINTVL, "keep-alive-interval", address.keep_alive_interval),
    )
    for option, name, value in wanted:
        if not value:  # 0 is the kernel's own, as in QEMU
            continue
        try:
            sock.setsockopt(socket.IPPROTO_TCP, option, min(value, INT_MAX))
        except OSError as error:
            text = f"Unable to set {name} of {address} to {value}: {os.strerror(error.errno or 0)}"
            raise ChannelError(text, channel=str(address), errno=error.errno) from error


# ---- names ----


def _unix_name(address: UnixAddress) -> str | bytes:
    name = os.fsencode(address.path)
    if len(name) >= SUN_PATH:
        raise ChannelError(f"UNIX socket path '{address.path}' is too long", channel=address.path)
    if not address.abstract:
        return address.path
    return b"\0" + (name if address.tight else name.ljust(SUN_PATH - 1, b"\0"))


def _vsock_name(address: VsockAddress) -> tuple[int, int]:
    numbers = []
    for what, text in (("cid", address.cid), ("port", address.port)):
        if not (text.isascii() and text.isdigit()) or int(text[:11]) > UINT32:
            raise ChannelError(f"Failed to parse {what} '{text}'", channel=str(address))
        numbers.append(int(text))
    return numbers[0], numbers[1]


def _resolve(address: InetAddress, *, passive: bool, numeric: bool = False) -> list[Target]:
    """What host and port of *address* stand for, in the system's order; ChannelError when that is nothing."""
    if address.ipv4 is False and address.ipv6 is False:
        raise ChannelError("Cannot disable IPv4 and IPv6 at same time", channel=str(address))
    flags = (socket.AI_PASSIVE if passive else 0) | (socket.AI_NUMERICHOST if numeric or address.numeric else 0)
    try:
        # as text an ordinary name, too, would go through the tables of international ones: milliseconds, the first time
        host = address.host.encode("ascii" if address.host.isascii() else "idna")
        found = socket.getaddrinfo(host or None, address.port, _family(address), socket.SOCK_STREAM, 0, flags)
    except (socket.gaierror, UnicodeError, OverflowError) as error:
        reason = error.strerror if isinstance(error, socket.gaierror) else str(error)
        raise ChannelError(f"address resolution failed for {address}: {reason}", channel=str(address)) from error
    return [(family, IPPROTO_MPTCP if address.mptcp else protocol, name) for family, _, protocol, _, name in found]


def _family(address: InetAddress) -> int:
    """Both on means IPv6's sockets, which take IPv4 as well."""
    if address.ipv6 or address.ipv4 is False:
        return socket.AF_INET6
    if address.ipv4 or address.ipv6 is False:
        return socket.AF_INET
    return socket.AF_UNSPEC


def _resolve_waiting(address: InetAddress, quit_fd: int) -> list[Target]:
    """The same for connecting, but the quit event ends the wait for a name server.

    The system's resolver cannot be called off.  A thread that is still in it then is left to end by itself: all that it
    touches is its own.
    """
    with contextlib.suppress(ChannelError):
        return _resolve(address, passive=False, numeric=True)
    outcome: list[list[Target] | ChannelError] = []
    done = QuitEvent()

    def resolve() -> None:
        try:
            outcome.append(_resolve(address, passive=False))
        except ChannelError as error:
            outcome.append(error)
        done.set()

    start_thread("mig/resolve", resolve)
    try:
        wait_ready(done.fd, select.POLLIN, quit_fd)
    finally:
        done.close()
    if isinstance(outcome[0], ChannelError):
        raise outcome[0]
    return outcome[0]
