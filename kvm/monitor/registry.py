"""The table of commands.  A feature adds its own; a monitor looks them up by name."""

from __future__ import annotations

from collections.abc import Iterable

from qemumig.commands.command import Command, CommandError


class Registry:
    """Commands by name, each once."""

    def __init__(self) -> None:
        self._commands: dict[str, Command] = {}

    def add(self, commands: Iterable[Command]) -> None:
        """Add *commands*; ValueError for a name that is taken."""
        for command in commands:
            if command.name in self._commands:
                raise ValueError(f"command {command.name!r} is registered twice")
            self._commands[command.name] = command

    def find(self, name: str) -> Command:
        """The command of that name; CommandError when there is none."""
        command = self._commands.get(name)
        if command is None:
            raise CommandError(f"The command {name} has not been found", "CommandNotFound")
        return command

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._commands)
