"""The migration commands of QMP (qmp.md §5, §6), plugged into whatever monitor there is.

Threads   everything here runs on the control loop's thread; what may wait is handed to a worker.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from ..channels.address import Address, FdAddress, parse_channels, parse_uri
from ..destination.incoming import IncomingMigration
from ..errors import OptionError, StateError
from ..machine import Machine
from ..options import CAPABILITIES, PARAMETERS, MigrationOptions, Parameter
from ..qapi import MigrationStatus
from ..source.migration import Migration
from .command import (
    BOOL,
    SIZE,
    STR,
    STR_OR_NULL,
    UINT8,
    UINT32,
    UINT64,
    Argument,
    Command,
    Emit,
    Enum,
    ListOf,
    Struct,
    Type,
)

CAPABILITY_NAMES = tuple(capability.name for capability in CAPABILITIES)
CAPABILITY_STATUS = Struct(Argument("capability", Enum(CAPABILITY_NAMES)), Argument("state", BOOL))
MIGRATION_ADDRESS = Struct(
    Argument("transport", Enum(("socket", "exec", "rdma", "file"))),
    tag="transport",
    variants={
        "socket": Struct(
            Argument("type", Enum(("inet", "unix", "vsock", "fd"))),
            tag="type",
            variants={
                "inet": Struct(
                    Argument("host", STR),
                    Argument("port", STR),
                    Argument("to", UINT32, optional=True),
                    Argument("ipv4", BOOL, optional=True),
                    Argument("ipv6", BOOL, optional=True),
                    Argument("keep-alive", BOOL, optional=True),
                ),
                "unix": Struct(Argument("path", STR)),
                "vsock": Struct(Argument("cid", STR), Argument("port", STR)),
                "fd": Struct(Argument("str", STR)),
            },
        ),
        "exec": Struct(Argument("args", ListOf(STR))),
        "rdma": Struct(Argument("host", STR), Argument("port", STR)),
        "file": Struct(Argument("filename", STR), Argument("offset", UINT64)),
    },
)
CHANNELS = ListOf(Struct(Argument("channel-type", Enum(("main", "cpr"))), Argument("addr", MIGRATION_ADDRESS)))
KINDS: dict[str, Type] = {
    "uint8": UINT8,
    "uint32": UINT32,
    "uint64": UINT64,
    "size": SIZE,
    "bool": BOOL,
    "StrOrNull": STR_OR_NULL,
}


class MigrationCommands:
    """Both sides of migration of *machine* behind QMP.

    *take_fd* hands out a descriptor by the name that `getfd` gave it; *exit_process* is called, from any thread, with a
    status and a sentence when an incoming migration failed that was to end the process.
    """

    def __init__(
        self,
        machine: Machine,
        options: MigrationOptions,
        *,
        emit: Emit,
        autostart: bool = True,
        take_fd: Callable[[str], int],
        exit_process: Callable[[int, str], None],
    ) -> None:
        self._options = options
        self._source = Migration(machine, options, emit=emit, take_fd=take_fd)
        self._destination = IncomingMigration(
            machine,
            options,
            emit=emit,
            take_fd=take_fd,
            autostart=autostart,
            on_failure=lambda message: exit_process(1, message),
        )

    def commands(self) -> list[Command]:
        """What a monitor may ask of a migration."""
        where = (Argument("uri", STR, optional=True), Argument("channels", CHANNELS, optional=True))
        outgoing = (*where, Argument("detach", BOOL, optional=True), Argument("resume", BOOL, optional=True))
        return [
            Command("migrate", self.migrate, outgoing),
            Command("migrate-incoming", self.migrate_incoming, (*where, Argument("exit-on-error", BOOL, optional=True))),
            Command("migrate_cancel", self.migrate_cancel),
            Command("query-migrate", self.query_migrate),
            Command(
                "migrate-set-capabilities",
                self.migrate_set_capabilities,
                (Argument("capabilities", ListOf(CAPABILITY_STATUS)),),
            ),
            Command("query-migrate-capabilities", self.query_migrate_capabilities),
            Command(
                "migrate-set-parameters",
                self.migrate_set_parameters,
                tuple(Argument(parameter.name, _type_of(parameter), optional=True) for parameter in PARAMETERS),
            ),
            Command("query-migrate-parameters", self.query_migrate_parameters),
        ]

    # ---- for the command line ----

    def incoming(self, uri: str) -> None:
        """What `-incoming URI` does."""
        address = parse_uri(uri)
        if isinstance(address, FdAddress) and not address.name.isdigit():
            raise OptionError(f"Invalid file descriptor number '{address.name}'", name="uri", value=uri)
        self._destination.listen(address)

    def set_autostart(self, autostart: bool) -> None:
        """What `stop` and `cont` do while the guest is on its way."""
        self._destination.set_autostart(autostart)

    async def close(self) -> None:
        """End both sides and join their threads."""
        await asyncio.to_thread(self._source.close)
        await asyncio.to_thread(self._destination.close)

    # ---- the commands ----

    async def migrate(
        self,
        uri: str | None = None,
        channels: list[dict[str, Any]] | None = None,
        detach: bool = True,
        resume: bool = False,
    ) -> None:
        address = _address(uri, channels, incoming=False)
        if resume:
            raise StateError("Cannot resume if there is no paused migration", state=self._source.status)
        await asyncio.to_thread(self._source.start, address)

    async def migrate_incoming(
        self, uri: str | None = None, channels: list[dict[str, Any]] | None = None, exit_on_error: bool = True
    ) -> None:
        address = _address(uri, channels, incoming=True)
        await asyncio.to_thread(self._destination.listen, address, exit_on_error=exit_on_error)

    def migrate_cancel(self) -> None:
        self._source.cancel()

    def query_migrate(self) -> dict[str, Any]:
        if self._source.status is MigrationStatus.NONE:
            return self._destination.query()
        return self._source.query()

    def migrate_set_capabilities(self, capabilities: list[dict[str, Any]]) -> None:
        if self._source.is_running:
            raise StateError("There's a migration process in progress", state=self._source.status)
        self._options.set_capabilities((entry["capability"], entry["state"]) for entry in capabilities)

    def query_migrate_capabilities(self) -> list[dict[str, Any]]:
        return [{"state": state, "capability": name} for name, state in self._options.capabilities().items()]

    def migrate_set_parameters(self, **parameters: Any) -> None:
        self._options.set_parameters({name.replace("_", "-"): value for name, value in parameters.items()})

    def query_migrate_parameters(self) -> dict[str, Any]:
        return self._options.parameters()


def _type_of(parameter: Parameter) -> Type:
    return Enum(parameter.values) if parameter.kind == "enum" else KINDS[parameter.kind]


def _address(uri: str | None, channels: list[dict[str, Any]] | None, *, incoming: bool) -> Address:
    if bool(channels) == (uri is not None):
        raise OptionError("need either 'uri' or 'channels' argument", name="uri", value=uri)
    return parse_uri(uri) if uri is not None else parse_channels(channels or [], incoming=incoming)
