"""The monitors and the qtest connection of one program: opened early, served when there is something to steer.

    open          back ends: sockets listen; QMP monitors know what to say already
    serve_people  HMP monitors, which want a shell
    serve_qtest   the harness, which wants a machine
    stop, close   in this order, before the machine goes

Threads   the loop's; the qtest protocol has one of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from ..arguments import MonitorRequest
from ..chardev import CharBackend
from ..chardev_options import NO_DRIVER, CharDevices
from ..keyval import UsageError
from .events import EventHub
from .hmp import HumanMonitor, HumanShell
from .qmp import QmpMonitor
from .qtest import HarnessedMachine, HarnessedTime, InputPins, QtestServer, open_log
from .registry import Registry


class FrontDoors:
    """All of them; back ends come from *devices*, commands from *registry*, events from *hub*."""

    def __init__(self, devices: CharDevices, registry: Registry, hub: EventHub) -> None:
        self._devices = devices
        self._registry = registry
        self._hub = hub
        self._for_people: list[CharBackend] = []
        self._monitors: list[QmpMonitor | HumanMonitor] = []
        self._harness: tuple[CharBackend, str | None] | None = None
        self._qtest: QtestServer | None = None

    def open(self, requests: Sequence[MonitorRequest]) -> None:
        """Make what *requests* ask for; UsageError names the option."""
        for index, request in enumerate(requests):
            backend = self._back_end(request, f"compat_monitor{index}")
            if request.human:
                self._for_people.append(backend)
            else:
                self._monitors.append(QmpMonitor(backend, self._registry, self._hub, request.pretty))

    def _back_end(self, request: MonitorRequest, label: str) -> CharBackend:
        if not request.device:
            try:
                return self._devices.claim(request.chardev)
            except UsageError as error:
                raise error.during(request.option) from error
        try:
            return self._devices.add_device(request.option, request.device, label)
        except UsageError as error:
            if not error.messages[0].endswith(NO_DRIVER):
                raise
            consequence = f"{request.option} {request.device}: parse error: {request.device}"
            raise UsageError(*error.messages, consequence) from error

    def open_qtest(self, device: str, log: str | None) -> None:
        """Make the back end of the harness; UsageError."""
        try:
            backend = self._devices.add_device("-qtest", device, "qtest")
        except UsageError as error:
            named = f"-qtest {device}: "
            lines = [text.removeprefix(named) for text in error.messages]
            raise UsageError(*lines, f'Failed to initialize device for qtest: "{device}"', hints=error.hints) from error
        self._harness = backend, log

    def serve_people(self, shell: HumanShell) -> None:
        """Give them a shell."""
        backends = (*self._for_people, *self._devices.for_people)
        self._monitors += [HumanMonitor(backend, shell) for backend in backends]

    def serve_qtest(self, machine: HarnessedMachine, pins: Mapping[str, InputPins], time: HarnessedTime | None) -> None:
        """Give the harness, if there is one, the machine."""
        if self._harness is not None:
            backend, log = self._harness
            self._qtest = QtestServer(backend, machine, pins, open_log(log), time)

    def stop(self) -> None:
        """Begin no further command."""
        for monitor in self._monitors:
            monitor.stop()

    async def close(self) -> None:
        """Let what runs end, and what was written leave."""
        if self._qtest is not None:
            await self._qtest.close()
        await asyncio.gather(*(monitor.close() for monitor in self._monitors))
