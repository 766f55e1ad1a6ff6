"""The human monitor's language: a line in, text out (hmp.md §1, §2).

    "migrate -d tcp:b:4444"  ─▶ command word ─▶ CommandTable ─▶ arguments ─▶ handler(session, …) ─▶ QMP commands
                                                                                     │
    "", or what the command has to say, or "Error: " and QMP's text   ◀──────────────┘

There is one HumanShell; every monitor that talks to people has a HumanSession with it, and QMP's human-monitor-command
makes one for each call.

Threads   the loop's; what may wait for guest memory or vCPUs goes to a thread.
"""

from __future__ import annotations

import inspect
import re
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from qemumig.commands.command import INT, STR, Argument, Command, CommandError

from ... import trace
from ..registry import Registry
from .arguments import Cursor, Format, read_arguments
from .command import CommandTable, HumanCommand, help_line
from .errors import LineError
from .expression import skip_blanks

INFO = "info"
HELP = ("help", "?")
_COMMAND_WORD = re.compile(r"[^ \t\r\n\f\v/]*")


class GuestView(Protocol):
    """What these commands see of the guest; any thread."""

    def covers(self, address: int, size: int) -> bool:
        """Whether there is memory or a device at all of these guest-physical addresses."""

    def read(self, address: int, size: int) -> bytes:
        """*size* bytes at a guest-physical address."""

    def translate(self, cpu: int, address: int) -> int | None:
        """The guest-physical address behind a virtual one of vCPU *cpu*; None when there is none."""


class MigrationProperties(Protocol):
    """What has no command of QMP."""

    def migration_property(self, name: str) -> Any:
        """The value of `-global migration.NAME`."""


class HumanShell:
    """The commands for people, over the commands of *registry*; *report* says a line on standard error."""

    def __init__(
        self, registry: Registry, view: GuestView, properties: MigrationProperties, report: Callable[[str], None]
    ) -> None:
        self.registry = registry
        self.view = view
        self.properties = properties
        self.report = report
        self.only_migratable = False  # nothing that cannot migrate may be there
        self.format = Format(1, "x", 4)  # of the last dump, whoever asked for it
        self.commands = CommandTable(registry)
        self.information = CommandTable(registry)  # what `info` can tell

    def qmp_commands(self) -> list[Command]:
        """human-monitor-command, for the registry."""
        arguments = (Argument("command-line", STR), Argument("cpu-index", INT, optional=True))
        return [Command("human-monitor-command", self.human_monitor_command, arguments, returns=STR)]

    async def human_monitor_command(self, command_line: str, cpu_index: int = 0) -> str:
        """What a line prints, its lines ended by CR LF; CommandError only for a vCPU that does not exist."""
        session = HumanSession(self, cpu_index)
        if cpu_index and cpu_index not in await session.cpu_indices():
            raise CommandError("Parameter 'cpu-index' expects a CPU number")
        return (await execute_line(session, command_line)).replace("\n", "\r\n")

    def find(self, line: str) -> tuple[HumanCommand | None, str, int]:
        """The command that *line* asks for, how it was called (blanks and all), and where its arguments begin."""
        name, end = command_word(line, 0)
        position = skip_blanks(line, end)
        if name != INFO or position == len(line):
            return self.commands.find(name), line[:end], position
        topic, end = command_word(line, position)
        return self.information.find(topic), line[:end], skip_blanks(line, end)

    def help_about(self, topic: str) -> str:
        """What `help TOPIC` prints."""
        name, *more = [word.strip('"') for word in topic.split()] or [""]
        if not name:
            return "".join(help_line(command) for command in self.commands.available())
        if name != INFO:
            command = self.commands.find(name)
            return help_line(command) if command is not None else unknown(name)
        if not more:
            return self.topics()
        command = self.information.find(more[0])
        return help_line(command, f"{INFO} ") if command is not None else unknown(f"{INFO} {more[0]}")

    def topics(self) -> str:
        """What `info` alone prints."""
        return "".join(help_line(command, f"{INFO} ") for command in self.information.available())

    def complete(self, line: str) -> list[str]:
        """What the last word of *line* may become."""
        words = line.split()
        if not words or line[-1:].isspace():
            words.append("")
        *before, last = words
        table = self.commands
        if before and before[0] in HELP:
            before = before[1:]
        if before and before[0] == INFO:
            table, before = self.information, before[1:]
        if not before:
            return _beginning_with(last, table.names())
        command = table.find(before[0])
        return _beginning_with(last, command.complete(len(before) - 1)) if command is not None else []


@dataclass
class HumanSession:
    """One who types: the shell, and what it remembers for him.

    *wait_seconds* is how long to sleep between two looks at something that takes time; None where nobody can wait.
    """

    shell: HumanShell
    cpu: int = 0  # whose virtual memory is meant
    wait_seconds: float | None = None
    history: Callable[[], list[str]] = list

    async def qmp(self, name: str, **arguments: Any) -> Any:
        """The value of a QMP command; underscores of the arguments become dashes.  CommandError when it refuses."""
        return await self.qmp_with(name, {key.replace("_", "-"): value for key, value in arguments.items()})

    async def qmp_with(self, name: str, arguments: dict[str, Any]) -> Any:
        """The same with arguments by their names on the wire."""
        return await self.shell.registry.find(name).call(arguments)

    async def cpu_indices(self) -> list[int]:
        """The numbers of the vCPUs."""
        return [cpu["cpu-index"] for cpu in await self.qmp("query-cpus-fast")]


async def execute_line(session: HumanSession, line: str) -> str:
    """Run *line*; what is printed, lines ended by LF.  Nothing is raised: what goes wrong is printed, too."""
    trace.handle_hmp_command(line)
    if not line.strip():
        return ""
    command, called, position = session.shell.find(line)
    if command is None:
        return unknown(called)
    cursor = Cursor(line, position, command.full_name, session.shell.format)
    try:
        values = read_arguments(command.arguments, cursor)
    except LineError as error:
        return f'{error}\nTry "help {called}" for more information\n'
    return await _run(command, session, values)


async def _run(command: HumanCommand, session: HumanSession, values: dict[str, Any]) -> str:
    try:
        result = command.handler(session, **values)
        text = await result if inspect.isawaitable(result) else result
    except CommandError as error:
        return f"Error: {error.desc}\n"
    except Exception as error:  # a fault of ours costs this answer, not the monitor
        traceback.print_exc(file=sys.stderr)
        return f"Error: Internal error: {type(error).__name__}: {error}\n"
    return text or ""


def unknown(name: str) -> str:
    """What is said about a command that does not exist."""
    return f"unknown command: '{name}'\n"


def command_word(line: str, position: int) -> tuple[str, int]:
    """The name behind the blanks at *position*, and where it ends."""
    match = _COMMAND_WORD.match(line, skip_blanks(line, position))
    return (match.group(), match.end()) if match else ("", position)


def _beginning_with(start: str, words: Iterable[str]) -> list[str]:
    return [word for word in words if word.startswith(start)]
