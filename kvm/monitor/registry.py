"""The table of commands and events.  A feature adds its own; a monitor looks commands up by name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from qemumig.commands.command import Command, CommandError, Event
from qemumig.commands.schema import describe


class Registry:
    """Commands and events by name, each once."""

    def __init__(self) -> None:
        self._commands: dict[str, Command] = {}
        self._events: dict[str, Event] = {}

    def add(self, commands: Iterable[Command]) -> None:
        """Add *commands*; ValueError for a name that is taken."""
        for command in commands:
            if command.name in self._commands:
                raise ValueError(f"command {command.name!r} is registered twice")
            self._commands[command.name] = command

    def add_events(self, events: Iterable[Event]) -> None:
        """Add what may be emitted; ValueError for a name that is taken."""
        for event in events:
            if event.name in self._events:
                raise ValueError(f"event {event.name!r} is registered twice")
            self._events[event.name] = event

    def find(self, name: str) -> Command:
        """The command of that name; CommandError when there is none."""
        command = self._commands.get(name)
        if command is None:
            raise CommandError(f"The command {name} has not been found", "CommandNotFound")
        return command

    def event(self, name: str) -> Event | None:
        """The event of that name."""
        return self._events.get(name)

    def names(self) -> list[str]:
        """The names of all commands, sorted."""
        return sorted(self._commands)

    def schema(self) -> list[dict[str, Any]]:
        """What `query-qmp-schema` says."""
        return describe((self._commands[name] for name in self.names()), self._events.values())
