"""A channel of multifd, and the other end of it."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

from qemumig.channels.channel import QuitEvent, SocketChannel

LOOPBACK = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}


def socket_pair(family: socket.AddressFamily) -> tuple[socket.socket, socket.socket]:
    """Two ends that are connected, over loopback or within the kernel."""
    if family == socket.AF_UNIX:
        return socket.socketpair()
    with socket.create_server((LOOPBACK[family], 0), family=family) as listener:
        near = socket.create_connection(listener.getsockname()[:2])
        return near, listener.accept()[0]


@contextlib.contextmanager
def connection(family: socket.AddressFamily = socket.AF_INET) -> Iterator[tuple[SocketChannel, socket.socket, QuitEvent]]:
    """A channel, the other end of it, and what tells it to quit."""
    alarm = QuitEvent()
    near, far = socket_pair(family)
    channel = SocketChannel("near", near, alarm.fd)
    try:
        yield channel, far, alarm
    finally:
        for end in (channel, far, alarm):
            end.close()
