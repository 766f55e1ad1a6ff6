"""Two ends of TLS for a test, and what they do with each other."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qemumig.channels.channel import Channel, QuitEvent, SocketChannel
from qemumig.channels.tls import TlsChannel, TlsClient, TlsServer
from qemumig.wire.stream import InputStream, OutputStream

from .pki import make, x509_directory

MIB = 1 << 20


@dataclass
class Parameters:
    """Migration parameters as the rooms of TLS ask for them."""

    creds: str = ""
    hostname: str = ""
    authz: str = ""

    def parameter(self, name: str) -> str:
        return str(getattr(self, name.removeprefix("tls-")))


Result = TlsChannel | Exception


def attempt(wrap: Callable[[Channel], TlsChannel], channel: Channel) -> Result:
    try:
        return wrap(channel)
    except Exception as error:
        return error


def in_thread(action: Callable[[], Any]) -> Callable[[], Any]:
    """Start *action*; the function that waits for it gives its result, or raises what it raised."""
    result: list[Any] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            result.append(action())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()

    def wait() -> Any:
        thread.join()
        if errors:
            raise errors[0]
        return result[0]

    return wait


def shake(client: TlsClient, server: TlsServer, quit_event: QuitEvent) -> tuple[Result, Result]:
    """Both ends of a handshake over a pair of sockets: a channel each, or what went wrong."""
    left, right = socket.socketpair()
    wait = in_thread(lambda: attempt(client.wrap, SocketChannel("left", left, quit_event.fd)))
    there = attempt(server.wrap, SocketChannel("right", right, quit_event.fd))
    return wait(), there


def pair(tmp_path: Path, quit_event: QuitEvent) -> tuple[TlsChannel, TlsChannel]:
    """A source's and a destination's channel."""
    client, server = shake(*certificates(tmp_path), quit_event)
    assert isinstance(client, TlsChannel) and isinstance(server, TlsChannel)
    return client, server


def certificates(tmp_path: Path, hostname: str = "localhost") -> tuple[TlsClient, TlsServer]:
    directory = str(x509_directory(tmp_path / "x509"))
    client, server = (make("tls-creds-x509", dir=directory, endpoint=endpoint) for endpoint in ("client", "server"))
    return TlsClient(client, hostname), TlsServer(server, None)


def send(channel: Channel, data: bytes) -> None:
    out = OutputStream(channel)
    out.write(data)
    out.flush()


def exchange(source: TlsChannel, destination: TlsChannel) -> None:
    """Bytes go both ways at once, in pieces of every size, and the end is announced."""
    data, answer = os.urandom(3 * MIB + 17), os.urandom(MIB + 1)
    answering = in_thread(lambda: send(destination, answer))
    writing = in_thread(lambda: send(source, data))
    reading = in_thread(lambda: InputStream(source).read(len(answer)))
    stream = InputStream(destination)
    got = b"".join(stream.read(size) for size in (1, 2, 16384, 16385, 100000))
    assert got + stream.read(len(data) - len(got)) == data
    assert reading() == answer
    writing(), answering()
    closing = in_thread(source.close)  # a command is waited for, and that may wait for the other side
    assert stream.peek(1) == b""
    destination.close()
    closing()


def x509(path: Path, endpoint: str, **properties: Any) -> Any:
    return make("tls-creds-x509", dir=str(path), endpoint=endpoint, **properties)
