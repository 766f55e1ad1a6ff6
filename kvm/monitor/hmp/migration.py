"""Migration, as people ask for it (hmp.md §2, §3).

Each command is one of QMP, or a few: nothing is decided here but how a value that somebody typed is meant.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable
from typing import Any

from qemumig.commands.command import CommandError
from qemumig.options import CAPABILITIES, PARAMETERS, Parameter
from qemumig.qapi import MigrationStatus

from ...keyval import UNITS, UsageError
from ...keyval import size as read_size
from ...keyval import switch as read_switch
from ..c_number import DIGITS, magnitude
from .arguments import Argument, Flag, Number, Switch, Text
from .command import Candidates, Handler, HumanCommand, nothing
from .migration_report import info_capabilities, info_migrate, info_parameters
from .shell import HumanSession

_INT64_MAX = (1 << 63) - 1
_BANDWIDTH = re.compile(r"(0[xX][0-9a-fA-F]{1,32}|[0-9]{1,32}\.?[0-9]{0,32}|\.[0-9]{1,32})([bBkKmMgGtTpPeE]?)")
_IN_MEBIBYTES = ("max-bandwidth", "avail-switchover-bandwidth")
_ONLY_BY_QMP = "block-bitmap-mapping"
_WAITED_FOR = frozenset({MigrationStatus.SETUP.value, MigrationStatus.ACTIVE.value})

MIGRATE_HELP = "migrate to URI (-d: do not wait for the end, -r: resume a paused postcopy migration)"

_PARAMETERS = {parameter.name: parameter for parameter in PARAMETERS}


def migration_commands() -> list[HumanCommand]:
    """The commands that change something."""
    uri, value, switch = (Text("uri"),), (Text("name"), Text("value")), (Text("name"), Switch("state"))
    ports = (Number("port", optional=True), Number("tls_port", optional=True))
    display = (Text("protocol"), Text("hostname"), *ports, Text("cert_subject", optional=True))
    group = (Text("interfaces", optional=True), Text("id", optional=True))
    states, parameters = words_of([status.value for status in MigrationStatus]), words_of(_PARAMETERS)
    names = words_of([capability.name for capability in CAPABILITIES], ["off", "on"])
    return [
        _on_qmp("migrate", migrate, (Flag("d"), Flag("r"), *uri), MIGRATE_HELP),
        _on_qmp("migrate_incoming", migrate_incoming, uri, "start the incoming migration that -incoming defer waits for"),
        _on_qmp("migrate_recover", migrate_recover, uri, "wait for a paused postcopy migration to go on"),
        _on_qmp("migrate_continue", migrate_continue, (Text("state"),), "go on from the state it paused in", states),
        _on_qmp("migrate_set_capability", set_capability, switch, "switch a capability", names, "migrate-set-capabilities"),
        _on_qmp("migrate_set_parameter", set_parameter, value, "set a parameter", parameters, "migrate-set-parameters"),
        _on_qmp("announce_self", announce_self, group, "tell the network where the guest is"),
        _on_qmp(
            "client_migrate_info", client_migrate_info, display, "where a remote display goes", qmp="client_migrate_info"
        ),
        _passed_on("migrate_cancel", "migrate_cancel", "cancel the current migration"),
        _passed_on("migrate_pause", "migrate-pause", "pause the current migration (postcopy only)"),
        _passed_on("migrate_start_postcopy", "migrate-start-postcopy", "switch the current migration to postcopy"),
        _passed_on("x_colo_lost_heartbeat", "x-colo-lost-heartbeat", "tell COLO that the heartbeat is lost"),
    ]


def migration_information() -> list[HumanCommand]:
    """What `info` knows of migration."""
    return [
        _on_qmp("migrate", info_migrate, (), "show migration status", qmp="query-migrate"),
        _on_qmp("migrate_capabilities", info_capabilities, (), "show capabilities", qmp="query-migrate-capabilities"),
        _on_qmp("migrate_parameters", info_parameters, (), "show parameters", qmp="query-migrate-parameters"),
    ]


def words_of(*lists: Iterable[str]) -> Candidates:
    """Candidates for completion: each of *lists* has those for one word."""
    return lambda index: lists[index] if index < len(lists) else ()


def _on_qmp(
    name: str,
    handler: Handler,
    arguments: tuple[Argument, ...],
    text: str,
    complete: Candidates = nothing,
    qmp: str = "",
) -> HumanCommand:
    """A command that stands on *qmp*: without it, the one of the same name with dashes."""
    needs = (qmp or name.replace("_", "-"),)
    return HumanCommand(name, handler, arguments, help=text, needs=needs, complete=complete)


def _passed_on(name: str, qmp: str, text: str) -> HumanCommand:
    async def handler(session: HumanSession) -> None:
        await session.qmp(qmp)

    return HumanCommand(name, handler, help=text, needs=(qmp,))


# ---- the commands ----


async def migrate(session: HumanSession, d: bool, r: bool, uri: str) -> str:
    await session.qmp("migrate", uri=uri, resume=r)
    if d:
        return ""
    if session.wait_seconds is None:
        return "terminal does not allow synchronous migration, continuing detached\n"
    status = await session.qmp("query-migrate")
    while status.get("status") in _WAITED_FOR:
        await asyncio.sleep(session.wait_seconds)
        status = await session.qmp("query-migrate")
    if "error-desc" in status:
        session.shell.report(status["error-desc"])
    return ""


async def migrate_incoming(session: HumanSession, uri: str) -> None:
    await session.qmp("migrate-incoming", uri=uri, exit_on_error=False)


async def migrate_recover(session: HumanSession, uri: str) -> None:
    await session.qmp("migrate-recover", uri=uri)


async def migrate_continue(session: HumanSession, state: str) -> None:
    if state not in [status.value for status in MigrationStatus]:
        raise _unknown_name(state)
    await session.qmp("migrate-continue", state=state)


async def set_capability(session: HumanSession, name: str, state: bool) -> None:
    if name not in [capability.name for capability in CAPABILITIES]:
        raise _unknown_name(name)
    await session.qmp("migrate-set-capabilities", capabilities=[{"capability": name, "state": state}])


async def set_parameter(session: HumanSession, name: str, value: str) -> None:
    if name == _ONLY_BY_QMP:
        raise CommandError(f"The {name} parameter can only be set through QMP")
    if name not in _PARAMETERS:
        raise _unknown_name(name)
    await session.qmp_with("migrate-set-parameters", {name: parameter_value(_PARAMETERS[name], value)})


def _unknown_name(name: str) -> CommandError:
    return CommandError(f"invalid parameter value: {name}")


async def announce_self(session: HumanSession, interfaces: str = "", id: str = "") -> None:
    parameters = await session.qmp("query-migrate-parameters")
    arguments = {name: parameters[f"announce-{name}"] for name in ("initial", "max", "rounds", "step")}
    if interfaces:
        arguments["interfaces"] = interfaces.split(",")
    if id:
        arguments["id"] = id
    await session.qmp("announce-self", **arguments)


async def client_migrate_info(session: HumanSession, **arguments: Any) -> None:
    await session.qmp("client_migrate_info", **arguments)


# ---- what a typed value means ----


def parameter_value(parameter: Parameter, text: str) -> Any:
    """*text* as the parameter's type; CommandError with QEMU's words when it is none.  QMP checks the range."""
    name = parameter.name
    if name in _IN_MEBIBYTES:
        return bandwidth(text)
    try:
        if parameter.kind in ("size", "uint64"):
            return read_size(name, text)
        if parameter.kind == "bool":
            return read_switch(name, text)
    except UsageError as error:
        raise CommandError("\n".join((str(error), *error.hints))) from error
    return integer(name, text) if parameter.kind.startswith("uint") else text


def bandwidth(text: str) -> int:
    """Bytes a second; a number without a unit counts mebibytes, fractions are rounded."""
    from fractions import Fraction  # only here: it brings decimal with it

    match = _BANDWIDTH.fullmatch(text)
    if match is None:
        raise CommandError(f"Invalid size {text}")
    digits, suffix = match.groups()
    is_hex = digits[:2] in ("0x", "0X")
    unit = UNITS[(suffix or "m").lower()]
    value = int(digits, 16) * unit if is_hex else round(Fraction(digits.rstrip(".")) * unit)
    if value > _INT64_MAX or (is_hex and suffix):
        raise CommandError(f"Invalid size {text}")
    return value


def integer(name: str, text: str) -> int:
    """A number as C reads it; a negative one is for QMP to refuse."""
    digits = text.strip().removeprefix("+")
    sign, digits = (-1, digits[1:]) if digits[:1] == "-" else (1, digits)
    value = magnitude(digits) if DIGITS.fullmatch(digits) else None
    if value is None:
        raise CommandError(f"Parameter '{name}' expects uint64")
    return sign * value
