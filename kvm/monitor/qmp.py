"""A QMP monitor: one back end, one client at a time (qmp.md §1).

    connected ─▶ greeting ─▶ negotiating ─ qmp_capabilities ─▶ command mode ─▶ gone; the next client starts anew

In    JSON values of the client.  They wait in a queue of one, or of eight when the client enabled `oob`; while
      the queue is full nothing is read.  `exec-oob` requests do not queue.
Out   one response a request, in order; events between them, once negotiation is over

Threads   the loop's, alone
Holds     (1) at most one queued command of a monitor runs at a time, and its response leaves before the next runs
          (2) a response never reaches another client than the one that asked
          (3) a command runs only when the client has read most of what was sent to it before
          (4) every descriptor that arrives is taken by a getfd or closed
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import traceback
from collections import deque
from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from qemumig.commands.command import STR, Argument, Command, CommandError, Enum, ListOf
from qemumig.errors import ChannelError

from ..chardev import CharBackend, FrontEnd, close_descriptors
from .events import EventHub
from .json_stream import INCOMPLETE, JsonError, JsonStream, dump
from .registry import Registry

CLOSING_GRACE_S = 1.0  # how long a running command, and then its response, may take when the program ends
OOB_QUEUE = 8  # requests that may wait, the one that runs included
MAX_NAMED_DESCRIPTORS = 128  # of one monitor
EMULATED = {"major": 10, "minor": 0, "micro": 0}  # the dialect that is spoken
PACKAGE = "qemumig 0.1.0"

current_monitor: ContextVar[QmpMonitor] = ContextVar("current_monitor")  # whose command this is


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


class QmpMonitor:
    """One monitor on *backend*; *registry* has its commands, *hub* its events."""

    def __init__(self, backend: CharBackend, registry: Registry, hub: EventHub, pretty: bool = False) -> None:
        # Set before start.
        self._backend = backend
        self._registry = registry
        self._hub = hub
        self._pretty = pretty
        self._work = asyncio.Event()
        self._tasks: set[asyncio.Task] = set()
        self._stopping = False
        # Of the monitor, whatever client is there.
        self._named: dict[str, int] = {}
        # Of the client.
        self._client = 0  # counts them; 0: there was none yet
        self._negotiated = False
        self._oob = False
        self._stream = JsonStream()
        self._queue: deque[Request] = deque()  # the first is the one that runs
        self._urgent = 0  # out-of-band requests that run
        self._arriving: list[int] = []  # descriptors of a request that is not complete yet
        self._loose: list[int] = []  # descriptors that came with the last request that had any
        backend.attach(FrontEnd(self._received, self._connected, self._disconnected))

    def start(self) -> None:
        """Serve requests from now on, on the running loop."""
        self._spawn(self._serve())

    def stop(self) -> None:
        """Begin no further command; the response of the one that runs still leaves."""
        self._stopping = True
        self._work.set()

    async def close(self) -> None:
        """Let running commands end and what was written leave, within reason; give up every descriptor."""
        self.stop()
        tasks = list(self._tasks)
        if tasks:
            await asyncio.wait(tasks, timeout=CLOSING_GRACE_S)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._backend.output.drain(0), CLOSING_GRACE_S)
        self._disconnected()
        close_descriptors(list(self._named.values()))
        self._named.clear()

    # ---- the connection ----

    def _connected(self) -> None:
        self._client += 1
        self._send({"QMP": {"version": version(), "capabilities": ["oob"]}})

    def _disconnected(self) -> None:
        self._hub.unsubscribe(self._on_event)
        for request in self._queue:
            close_descriptors(request.descriptors)
        close_descriptors(self._arriving + self._loose)
        self._client += 1
        self._negotiated = self._oob = False
        self._stream = JsonStream()
        self._queue.clear()
        self._arriving, self._loose = [], []

    def _received(self, data: bytes, descriptors: list[int]) -> None:
        if descriptors:
            close_descriptors(self._arriving)
            self._arriving = descriptors
        self._stream.feed(data)
        self._pump()

    def _send(self, message: dict[str, Any]) -> None:
        self._write(dump(message, self._pretty))

    def _write(self, data: bytes) -> None:
        if self._backend.write(data) < len(data):  # it has not read for a long time
            self._backend.drop_client()

    def _on_event(self, message: dict[str, Any]) -> None:
        self._send(message)

    # ---- requests: from bytes to the queue ----

    def _pump(self) -> None:
        """Turn bytes into requests while there is room for them, and read on only if there is."""
        while len(self._queue) < self._room() and self._urgent < OOB_QUEUE and not self._stopping:
            request = self._next_request()
            if request is None:
                self._backend.resume()
                return
            if self._is_urgent(request):
                self._urgent += 1
                self._spawn(self._answer_urgent(request, self._client))
            else:
                self._queue.append(request)
                self._work.set()
        self._backend.pause()

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

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self) -> None:
        current_monitor.set(self)
        while not self._stopping:
            self._work.clear()
            while self._queue and not self._stopping:
                client = self._client
                await self._backend.output.drain()
                if client == self._client:
                    await self._answer(self._queue[0], client)
                if client == self._client:
                    self._queue.popleft()
                    self._pump()
                await asyncio.sleep(0)  # the turn of other monitors
            if not self._stopping:
                await self._work.wait()

    async def _answer_urgent(self, request: Request, client: int) -> None:
        current_monitor.set(self)
        try:
            await self._answer(request, client)
        finally:
            self._urgent -= 1
        self._pump()

    async def _answer(self, request: Request, client: int) -> None:
        if request.descriptors:
            close_descriptors(self._loose)
            self._loose, request.descriptors = request.descriptors, []
        response = await self._execute(request)
        if client == self._client:
            self._write(response)

    async def _execute(self, request: Request) -> bytes:
        """Run what *request* asks for; the response, whatever happens."""
        identity = {}
        if isinstance(request.value, dict) and "id" in request.value:
            identity["id"] = request.value["id"]
        try:
            if request.fault is not None:
                raise CommandError(str(request.fault))
            result = await self._run(understand(request.value, self._oob))
            return dump({"return": result, **identity}, self._pretty)
        except CommandError as error:
            failure = error
        except Exception as error:  # a fault of ours costs the client one response, not the connection
            traceback.print_exc(file=sys.stderr)
            failure = CommandError(f"Internal error: {type(error).__name__}: {error}")
        return dump({**identity, "error": {"class": failure.error_class, "desc": failure.desc}}, self._pretty)

    async def _run(self, call: Call) -> Any:
        if not self._negotiated and call.name != "qmp_capabilities":
            desc = "Expecting capabilities negotiation with 'qmp_capabilities'"
            raise CommandError(desc, "CommandNotFound")
        command = self._registry.find(call.name)
        if call.oob and not command.oob:
            raise CommandError(f"The command {call.name} does not support OOB")
        return await command.call(call.arguments)

    # ---- what commands ask of their own monitor ----

    def negotiate(self, capabilities: Iterable[str]) -> None:
        """End the negotiation with *capabilities* enabled; CommandError the second time."""
        if self._negotiated:
            desc = "Capabilities negotiation is already complete, command ignored"
            raise CommandError(desc, "CommandNotFound")
        self._negotiated = True
        self._oob = "oob" in capabilities
        self._hub.subscribe(self._on_event)

    def name_descriptor(self, name: str) -> None:
        """Keep the descriptor that came with the request under *name*, in the place of an older one."""
        if not self._loose:
            raise CommandError("No file descriptor supplied via SCM_RIGHTS")
        descriptor = self._loose.pop(0)
        if name[:1].isdigit():
            close_descriptors([descriptor])
            raise CommandError("Parameter 'fdname' expects a name not starting with a digit")
        if name not in self._named and len(self._named) >= MAX_NAMED_DESCRIPTORS:
            close_descriptors([descriptor])
            raise CommandError(f"Monitor already holds {MAX_NAMED_DESCRIPTORS} named file descriptors")
        if name in self._named:
            close_descriptors([self._named[name]])
        self._named[name] = descriptor

    def take_descriptor(self, name: str) -> int:
        """The descriptor kept under *name*, which the caller owns from then on; ChannelError without one."""
        descriptor = self._named.pop(name, None)
        if descriptor is None:
            text = f"File descriptor named '{name}' has not been found"
            raise ChannelError(text, channel=f"fd:{name}")
        return descriptor

    def close_descriptor(self, name: str) -> None:
        """Close the descriptor kept under *name*; CommandError without one."""
        descriptor = self._named.pop(name, None)
        if descriptor is None:
            raise CommandError(f"File descriptor named '{name}' not found")
        close_descriptors([descriptor])


def take_fd(name: str) -> int:
    """The descriptor that `getfd` named so on the monitor whose command is running; ChannelError without one."""
    monitor = current_monitor.get(None)
    if monitor is None:
        text = f"File descriptor named '{name}' has not been found: no monitor asks for it"
        raise ChannelError(text, channel=f"fd:{name}")
    return monitor.take_descriptor(name)


def session_commands(registry: Registry) -> list[Command]:
    """The commands about the monitor itself."""
    name = (Argument("fdname", STR),)
    return [
        Command("qmp_capabilities", _negotiate, (Argument("enable", ListOf(Enum(["oob"])), optional=True),)),
        Command("query-commands", lambda: [{"name": entry} for entry in registry.names()]),
        Command("getfd", lambda fdname: current_monitor.get().name_descriptor(fdname), name),
        Command("closefd", lambda fdname: current_monitor.get().close_descriptor(fdname), name),
    ]


def _negotiate(enable: Iterable[str] = ()) -> None:
    current_monitor.get().negotiate(enable)
