"""A QMP monitor: one back end, one client at a time, and what outlives a client (qmp.md §1).

    connected ─▶ Session ─▶ gone; the next client gets a Session of its own          session.py

Out   greeting and responses of the session that is there; events, once it has negotiated

Threads   the loop's, alone
Holds     (1) a descriptor that `getfd` named stays with the monitor, whatever client asks for it
          (2) commands of clients that have gone run on behind the next client's back, but only a few of them
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any

from qemumig.commands.command import ANY, BOOL, STR, Argument, Command, CommandError, Enum, ListOf, Struct
from qemumig.errors import ChannelError

from ..chardev import CharBackend, FrontEnd, close_descriptors
from .events import EventHub
from .farewell import let_end
from .json_stream import dump
from .registry import Registry
from .session import EMULATED, PACKAGE, Session, current_session, version

__all__ = ["EMULATED", "PACKAGE", "QmpMonitor", "session_commands", "take_fd", "version"]

MAX_LEFT_BEHIND = 8  # commands of clients that have gone; with so many still running the next client waits
MAX_NAMED_DESCRIPTORS = 128  # of one monitor


class QmpMonitor:
    """One monitor on *backend*; *registry* has its commands, *hub* its events."""

    def __init__(self, backend: CharBackend, registry: Registry, hub: EventHub, pretty: bool = False) -> None:
        # Set before the first client.
        self.registry = registry
        self.hub = hub
        self._backend = backend
        self._pretty = pretty
        # Loop thread only.
        self._session: Session | None = None
        self._tasks: set[asyncio.Task] = set()
        self._left_behind: set[asyncio.Task] = set()
        self._stopping = False
        self._named: dict[str, int] = {}
        backend.attach(FrontEnd(self._received, self._connected, self._disconnected))

    @property
    def stopping(self) -> bool:
        """True when no further command shall begin."""
        return self._stopping

    def stop(self) -> None:
        """Begin no further command; the response of the one that runs still leaves."""
        self._stopping = True
        if self._session is not None:
            self._session.wake()

    async def close(self) -> None:
        """Let running commands end and what was written leave, within reason; give up every descriptor."""
        self.stop()
        await let_end(self._tasks, self._backend)
        self._disconnected()
        close_descriptors(list(self._named.values()))
        self._named.clear()

    # ---- the connection ----

    def _connected(self) -> None:
        self._session = Session(self)
        self._session.greet()

    def _disconnected(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            self._left_behind |= session.end()

    def _received(self, data: bytes, descriptors: list[int]) -> None:
        if self._session is not None:
            self._session.received(data, descriptors)
        else:  # the program ends
            close_descriptors(descriptors)

    # ---- for the session ----

    def encode(self, message: dict[str, Any]) -> bytes:
        """*message* as this monitor writes it."""
        return dump(message, self._pretty)

    def write(self, data: bytes) -> None:
        """Send to the client; one that has not read for a long time is dropped."""
        if self._backend.write(data) < len(data):
            self._backend.drop_client()

    def listen(self, wanted: bool) -> None:
        """Take more input from the client, or let it wait."""
        if wanted:
            self._backend.resume()
        else:
            self._backend.pause()

    async def drain(self) -> None:
        """Wait until the client has read most of what was sent, and not too much of former clients' work is left."""
        await self._backend.output.drain()
        while len(self._left_behind) >= MAX_LEFT_BEHIND:
            await asyncio.wait(self._left_behind, return_when=asyncio.FIRST_COMPLETED)

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task:
        """Run *work*; `close` waits for it."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(self._left_behind.discard)
        return task

    # ---- descriptors by name ----

    def name_descriptor(self, name: str, descriptor: int) -> None:
        """Keep *descriptor*, which belongs to the monitor from now on, in the place of an older one of that *name*."""
        refusal = ""
        if name[:1].isdigit():
            refusal = "Parameter 'fdname' expects a name not starting with a digit"
        elif name not in self._named and len(self._named) >= MAX_NAMED_DESCRIPTORS:
            refusal = f"Monitor already holds {MAX_NAMED_DESCRIPTORS} named file descriptors"
        if refusal:
            close_descriptors([descriptor])
            raise CommandError(refusal)
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
    session = current_session.get(None)
    if session is None:
        text = f"File descriptor named '{name}' has not been found: no monitor asks for it"
        raise ChannelError(text, channel=f"fd:{name}")
    return session.monitor.take_descriptor(name)


def session_commands(registry: Registry) -> list[Command]:
    """The commands about the monitor itself."""
    name = (Argument("fdname", STR),)
    names = ListOf(Struct(Argument("name", STR)))
    return [
        Command("qmp_capabilities", _negotiate, (Argument("enable", ListOf(Enum(["oob"])), optional=True),)),
        Command("query-commands", lambda: [{"name": entry} for entry in registry.names()], returns=names),
        Command("query-qmp-schema", registry.schema, returns=SCHEMA),
        Command("getfd", _name_descriptor, name),
        Command("closefd", lambda fdname: current_session.get().monitor.close_descriptor(fdname), name),
    ]


def _negotiate(enable: Iterable[str] = ()) -> None:
    current_session.get().negotiate(enable)


def _name_descriptor(fdname: str) -> None:
    session = current_session.get()
    session.monitor.name_descriptor(fdname, session.take_loose_descriptor())


def _schema_type() -> ListOf:
    """SchemaInfo itself: what `query-qmp-schema` returns a list of."""
    member = (Argument("name", STR), Argument("type", STR))
    features = Argument("features", ListOf(STR), optional=True)
    kinds = {
        "builtin": Struct(
            Argument("json-type", Enum(("string", "number", "int", "boolean", "null", "object", "array", "value")))
        ),
        "enum": Struct(
            Argument("members", ListOf(Struct(Argument("name", STR), features))),
            Argument("values", ListOf(STR)),
        ),
        "array": Struct(Argument("element-type", STR)),
        "object": Struct(
            Argument("members", ListOf(Struct(*member, Argument("default", ANY, optional=True), features))),
            Argument("tag", STR, optional=True),
            Argument("variants", ListOf(Struct(Argument("case", STR), Argument("type", STR))), optional=True),
        ),
        "alternate": Struct(Argument("members", ListOf(Struct(Argument("type", STR))))),
        "command": Struct(
            Argument("arg-type", STR),
            Argument("ret-type", STR),
            Argument("allow-oob", BOOL, optional=True),
        ),
        "event": Struct(Argument("arg-type", STR)),
    }
    meta = Argument("meta-type", Enum(kinds))
    return ListOf(Struct(Argument("name", STR), meta, features, tag="meta-type", variants=kinds))


SCHEMA = _schema_type()
