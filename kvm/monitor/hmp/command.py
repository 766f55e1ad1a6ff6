"""A command of the human monitor, and the table that finds one by its name.

    HumanCommand("stop", handler, aliases=("s",), help="stop emulation", needs=("stop",))

A command stands on commands of QMP: it is there exactly when all that it *needs* are in the registry, so a feature
that adds those has its human commands as well.  The handler gets the session and the arguments by name; what it
returns is shown, a CommandError is shown behind "Error: ".

Threads   the loop's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ..registry import Registry
from .arguments import Argument

Handler = Callable[..., Any]  # (session, **arguments) → text or None, or something to await for it
Candidates = Callable[[int], Iterable[str]]


def nothing(index: int) -> Iterable[str]:
    """No candidates."""
    return ()


@dataclass(frozen=True)
class HumanCommand:
    """One command; *help* says what it does.

    *complete* gets the number of a word behind the command, from 0, and says what it may be.
    """

    name: str
    handler: Handler
    arguments: tuple[Argument, ...] = ()
    aliases: tuple[str, ...] = ()
    help: str = ""
    needs: tuple[str, ...] = ()
    complete: Candidates = nothing

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.aliases)

    @property
    def full_name(self) -> str:
        """The name and its aliases, as in messages."""
        return "|".join(self.names)


class CommandTable:
    """Human commands by name; those whose QMP commands *registry* lacks are not there."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._commands: list[HumanCommand] = []

    def add(self, commands: Iterable[HumanCommand]) -> None:
        """Add *commands*; ValueError for a name that is taken."""
        for command in commands:
            for other in self._commands:
                if taken := set(other.names) & set(command.names):
                    raise ValueError(f"human command {taken.pop()!r} is registered twice")
            self._commands.append(command)
        self._commands.sort(key=lambda command: command.name)

    def find(self, name: str) -> HumanCommand | None:
        """The command called so."""
        return next((command for command in self.available() if name in command.names), None)

    def available(self) -> list[HumanCommand]:
        """All that can be used, by name."""
        known = set(self._registry.names())
        return [command for command in self._commands if known.issuperset(command.needs)]

    def names(self) -> list[str]:
        """Every name and alias."""
        return [name for command in self.available() for name in command.names]


def help_line(command: HumanCommand, prefix: str = "") -> str:
    """What `help` says about one command."""
    usage = " ".join(argument.usage for argument in command.arguments)
    return f"{prefix}{command.full_name} {usage} -- {command.help}\n"
