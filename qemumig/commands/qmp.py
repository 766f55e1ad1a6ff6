"""The migration commands of QMP (qmp.md §5, §6), plugged into whatever monitor there is.

Threads   everything here runs on the control loop's thread; what may wait is handed to a worker.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from ..channels.address import Address, FdAddress, parse_channels, parse_uri
from ..channels.connect import no_object
from ..channels.demands import check_transport
from ..channels.file import OpenPath, no_path
from ..destination.incoming import IncomingMigration
from ..destination.support import check_support
from ..errors import MachineError, OptionError, StateError
from ..machine import HoldEvents, Machine
from ..options import MigrationOptions
from ..qapi import MigrationStatus, RunState
from ..source.migration import Migration
from ..source.snapshot import check_protection
from .command import BOOL, INT, STR, Argument, Command, CommandError, Emit
from .types import (
    CAPABILITY_STATES,
    CHANNELS,
    MIGRATION_INFO,
    MIGRATION_THREADS,
    PARAMETERS_SHOWN,
    PARAMETERS_TO_SET,
    STATUS,
)
from .yank import shut_channels

if TYPE_CHECKING:  # most migrations have no TLS: its library is loaded by those that do
    from ..channels.objects import FindObject

INCOMING_ENDED = frozenset({MigrationStatus.NONE, MigrationStatus.FAILED, MigrationStatus.COMPLETED})
LISTED_THREADS = ("mig/src/main", "mig/src/send_")


class MigrationCommands:
    """Both sides of migration of *machine* behind QMP.

    *take_fd* hands out a descriptor by the name that `getfd` gave it, *find_object* what `object-add` made, *open_path*
    a descriptor out of a set; *exit_process* is called, from any thread, with a status and a sentence when an incoming
    migration failed that was to end the process.  Inside *hold_events* events may wait a little: the guest stands still.
    """

    def __init__(
        self,
        machine: Machine,
        options: MigrationOptions,
        *,
        emit: Emit,
        hold_events: HoldEvents = nullcontext,
        autostart: bool = True,
        take_fd: Callable[[str], int],
        find_object: FindObject = no_object,
        open_path: OpenPath = no_path,
        exit_process: Callable[[int, str], None],
    ) -> None:
        self._machine = machine
        self.options = options
        self._source = Migration(
            machine,
            options,
            emit=emit,
            hold_events=hold_events,
            take_fd=take_fd,
            find_object=find_object,
            open_path=open_path,
        )
        self._destination = IncomingMigration(
            machine,
            options,
            emit=emit,
            hold_events=hold_events,
            take_fd=take_fd,
            find_object=find_object,
            open_path=open_path,
            autostart=autostart,
            on_failure=lambda message: exit_process(1, message),
        )

    def commands(self) -> list[Command]:
        """What a monitor may ask of a migration."""
        where = (Argument("uri", STR, optional=True), Argument("channels", CHANNELS, optional=True))
        outgoing = (*where, Argument("detach", BOOL, optional=True), Argument("resume", BOOL, optional=True))
        incoming = (*where, Argument("exit-on-error", BOOL, optional=True))
        return [
            Command("migrate", self.migrate, outgoing),
            Command("migrate-incoming", self.migrate_incoming, incoming),
            Command("migrate_cancel", self.migrate_cancel),
            Command("migrate-start-postcopy", self.migrate_start_postcopy),
            Command("migrate-pause", self.migrate_pause, oob=True),
            Command("migrate-recover", self.migrate_recover, (Argument("uri", STR),), oob=True),
            Command("migrate-continue", self.migrate_continue, (Argument("state", STATUS),)),
            Command("query-migrate", self.query_migrate, returns=MIGRATION_INFO),
            Command(
                "migrate-set-capabilities",
                self.migrate_set_capabilities,
                (Argument("capabilities", CAPABILITY_STATES),),
            ),
            Command("query-migrate-capabilities", self.query_migrate_capabilities, returns=CAPABILITY_STATES),
            Command("migrate-set-parameters", self.migrate_set_parameters, PARAMETERS_TO_SET),
            Command("query-migrate-parameters", self.query_migrate_parameters, returns=PARAMETERS_SHOWN),
            Command("query-migrationthreads", query_migration_threads, returns=MIGRATION_THREADS, features=("deprecated",)),
            Command("client_migrate_info", client_migrate_info, CLIENT_INFO),
        ]

    # ---- for the command line ----

    def incoming(self, where: str | list[dict[str, Any]]) -> None:
        """What `-incoming` does, with a URI or with channels."""
        address = parse_uri(where) if isinstance(where, str) else parse_channels(where, incoming=True)
        if isinstance(address, FdAddress) and not address.name.isdigit():
            raise OptionError(f"Invalid file descriptor number '{address.name}'", name="uri", value=where)
        check_transport(self.options, address)
        self._destination.listen(address)

    def set_autostart(self, autostart: bool) -> None:
        """What `stop` and `cont` do while the guest is on its way."""
        self._destination.set_autostart(autostart)

    @property
    def is_under_way(self) -> bool:
        """True while an outgoing or incoming migration has, or waits for, a connection."""
        return self._source.is_running or self._destination.status not in INCOMING_ENDED

    def yank(self) -> None:
        """Break the connection of the migration that is under way, as if the network had (state-machine.md §6)."""
        shut_channels(self._source, self._destination)

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
        check_transport(self.options, address)
        if resume:
            await asyncio.to_thread(self._source.resume, address)
            return
        await asyncio.to_thread(self._source.start, address)

    async def migrate_incoming(
        self, uri: str | None = None, channels: list[dict[str, Any]] | None = None, exit_on_error: bool = True
    ) -> None:
        if self._destination.status not in (MigrationStatus.NONE, MigrationStatus.FAILED):
            raise StateError("The incoming migration has already been started", state=self._destination.status)
        if self._machine.runstate is not RunState.INMIGRATE:
            raise StateError("'-incoming' was not specified on the command line", state=self._machine.runstate)
        address = _address(uri, channels, incoming=True)
        check_transport(self.options, address)
        await asyncio.to_thread(self._destination.listen, address, exit_on_error=exit_on_error)

    def migrate_cancel(self) -> None:
        self._source.cancel()

    def migrate_start_postcopy(self) -> None:
        """Let the guest move now, before its memory has."""
        if not self.options.capability("postcopy-ram"):
            raise StateError("Enable postcopy with migrate_set_capability before the start of migration")
        if self._source.status is MigrationStatus.NONE:
            raise StateError("Postcopy must be started after migration has been started", state=self._source.status)
        self._source.start_postcopy()

    def migrate_pause(self) -> None:
        """Break the connection of a postcopy that is under way; both sides can recover."""
        side = self._destination if self._source.status is MigrationStatus.NONE else self._source
        side.pause()

    async def migrate_recover(self, uri: str) -> None:
        """Wait for the source of a paused postcopy at *uri*."""
        if self._destination.status is not MigrationStatus.POSTCOPY_PAUSED:
            state = self._destination.status
            raise StateError("Migrate recover can only be run when postcopy is paused.", state=state)
        await asyncio.to_thread(self._destination.recover, parse_uri(uri))

    def migrate_continue(self, state: str) -> None:
        self._source.proceed(MigrationStatus(state))

    def query_migrate(self) -> dict[str, Any]:
        side = self._destination if self._source.status is MigrationStatus.NONE else self._source
        info = side.query()
        if blockers := list(self._machine.migration_blockers):
            info["blocked-reasons"] = blockers
        return info

    def migrate_set_capabilities(self, capabilities: list[dict[str, Any]]) -> None:
        if self._source.is_running:
            raise StateError("There's a migration process in progress", state=self._source.status)
        wanted = {entry["capability"]: entry["state"] for entry in capabilities}
        self._check_host(wanted)
        self.options.set_capabilities(wanted.items())

    def _check_host(self, wanted: Mapping[str, bool]) -> None:
        """OptionError when this host cannot do what is switched on."""
        if wanted.get("postcopy-ram") and self._machine.runstate is RunState.INMIGRATE:
            try:
                check_support(self._machine)
            except MachineError as error:
                text = f"Postcopy is not supported: {error}"
                raise OptionError(text, name="postcopy-ram", value=True) from error
        if wanted.get("background-snapshot"):
            try:
                check_protection()
            except MachineError as error:
                text = f"Background-snapshot is not supported by host kernel: {error}"
                raise OptionError(text, name="background-snapshot", value=True) from error

    def query_migrate_capabilities(self) -> list[dict[str, Any]]:
        return [{"state": state, "capability": name} for name, state in self.options.capabilities().items()]

    def migrate_set_parameters(self, **parameters: Any) -> None:
        self.options.set_parameters({name.replace("_", "-"): value for name, value in parameters.items()})

    def query_migrate_parameters(self) -> dict[str, Any]:
        return self.options.parameters()


CLIENT_INFO = (
    Argument("protocol", STR),
    Argument("hostname", STR),
    Argument("port", INT, optional=True),
    Argument("tls-port", INT, optional=True),
    Argument("cert-subject", STR, optional=True),
)


def client_migrate_info(protocol: str, **_where: Any) -> None:
    """Tell a SPICE client where the guest goes; there is no SPICE here."""
    if protocol != "spice":
        raise CommandError("Parameter 'protocol' expects 'spice'")
    raise CommandError("SPICE is not in use", "DeviceNotActive")


def query_migration_threads() -> list[dict[str, Any]]:
    """The threads of the outgoing migration that runs, by the names the system shows."""
    return [
        {"name": thread.name, "thread-id": thread.native_id}
        for thread in threading.enumerate()
        if thread.name.startswith(LISTED_THREADS) and thread.native_id is not None
    ]


def _address(uri: str | None, channels: list[dict[str, Any]] | None, *, incoming: bool) -> Address:
    if bool(channels) == (uri is not None):
        raise OptionError("need either 'uri' or 'channels' argument", name="uri", value=uri)
    return parse_uri(uri) if uri is not None else parse_channels(channels or [], incoming=incoming)
