"""A test harness for QEMU, as such programs are: it knows nothing of the one it drives (qtest.md §3).

    harness ─ listens on two sockets ─▶ sh -c "exec PROGRAM -qtest … -mon … OWN ARGUMENTS -accel qtest"
            ◀─ qtest, then QMP: each must connect ─

Ends a program with SIGTERM and wants status 0, or the one that it was told to expect.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
from pathlib import Path
from typing import Any, BinaryIO

ACCEPT_S = 50.0
ANSWER_S = 60.0
QUIT_S = 30.0


class Harness:
    """One program that it drives; *arguments* are the test's own."""

    def __init__(self, program: str, directory: Path, name: str, arguments: str) -> None:
        self.expected_status = 0
        self._events: list[dict[str, Any]] = []
        paths = [directory / f"qtest-{name}.sock", directory / f"qtest-{name}.qmp"]
        listeners = [_listen(path) for path in paths]
        command = (
            f"exec {program} -qtest unix:{paths[0]} -qtest-log /dev/null "
            f"-chardev socket,path={paths[1]},id=char0 -mon chardev=char0,mode=control "
            f"-display none -audio none -run-with exit-with-parent=on {arguments} -accel qtest"
        )
        self.log = directory / f"{name}.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(["sh", "-c", command], stdin=subprocess.DEVNULL, stderr=log)
        self._connections: list[socket.socket] = []
        self._files: list[BinaryIO] = []
        try:
            for listener in listeners:
                self._accept(listener)
            self._negotiate()
        except BaseException:
            self.close()
            raise
        finally:
            for listener in listeners:
                listener.close()

    def _accept(self, listener: socket.socket) -> None:
        listener.settimeout(ACCEPT_S)
        connection, _ = listener.accept()
        connection.settimeout(ANSWER_S)
        self._connections.append(connection)
        self._files.append(connection.makefile("rb"))

    def _negotiate(self) -> None:
        assert self.qtest("endianness") == "OK little"
        assert "QMP" in json.loads(self._files[1].readline())
        self.command("qmp_capabilities")

    # ---- qtest ----

    def qtest(self, request: str) -> str:
        """The answer to one line."""
        self._connections[0].sendall(f"{request}\n".encode())
        return self._files[0].readline().decode().rstrip("\n")

    def read(self, address: int, size: int) -> bytes:
        """Guest memory."""
        answer = self.qtest(f"read {address:#x} {size:#x}")
        assert answer.startswith("OK 0x"), answer
        return bytes.fromhex(answer.removeprefix("OK 0x"))

    # ---- QMP ----

    def ask(self, name: str, /, fds: tuple[int, ...] = (), **arguments: Any) -> dict[str, Any]:
        """The response; events on the way are kept.  Underscores of *arguments* become dashes."""
        named = {key.replace("_", "-"): value for key, value in arguments.items()}
        request = json.dumps({"execute": name, "arguments": named}).encode() + b"\n"
        if fds:
            socket.send_fds(self._connections[1], [request], list(fds))
        else:
            self._connections[1].sendall(request)
        while "event" in (message := self._message()):
            self._events.append(message)
        return message

    def _message(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(self._files[1].readline())
        return message

    def command(self, name: str, /, fds: tuple[int, ...] = (), **arguments: Any) -> Any:
        """The value of a command that must succeed."""
        response = self.ask(name, fds, **arguments)
        assert "return" in response, response
        return response["return"]

    def event(self, name: str, **data: Any) -> dict[str, Any]:
        """The next event of that name with that data; those before it are dropped."""
        while True:
            message = self._events.pop(0) if self._events else self._message()
            if message["event"] == name and data.items() <= message.get("data", {}).items():
                return message

    # ---- the end ----

    def quit(self) -> None:
        """SIGTERM; the status must be the expected one."""
        self.process.terminate()
        self.wait_end()

    def wait_end(self) -> None:
        """The program ends by itself."""
        status = self.process.wait(QUIT_S)
        assert status == self.expected_status, (status, self.log.read_text())
        self.close()

    def close(self) -> None:
        """Whatever state it is in."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for one in (*self._files, *self._connections):
            one.close()


def _listen(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    if path.exists():
        os.unlink(path)
    listener.bind(str(path))
    listener.listen(1)
    return listener


def program(command: str) -> str:
    """*command* as a harness pastes it into its own."""
    return shlex.join(shlex.split(command))
