"""`yank`: breaking connections that hang, out of band (qmp.md §13, state-machine.md §6).

Two kinds of instance have something to break here: socket character devices, which lose their client, and the
migration that is under way, whose connections are shut down.  A call names several; when one of them does not exist
nothing happens to the others.

Threads   the loop's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from qemumig.commands.command import STR, Argument, Command, CommandError, Enum, ListOf, Struct

from ..chardev import SocketBackend
from ..chardev_options import CharDevices

INSTANCE = Struct(
    Argument("type", Enum(("block-node", "chardev", "migration"))),
    tag="type",
    variants={"block-node": Struct(Argument("node-name", STR)), "chardev": Struct(Argument("id", STR))},
)


class YankableMigration(Protocol):
    """What a migration offers."""

    @property
    def is_under_way(self) -> bool: ...

    def yank(self) -> None: ...


class Yank:
    """The instances there are, and the commands about them."""

    def __init__(self, devices: CharDevices, migration: YankableMigration) -> None:
        self._devices = devices
        self._migration = migration

    def commands(self) -> list[Command]:
        """Both commands, for a registry."""
        instances = (Argument("instances", ListOf(INSTANCE)),)
        return [
            Command("query-yank", lambda: list(self._instances()), returns=ListOf(INSTANCE), oob=True),
            Command("yank", self.yank, instances, oob=True),
        ]

    def yank(self, instances: list[dict[str, Any]]) -> None:
        """Break the connections of *instances*; CommandError, and nothing is broken, when one does not exist."""
        breakers = [self._breaker(instance) for instance in instances]
        for break_connection in breakers:
            break_connection()

    def _instances(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = [{"type": "chardev", "id": label} for label in self._sockets()]
        return [*found, {"type": "migration"}] if self._migration.is_under_way else found

    def _sockets(self) -> dict[str, SocketBackend]:
        return {backend.label: backend for backend in self._devices if isinstance(backend, SocketBackend)}

    def _breaker(self, instance: dict[str, Any]) -> Callable[[], None]:
        if instance["type"] == "migration" and self._migration.is_under_way:
            return self._migration.yank
        backend = self._sockets().get(instance.get("id", ""))
        if instance["type"] == "chardev" and backend is not None:
            return backend.drop_client
        raise CommandError("Instance not found", "DeviceNotFound")
