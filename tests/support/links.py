"""A link that carries many connections, of which a chosen one breaks or stalls; for channels of multifd.

Links(port)                                    passes everything
Links(port, Fault(channel=2, after=5000))      the third connection breaks when 5000 bytes have passed
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
from dataclasses import dataclass


@dataclass
class Fault:
    """What happens to connection *channel* (0: the first, the main one) when *after* bytes have passed forwards.

    *how*: "reset", "end" (a clean end on both sides), or "stall" (nothing passes any more, and it stays open).
    """

    channel: int
    after: int
    how: str = "reset"


class Links:
    """A relay in front of *target_port*; `port` is where the source connects."""

    def __init__(self, target_port: int, fault: Fault | None = None) -> None:
        self._target_port = target_port
        self._fault = fault
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port: int = self._listener.getsockname()[1]
        self.connections = 0
        self.struck = threading.Event()
        self._stop, self._wake = socket.socketpair()
        self._threads: list[threading.Thread] = []
        self._sockets: list[socket.socket] = []
        self._start(self._accept)

    def _start(self, body: object, *arguments: object) -> None:
        thread = threading.Thread(target=body, args=arguments, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while self._listener in select.select([self._listener, self._stop], [], [])[0]:
            near, _ = self._listener.accept()
            self._sockets.append(near)
            try:
                far = socket.create_connection(("127.0.0.1", self._target_port))
            except ConnectionError:  # the destination listens no more
                near.close()
                continue
            self._sockets.append(far)
            fault = self._fault if self._fault is not None and self._fault.channel == self.connections else None
            self.connections += 1
            self._start(self._relay, near, far, fault)

    def _relay(self, near: socket.socket, far: socket.socket, fault: Fault | None) -> None:
        ways = {near: far, far: near}
        passed = 0
        while ways:
            ready = select.select([*ways, self._stop], [], [])[0]
            if self._stop in ready:
                return
            for source in ready:
                limit = 65536 if fault is None or source is far else max(1, min(65536, fault.after - passed))
                data = self._pass(source, ways[source], limit)
                passed += data if source is near else 0
                if not data:
                    del ways[source]
            if fault is not None and passed >= fault.after:
                self._strike(near, far, fault)
                return

    @staticmethod
    def _pass(source: socket.socket, target: socket.socket, limit: int) -> int:
        try:
            data = source.recv(limit)
            target.sendall(data)
        except OSError:
            data = b""
        if not data:
            with contextlib.suppress(OSError):
                target.shutdown(socket.SHUT_WR)
        return len(data)

    def _strike(self, near: socket.socket, far: socket.socket, fault: Fault) -> None:
        self.struck.set()
        if fault.how == "stall":
            return
        for sock in (near, far):
            if fault.how == "reset":
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()

    def close(self) -> None:
        """A second call does nothing."""
        self._wake.close()
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)  # wakes whoever is in the middle of a write
        for thread in self._threads:
            thread.join()
        self._threads.clear()
        for sock in (*self._sockets, self._listener, self._stop):
            sock.close()
