"""A small QMP client: one thread, blocking, every wait bounded.

It serves any VMM that speaks QMP on a Unix socket (qmp.md §1), so that the tools drive QEMU and qemumig-system
alike.  Events are kept in the order in which they came.
"""

from __future__ import annotations

import json
import socket
import time
from typing import Any

LINE_LIMIT = 16 << 20  # bytes of one message; the longest real ones are a few hundred KiB


class QmpError(Exception):
    """The connection broke, or the other end refused a command."""


class QmpEnded(QmpError):
    """The connection is no more: the other end has closed it, or has gone."""


class QmpClient:
    """One monitor connection; *name* is what errors call the other end."""

    def __init__(self, name: str, connection: socket.socket, timeout: float = 30) -> None:
        self.name = name
        self.timeout = timeout  # seconds a command may take
        self.events: list[dict[str, Any]] = []
        self._socket = connection
        self._buffer = b""
        self.greeting = self._message("its greeting", time.monotonic() + timeout)
        self.command("qmp_capabilities")

    @property
    def version(self) -> str:
        """The version the greeting names, with its package."""
        version = self.greeting["QMP"]["version"]
        number = ".".join(str(version["qemu"][part]) for part in ("major", "minor", "micro"))
        return f"{number} ({version['package']})" if version.get("package") else number

    def command(self, command: str, /, **arguments: Any) -> Any:
        """Execute *command* and return its result; underscores in argument names become dashes."""
        request: dict[str, Any] = {"execute": command}
        if arguments:
            request["arguments"] = {key.replace("_", "-"): value for key, value in arguments.items()}
        deadline = time.monotonic() + self.timeout
        self._send(json.dumps(request).encode() + b"\n", command)
        while True:
            message = self._message(f"the answer to {command}", deadline)
            if "error" in message:
                raise QmpError(f"{self.name} refuses {command}: {message['error']['desc']}")
            if "return" in message:
                return message["return"]
            self.events.append(message)

    def give_fd(self, name: str, fd: int) -> None:
        """Let the other end have a duplicate of descriptor *fd*, known to it as *name* from now on."""
        socket.send_fds(self._socket, [b" "], [fd])  # descriptors travel with the bytes around the request
        self.command("getfd", fdname=name)

    def add_fd(self, fd: int) -> str:
        """Let the other end have a duplicate of *fd* in a set of its own; the path by which that is opened."""
        socket.send_fds(self._socket, [b" "], [fd])
        return f"/dev/fdset/{self.command('add-fd')['fdset-id']}"

    def wait_event(self, name: str, timeout: float, **data: Any) -> dict[str, Any]:
        """The first event *name*, come or to come, whose data has all of *data*; it is taken out of the list."""
        deadline = time.monotonic() + timeout
        seen = 0
        while True:
            for index, event in enumerate(self.events[seen:], seen):
                if event["event"] == name and data.items() <= event.get("data", {}).items():
                    return self.events.pop(index)
            seen = len(self.events)
            self.events.append(self._message(f"event {name}", deadline))

    def close(self) -> None:
        """Close the connection; the VMM lives on."""
        self._socket.close()

    def _send(self, request: bytes, command: str) -> None:
        try:
            self._socket.settimeout(self.timeout)
            self._socket.sendall(request)
        except OSError as error:
            raise QmpEnded(f"{self.name} does not take {command}: {error}") from error

    def _message(self, what: str, deadline: float) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            self._receive(what, deadline)
        line, _, self._buffer = self._buffer.partition(b"\n")
        try:
            message = json.loads(line)
        except ValueError as error:
            raise QmpError(f"{self.name} sent no JSON instead of {what}: {line[:80]!r}") from error
        if not isinstance(message, dict):
            raise QmpError(f"{self.name} sent {line[:80]!r} instead of {what}")
        return message

    def _receive(self, what: str, deadline: float) -> None:
        left = deadline - time.monotonic()
        if left <= 0 or len(self._buffer) > LINE_LIMIT:
            raise QmpError(f"{self.name}: waited in vain for {what}")
        self._socket.settimeout(left)
        try:
            data = self._socket.recv(65536)
        except TimeoutError:
            return
        except OSError as error:
            raise QmpEnded(f"{self.name}: the monitor broke while waiting for {what}: {error}") from error
        if not data:
            raise QmpEnded(f"{self.name}: the monitor closed while waiting for {what}")
        self._buffer += data
