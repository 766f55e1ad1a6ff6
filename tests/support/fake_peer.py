"""A destination without a machine: it reads a stream, and says on the return path what a test wants it to say."""

from __future__ import annotations

import socket
import threading

from qemumig.savevm import commands
from tests.support.pair import Pair


def ping(value: int) -> bytes:
    return commands.encode_command(commands.Ping(value))


def pong(value: int) -> bytes:
    return commands.encode_return_message(commands.Pong(value))


def read_until(connection: socket.socket, last: bytes) -> None:
    """Take a stream in until *last* has come, and answer the pings that a source waits for before it stops the guest."""
    tail, due = b"", [1, 0x41]
    while last not in tail:
        more = connection.recv(1 << 20)
        assert more, "the source went away"
        tail = tail[-64:] + more
        while due and ping(due[0]) in tail:
            connection.sendall(pong(due.pop(0)))


class FakePeer:
    """A destination that says on the return path what a test wants it to say."""

    def __init__(self, answer: bytes, *, close: bool = True) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self._answer = answer
        self._close = close
        self.has_last_write = threading.Event()  # some of it
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()

    def _serve(self) -> None:
        connection, _ = self.listener.accept()
        data = b""
        while b'"devices"' not in data[-200000:] or not data.endswith(b"}"):
            more = connection.recv(1 << 20)
            if not more:
                break
            data += more
            for ping in (1, 0x10):  # the last one comes behind the last section
                if data.endswith(commands.encode_command(commands.Ping(ping))):
                    connection.sendall(commands.encode_return_message(commands.Pong(ping)))
        self.has_last_write.set()
        connection.sendall(self._answer)
        if not self._close:
            self.done.wait(10)
        connection.close()

    def close(self) -> None:
        self.done.set()
        self.thread.join()
        self.listener.close()


def migrate_to(peer: FakePeer, pair: Pair) -> None:
    pair.link.port = peer.port
    pair.start()
