"""The human monitor: QEMU's HMP, a thin language over the commands of QMP (hmp.md).

    keys ─▶ readline ─▶ line ─▶ shell ─▶ command ─▶ QMP's registry            a terminal: monitor.py
                                  ▲                                           human-monitor-command: shell.py
                 expression, arguments

    expression.py        numbers as a person types them
    arguments.py         flags, words, numbers, formats: how each kind is read from a line
    command.py           one command, and the table of them
    shell.py             a line in, text out; help, completion
    general.py           run state, help, `info` about the machine
    memory.py            x, xp, print
    migration.py         the migration commands; migration_report.py: what `info` says about it
    dirty_rate.py        dirty rate and dirty limit
    tracing.py           trace events
    monitor.py           a character device with a person at it

A command is there when the QMP commands it stands on are: a feature that registers those brings its human commands along.
"""

from __future__ import annotations

from collections.abc import Callable

from ..registry import Registry
from .dirty_rate import dirty_rate_commands, dirty_rate_information
from .general import general_commands, general_information
from .memory import memory_commands
from .migration import migration_commands, migration_information
from .monitor import HumanMonitor
from .shell import GuestView, HumanShell, MigrationProperties, execute_line
from .tracing import tracing_commands, tracing_information

__all__ = ["GuestView", "HumanMonitor", "HumanShell", "execute_line", "make_shell"]


def make_shell(
    registry: Registry, view: GuestView, properties: MigrationProperties, report: Callable[[str], None]
) -> HumanShell:
    """The shell with all its commands; `HumanShell` says what it wants."""
    shell = HumanShell(registry, view, properties, report)
    commands = general_commands(), memory_commands(), migration_commands(), dirty_rate_commands(), tracing_commands()
    for some in commands:
        shell.commands.add(some)
    topics = general_information(), migration_information(), dirty_rate_information(), tracing_information()
    for some in topics:
        shell.information.add(some)
    return shell
