"""One client of a QMP monitor, from its greeting until it goes away (qmp.md §1).

    greeting ─▶ negotiating ─ qmp_capabilities ─▶ command mode

In    JSON values of the client.  They wait in a queue of one, or of eight when the client enabled `oob`; while
      the queue is full nothing is read.  `exec-oob` requests do not queue.
Out   one response a request, in order; events between them, once negotiation is over

Threads   the loop's, alone
Holds     (1) at most one queued command of a client runs at a time, and its response leaves before the next runs
          (2) a response never reaches another client than the one that asked
          (3) a command runs only when the client has read most of what was sent to it before
          (4) every descriptor that arrives is taken by a command or closed
"""

from __future__ import annotations

import asyncio
import sys
import traceback
from collections import deque
from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qemumig.commands.command import Command, CommandError

from .. import trace
from ..chardev import close_descriptors
from .json_stream import INCOMPLETE, JsonError, JsonStream, dump

if TYPE_CHECKING:
    from .qmp import QmpMonitor

OOB_QUEUE = 8  # requests that may wait, the one that runs included
EMULATED = {"major": 10, "minor": 0, "micro": 0}  # the dialect that is spoken
PACKAGE = "qemumig 0.1.0"

current_session: ContextVar[Session] = ContextVar("current_session")  # whose command this is


def version() -> dict[str, Any]:
    """What the greeting and query-version say."""
    return {"qemu": dict(EMULATED), "package": PACKAGE}


@dataclass
class Request:
    """One value from the client, or what was wrong with it; and the descriptors that came with it."""

    value: Any = None
    fault: JsonError | None = None
    descriptors: list[int] = field(default_factory=list)


@dataclass
class Call:
    """A request that has the right form."""

    name: str
    arguments: dict[str, Any]
    oob: bool


def understand(value: Any, oob_enabled: bool) -> Call:
    """The command that *value* asks for; CommandError when its form is wrong."""
    if not isinstance(value, dict):
        raise CommandError("QMP input must be a JSON object")
    verb = ""
    for member, content in value.items():
        if member == "execute" or (member == "exec-oob" and oob_enabled):
            if verb:
                raise CommandError(f"QMP input member '{member}' clashes with '{verb}'")
            if not isinstance(content, str):
                raise CommandError(f"QMP input member '{member}' must be a string")
            verb = member
        elif member == "arguments":
            if not isinstance(content, dict):
                raise CommandError("QMP input member 'arguments' must be an object")
        elif member != "id":
            raise CommandError(f"QMP input member '{member}' is unexpected")
    if not verb:
        raise CommandError("QMP input lacks member 'execute'")
    return Call(value[verb], value.get("arguments", {}), verb == "exec-oob")


class Session:
    """The client that has just connected to *monitor*; `end` when it has gone."""

    def __init__(self, monitor: QmpMonitor) -> None:
        self.monitor = monitor
        self._gone = False
        self._negotiated = False
        self._oob = False
        self._stream = JsonStream()
        self._queue: deque[Request] = deque()  # the first is the one that runs
        self._work = asyncio.Event()
        self._running: dict[asyncio.Task, Command] = {}
        self._urgent = 0  # out-of-band requests that run
        self._arriving: list[int] = []  # descriptors of a request that is not complete yet
        self._loose: list[int] = []  # descriptors that came with the last request that had any
        monitor.spawn(self._serve())

    def greet(self) -> None:
        """Say who we are."""
        self.monitor.write(self.monitor.encode({"QMP": {"version": version(), "capabilities": ["oob"]}}))

    def end(self) -> set[asyncio.Task]:
        """The client has gone: what waits is dropped.  The tasks whose commands still run, for somebody to watch."""
        self._gone = True
        self.monitor.hub.unsubscribe(self._on_event)
        for request in self._queue:
            close_descriptors(request.descriptors)
        close_descriptors(self._arriving + self._loose)
        self._arriving, self._loose = [], []
        self._queue.clear()
        self.wake()
        for task, command in self._running.items():
            if command.leaves_with_client:
                task.cancel()
        return set(self._running)

    def wake(self) -> None:
        """Have the session look whether it shall go on."""
        self._work.set()

    @property
    def _over(self) -> bool:
        return self._gone or self.monitor.stopping

    # ---- requests: from bytes to the queue ----

    def received(self, data: bytes, descriptors: list[int]) -> None:
        """Bytes of the client, and the descriptors that came with them."""
        if descriptors:
            close_descriptors(self._arriving)
            self._arriving = descriptors
        self._stream.feed(data)
        self._pump()

    def _pump(self) -> None:
        """Turn bytes into requests while there is room for them, and read on only if there is."""
        while len(self._queue) < self._room() and self._urgent < OOB_QUEUE and not self._over:
            request = self._next_request()
            if request is None:
                self.monitor.listen(True)
                return
            if self._is_urgent(request):
                self._urgent += 1
                self.monitor.spawn(self._answer_urgent(request))
            else:
                self._queue.append(request)
                self.wake()
        if not self._gone:
            self.monitor.listen(False)

    def _room(self) -> int:
        return OOB_QUEUE if self._oob else 1

    def _next_request(self) -> Request | None:
        try:
            value = self._stream.next_value()
        except JsonError as error:
            return Request(fault=error)
        if value is INCOMPLETE:
            return None
        request = Request(value, descriptors=self._arriving)
        self._arriving = []
        return request

    def _is_urgent(self, request: Request) -> bool:
        return self._oob and isinstance(request.value, dict) and "exec-oob" in request.value

    # ---- requests: from the queue to the response ----

    async def _serve(self) -> None:
        current_session.set(self)
        while not self._over:
            self._work.clear()
            while self._queue and not self._over:
                await self.monitor.drain()
                if self._gone:
                    return
                await self._answer(self._queue[0])
                if self._gone:
                    return
                self._queue.popleft()
                self._pump()
                await asyncio.sleep(0)  # the turn of other monitors
            if not self._over:
                await self._work.wait()

    async def _answer_urgent(self, request: Request) -> None:
        current_session.set(self)
        try:
            await self._answer(request)
        finally:
            self._urgent -= 1
        if not self._gone:
            self._pump()

    async def _answer(self, request: Request) -> None:
        if request.descriptors:
            close_descriptors(self._loose)
            self._loose, request.descriptors = request.descriptors, []
        if trace.handle_qmp_command.enabled and request.fault is None:
            trace.handle_qmp_command(dump(request.value).decode().rstrip())
        response = await self._execute(request)
        if trace.monitor_qmp_respond.enabled:
            trace.monitor_qmp_respond(response.decode().rstrip())
        if not self._gone:
            self.monitor.write(response)

    async def _execute(self, request: Request) -> bytes:
        """Run what *request* asks for; the response, whatever happens."""
        identity = {}
        if isinstance(request.value, dict) and "id" in request.value:
            identity["id"] = request.value["id"]
        try:
            if request.fault is not None:
                raise CommandError(str(request.fault))
            result = await self._run(understand(request.value, self._oob))
            return self.monitor.encode({"return": result, **identity})
        except CommandError as error:
            failure = error
        except Exception as error:  # a fault of ours costs the client one response, not the connection
            traceback.print_exc(file=sys.stderr)
            failure = CommandError(f"Internal error: {type(error).__name__}: {error}")
        return self.monitor.encode({**identity, "error": {"class": failure.error_class, "desc": failure.desc}})

    async def _run(self, call: Call) -> Any:
        if not self._negotiated and call.name != "qmp_capabilities":
            desc = "Expecting capabilities negotiation with 'qmp_capabilities'"
            raise CommandError(desc, "CommandNotFound")
        command = self.monitor.registry.find(call.name)
        if call.oob and not command.oob:
            raise CommandError(f"The command {call.name} does not support OOB")
        task = asyncio.current_task()
        assert task is not None
        self._running[task] = command
        try:
            return await command.call(call.arguments)
        finally:
            del self._running[task]

    def _on_event(self, message: dict[str, Any]) -> None:
        self.monitor.write(self.monitor.encode(message))

    # ---- what commands ask of their own session ----

    def negotiate(self, capabilities: Iterable[str]) -> None:
        """End the negotiation with *capabilities* enabled; CommandError the second time."""
        if self._negotiated:
            desc = "Capabilities negotiation is already complete, command ignored"
            raise CommandError(desc, "CommandNotFound")
        self._negotiated = True
        self._oob = "oob" in capabilities
        if not self._gone:
            self.monitor.hub.subscribe(self._on_event)

    def take_loose_descriptor(self) -> int:
        """The descriptor that came with the request; it belongs to the caller.  CommandError when none did."""
        if not self._loose:
            raise CommandError("No file descriptor supplied via SCM_RIGHTS")
        return self._loose.pop(0)
