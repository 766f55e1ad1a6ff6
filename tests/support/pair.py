"""A source and a destination without KVM, joined by a link that can be cut at a chosen byte.

    with Pair() as pair:                       FakeMachines with a guest that checks itself
        pair.migrate()
        pair.assert_guest_at("destination")

    Pair(cut=Cut(after=5000, how="reset"))     the link passes 5000 bytes, then it breaks

The link is a relay over TCP on loopback; a cut ends both of its connections at once, by a reset or by a clean end.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from qemumig.channels.address import InetAddress
from qemumig.channels.objects import create_object
from qemumig.destination.incoming import IncomingMigration
from qemumig.options import MigrationOptions
from qemumig.qapi import MigrationStatus, RunState
from qemumig.source.migration import Migration
from tests.support.fake_machine import FakeMachine

PATIENCE_S = 20.0


@dataclass
class Cut:
    """Break the link when *after* bytes have passed from source to destination (*backwards*: the other way)."""

    after: int
    how: str = "reset"  # or "end": a clean end of stream on both sides
    backwards: bool = False


class Link:
    """A relay in front of *target_port*; `port` is where the source connects."""

    def __init__(self, target_port: int, cut: Cut | None) -> None:
        self._target_port = target_port
        self._cut = cut
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.passed = [0, 0]  # forwards, backwards
        self.tail = b""  # the last of what passed forwards
        self._mark: tuple[int, Callable[[], None]] | None = None
        self._sockets: list[socket.socket] = []
        self._wake_read, self._wake_write = os.pipe()
        self._thread = threading.Thread(target=self._relay, daemon=True)
        self._thread.start()

    def _relay(self) -> None:
        if select.select([self._listener, self._wake_read], [], [])[0] != [self._listener]:
            return
        near, _ = self._listener.accept()
        try:
            far = socket.create_connection(("127.0.0.1", self._target_port))
        except ConnectionError:  # the destination listens no more
            near.close()
            return
        self._sockets = [near, far]
        open_ways = {near: (far, 0), far: (near, 1)}
        while open_ways:
            ready = select.select([*open_ways, self._wake_read], [], [])[0]
            if self._wake_read in ready:
                return
            for source in ready:
                target, way = open_ways[source]
                if not self._pass(source, target, way):
                    del open_ways[source]
                if self._is_over():
                    self._break()
                    return

    def _pass(self, source: socket.socket, target: socket.socket, way: int) -> bool:
        try:
            data = source.recv(self._room(way))
            target.sendall(data)
        except OSError:  # one end is gone: let the other one know
            data, self._cut = b"", Cut(0)
        self.passed[way] += len(data)
        if way == 0:
            self.tail = (self.tail + data)[-65536:]
            self._look_at_mark()
        if not data:
            with contextlib.suppress(OSError):
                target.shutdown(socket.SHUT_WR)
        return bool(data)

    def at(self, after: int, action: Callable[[], None]) -> None:
        """Call *action*, which does not wait, when *after* bytes have passed forwards; nothing passes meanwhile."""
        self._mark = after, action

    def _look_at_mark(self) -> None:
        if self._mark is not None and self.passed[0] >= self._mark[0]:
            (_, action), self._mark = self._mark, None
            action()

    def _room(self, way: int) -> int:
        stops = [self._mark[0]] if self._mark is not None and way == 0 else []
        if self._cut is not None and self._cut.backwards == bool(way):
            stops.append(self._cut.after)
        return max(1, min([65536, *(stop - self.passed[way] for stop in stops)]))

    @property
    def is_used(self) -> bool:
        """Whether the source has connected."""
        return bool(self._sockets)

    def _is_over(self) -> bool:
        return self._cut is not None and self.passed[self._cut.backwards] >= self._cut.after

    def _break(self) -> None:
        assert self._cut is not None
        for sock in (sock for sock in self._sockets if sock.fileno() >= 0):
            if self._cut.how == "reset":
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            else:
                while select.select([sock], [], [], 0.02)[0] and self._drain(sock):
                    pass  # what is unread would turn the clean end into a reset
            sock.close()

    @staticmethod
    def _drain(sock: socket.socket) -> bool:
        try:
            return bool(sock.recv(65536))
        except OSError:
            return False

    def cut(self, how: str) -> None:
        """Break the link now."""
        self._wake()  # first: the relay obeys a cut by itself when a byte passes
        self._cut = Cut(0, how)
        self._break()

    def cut_after(self, more: int, how: str) -> None:
        """Break the link when *more* bytes have passed from now on."""
        self._cut = Cut(self.passed[0] + more, how)

    def _wake(self) -> None:
        os.write(self._wake_write, b"x")
        self._thread.join()

    def stop(self) -> None:
        """Pass nothing any more, nor take a connection."""
        self._wake()
        for sock in (*self._sockets, self._listener):
            sock.close()

    def close(self) -> None:
        self.stop()
        os.close(self._wake_read)
        os.close(self._wake_write)


def no_fd(name: str) -> int:
    raise KeyError(name)


def certificates(directory: Path) -> dict[str, Any]:
    """Credentials `client` and `server` from the certificates in *directory*."""
    return {
        side: create_object("tls-creds-x509", side, {"dir": str(directory), "endpoint": side}, lambda name: None)
        for side in ("client", "server")
    }


class Pair:
    """Two fake machines and their migrations; *running*: the source's guest runs; *tls*: a directory of certificates."""

    def __init__(
        self,
        *,
        cut: Cut | None = None,
        manual_clear: bool = True,
        running: bool = True,
        capabilities: dict[str, bool] | None = None,
        parameters: dict[str, Any] | None = None,
        ram_size: int = 4 << 20,
        exit_on_error: bool = False,
        shared_ram: mmap.mmap | None = None,
        tls: Path | None = None,
    ) -> None:
        self.events: dict[str, list[Any]] = {"source": [], "destination": []}
        self.failures: list[str] = []
        self.fds: dict[str, int] = {}  # descriptors that were passed to the source
        self.source = FakeMachine(ram_size, guest=True, manual_clear=manual_clear, shared_ram=shared_ram)
        self.destination = FakeMachine(
            ram_size, guest=True, manual_clear=manual_clear, incoming=True, shared_ram=shared_ram
        )
        for offset in range(2 << 20, ram_size, 3 * 4096):
            self.source.write(self.source.ram, offset, os.urandom(4096))
        self.is_enciphered = tls is not None
        objects = certificates(tls) if tls is not None else {}
        here, there = MigrationOptions(), MigrationOptions()
        for options, creds in ((here, "client"), (there, "server")):
            options.set_capabilities({"events": True, **(capabilities or {})}.items())
            options.set_parameters(parameters or {"max-bandwidth": 0})
            options.set_parameters({"tls-creds": creds if tls is not None else ""})
        self.migration = Migration(
            self.source, here, emit=self._emit("source"), take_fd=self.fds.pop, find_object=objects.get
        )
        self.incoming = IncomingMigration(
            self.destination,
            there,
            emit=self._emit("destination"),
            take_fd=no_fd,
            find_object=objects.get,
            on_failure=self.failures.append,
        )
        self.incoming.listen(InetAddress("127.0.0.1", "0"), exit_on_error=exit_on_error)
        self.link = Link(int(self.incoming.query()["socket-address"][0]["port"]), cut)
        if running:
            self.source.start()

    def _emit(self, side: str) -> Callable[..., None]:
        return lambda name, data=None: self.events[side].append((name, *(data or {}).values()))

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.migration.close()
        self.incoming.close()
        self.link.close()
        self.source.close()
        self.destination.close()

    def start(self) -> None:
        self.migration.start(InetAddress("127.0.0.1", str(self.link.port)))

    def wait(self) -> None:
        """Until both sides have come to an end."""
        wait_for(lambda: not self.migration.is_running, "the source to end")
        ends = (MigrationStatus.COMPLETED, MigrationStatus.FAILED)
        wait_for(lambda: self.incoming.status in ends, "the destination to end")

    def migrate(self) -> None:
        self.start()
        self.wait()

    @property
    def statuses(self) -> tuple[str, str]:
        return self.migration.status.value, self.incoming.status.value

    @property
    def running(self) -> list[str]:
        """The sides on which the guest runs."""
        machines = {"source": self.source, "destination": self.destination}
        return [side for side, machine in machines.items() if machine.runstate is RunState.RUNNING]

    def assert_guest_at(self, side: str) -> None:
        """The guest runs there and nowhere else, goes on, and finds its memory as it left it."""
        assert self.running == [side]
        guest = {"source": self.source, "destination": self.destination}[side].guest
        assert guest is not None
        passes = guest.passes
        wait_for(lambda: guest.passes > passes + 1 or guest.bad_page is not None, "the guest to go on")
        assert guest.bad_page is None


def wait_for(condition: Callable[[], bool], what: str) -> None:
    """Until *condition* holds; fails the test when it does not within a generous time."""
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.002)
