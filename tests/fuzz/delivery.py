"""Bytes that lie ready on a channel when the loader begins, cut into the pieces in which a network might bring them.

Nobody has to send them meanwhile: they all fit into the socket, and the end of the stream is behind them.  A read that
reaches the end of a piece stops there, because a descriptor goes along with it, which is a barrier to reads (unix(7)).
"""

from __future__ import annotations

import array
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from qemumig.channels.channel import QuitEvent, SocketChannel

ROOM = 72 << 10  # fits into a socket with all its pieces, and holds sixteen pages
PIECES = (0, 1, 5, 8, 13, 100, 1344, 4096, 4100, 4104, 4105, 8208)  # 0: all at once
MOST_PIECES = 48  # then the rest


def piece_length(choice: int) -> int:
    return PIECES[choice % len(PIECES)]


def send(sock: socket.socket, data: bytes, piece: int, barrier: int) -> None:
    """Send *data*, each of the first *piece* bytes with descriptor *barrier*."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    at = 0
    while piece and at + piece < len(data) and at < MOST_PIECES * piece:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [barrier]))]
        sock.sendmsg([data[at : at + piece]], ancillary)
        at += piece
    sock.sendall(data[at:])
    sock.shutdown(socket.SHUT_WR)


@contextmanager
def delivered(data: bytes, piece: int = 0) -> Iterator[SocketChannel]:
    """A channel on which *data* lies ready."""
    event = QuitEvent()
    near, far = socket.socketpair()
    near.settimeout(1.0)  # what does not fit is a fault of the caller
    channel = SocketChannel("fuzz", far, event.fd)
    try:
        send(near, data, piece, event.fd)
        yield channel
    finally:
        near.close()
        channel.close()
        event.close()
