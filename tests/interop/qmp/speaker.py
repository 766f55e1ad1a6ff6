"""One of the two who speak: a VMM, and a monitor of its own for the script."""

from __future__ import annotations

import array
import json
import os
import socket
from typing import Any

import pytest

from qemumig.cli.guest import ALL_CHECKS
from tests.support.vmm import MIB, GuestParameters, Stage, Vmm
from tools.interoplib.peers import real

from .steps import Step, ask, say

PATIENCE_S = 30.0
UUID = "00010203-0405-0607-0809-0a0b0c0d0e0f"


class Speaker:
    """A VMM with a monitor of its own for a script, in a directory of its own; knows nothing of which VMM it is."""

    def __init__(self, stage: Stage, name: str, system: str, *, incoming: bool = False) -> None:
        self.directory = stage.directory / name
        self.directory.mkdir()
        disk = self.directory / "disk.img"
        disk.write_bytes(bytes(MIB))
        path = self.directory / "script.qmp"
        self.vmm: Vmm = stage.vmm(
            name,
            system,
            guest=GuestParameters(flags=ALL_CHECKS, cpus=2),
            memory=32 * MIB,
            incoming=incoming,
            extra=(
                *("-qmp", f"unix:{path},server=on,wait=off", "-name", "vm", "-uuid", UUID),
                *("-object", "memory-backend-ram,id=mem1,size=1M"),
                *("-drive", f"if=none,id=d0,file={disk},format=raw"),
                *("-device", "virtio-blk-device,drive=d0,id=disk,bus=virtio-mmio-bus.0"),
            ),
        )
        if not incoming:  # some answers depend on whether the guest has page tables yet
            assert self.vmm.serial.wait_more(2, PATIENCE_S), self.vmm.serial.output()
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(PATIENCE_S)
        self._socket.connect(str(path))
        self._lines = self._socket.makefile("rb")
        self.greeting = self.message()

    def close(self) -> None:
        self._lines.close()
        self._socket.close()

    def __enter__(self) -> Speaker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def message(self) -> dict[str, Any]:
        """The next message, this VMM's own names in it replaced."""
        line = self._lines.readline()
        assert line, f"{self.vmm.name} closed the connection"
        text = line.decode().replace(str(self.directory), "DIR").replace(f"/{self.vmm.name}.", "/vm.")
        message: dict[str, Any] = json.loads(text)
        message.pop("timestamp", None)
        return message

    def negotiate(self) -> None:
        self.send(ask("qmp_capabilities"))
        assert self.message() == {"return": {}}

    def send(self, step: Step) -> None:
        data = step.request(self.directory)
        if not step.descriptor:
            self._socket.sendall(data)
            return
        with open(os.devnull, "rb") as null:
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [null.fileno()]))
            assert self._socket.sendmsg([data], [rights]) == len(data)

    def answer(self, step: Step) -> list[Any]:
        """What comes back: events on the way, then the response, as the step looks at it."""
        self.send(step)
        if step.malformed:
            return [self.complaint()]
        came: list[Any] = []
        while True:
            message = self.message()
            if "return" in message:
                message["return"] = step.view(message["return"])
            came.append(message)
            if "event" not in message:
                return came

    def complaint(self) -> Any:
        """The first of the errors before the answer to a request that begins anew."""
        self.send(say('\xff{"execute": "query-name", "id": "anew"}'))
        first = message = self.message()
        while message.get("id") != "anew":
            message = self.message()
        return first

    def until(self, event: str, **data: Any) -> list[Any]:
        """Messages up to and with an event."""
        came = []
        while True:
            came.append(self.message())
            if came[-1].get("event") == event and data.items() <= came[-1].get("data", {}).items():
                return came

    def until_answered(self, step: Step, event: str, **data: Any) -> list[Any]:
        """Messages up to and with both an event and the answer to *step*, whichever is last."""
        self.send(step)
        came = self.until(event, **data)
        while not any("return" in message for message in came):
            came.append(self.message())
        return came


def version_of(qemu: str) -> int:
    """The major version."""
    version = real(qemu).version
    assert version is not None
    return version[0]


def require_dialect(qemu: str) -> None:
    if version_of(qemu) != 10:
        pytest.skip("schema and events are compared with QEMU 10, whose dialect is spoken here; this QEMU is another")
