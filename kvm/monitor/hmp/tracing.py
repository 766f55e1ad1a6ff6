"""trace-event and info trace-events; their refusals are printed without "Error: ", as QEMU prints them."""

from __future__ import annotations

from qemumig.commands.command import CommandError

from .arguments import Switch, Text
from .command import HumanCommand
from .shell import HumanSession

GET, SET = "trace-event-get-state", "trace-event-set-state"


def tracing_commands() -> list[HumanCommand]:
    """Switching events."""
    arguments = (Text("name"), Switch("option"))
    return [
        HumanCommand("trace-event", trace_event, arguments, help="changes status of a specific trace event", needs=(SET,))
    ]


def tracing_information() -> list[HumanCommand]:
    """Showing them."""
    text = "show available trace-events & their state (name: event name pattern)"
    return [HumanCommand("trace-events", info_trace_events, (Text("name", optional=True),), help=text, needs=(GET,))]


async def trace_event(session: HumanSession, name: str, option: bool) -> str:
    try:
        await session.qmp_with(SET, {"name": name, "enable": option})
    except CommandError as error:
        return f"{error.desc}\n"
    return ""


async def info_trace_events(session: HumanSession, name: str = "*") -> str:
    try:
        events = await session.qmp_with(GET, {"name": name})
    except CommandError as error:
        return f"{error.desc}\n"
    return "".join(f"{event['name']} : state {int(event['state'] == 'enabled')}\n" for event in events)
