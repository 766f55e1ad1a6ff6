"""trace-event-get-state and trace-event-set-state: trace events by name or pattern (qmp.md §14)."""

from __future__ import annotations

from qemumig.commands.command import BOOL, STR, Argument, Command, CommandError
from qemumig.trace import Event, Trace, is_pattern

from .types import TRACE_EVENTS


class TraceCommands:
    """The events of *trace* behind QMP."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace

    def commands(self) -> list[Command]:
        """What a monitor may do with them."""
        wanted = (Argument("name", STR), Argument("enable", BOOL), Argument("ignore-unavailable", BOOL, optional=True))
        return [
            Command("trace-event-get-state", self._get, (Argument("name", STR),), returns=TRACE_EVENTS),
            Command("trace-event-set-state", self._set, wanted),
        ]

    def _find(self, name: str) -> list[Event]:
        """What *name* means; with an asterisk it may mean nothing, without it is the name of an event."""
        found = [event for event in self._trace.events(name) if is_pattern(name) or event.name == name]
        if not found and not is_pattern(name):
            raise CommandError(f'unknown event "{name}"')
        return found

    def _get(self, name: str) -> list[dict[str, str]]:
        """The newest declaration comes first, as in QEMU."""
        return [
            {"name": event.name, "state": "enabled" if event.enabled else "disabled"} for event in self._find(name)[::-1]
        ]

    def _set(self, name: str, enable: bool, ignore_unavailable: bool = False) -> None:
        for event in self._find(name):
            event.enabled = enable
