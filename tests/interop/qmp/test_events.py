"""Events come in the order in which a real QEMU emits them (qmp.md; state-machine.md)."""

from __future__ import annotations

import socket
from collections.abc import Iterable
from typing import Any

import pytest

from tests.support.host import qemumig_system
from tests.support.vmm import Stage, listen

from .speaker import PATIENCE_S, Speaker, require_dialect
from .steps import Step, ask, without

pytestmark = pytest.mark.usefixtures("no_leaks")


def names_of(messages: Iterable[dict[str, Any]]) -> list[str]:
    """Events and responses by name; passes while active are left out, for their number is a matter of speed."""
    names: list[str] = []
    for message in messages:
        name = message.get("event") or next(name for name in ("return", "error", "QMP") if name in message)
        if name == "MIGRATION":
            name = message["data"]["status"]
        if name != "MIGRATION_PASS" or names[-1:] != ["active"]:
            names.append(name)
    return names


def test_events_of_a_command_come_before_its_answer(stage: Stage, qemu: str) -> None:
    told = []
    for name, system in (("qemu", qemu), ("ours", qemumig_system())):
        with Speaker(stage, name, system) as speaker:
            speaker.negotiate()
            steps = ("stop", "cont", "system_reset", "system_powerdown", "quit")
            told.append([speaker.answer(ask(step)) for step in steps])
            assert speaker.vmm.process.wait(PATIENCE_S) == 0
    assert told[0] == told[1]
    assert [names_of(one) for one in told[1]] == [
        ["STOP", "return"],
        ["RESUME", "return"],
        ["RESET", "return"],
        ["POWERDOWN", "return"],
        ["SHUTDOWN", "return"],
    ]


EVENTS_ON = ask("migrate-set-capabilities", {"capabilities": [{"capability": "events", "state": True}]})


def migrated(stage: Stage, label: str, system: str, *, paused: bool) -> tuple[list[str], list[str]]:
    """The events of both ends of a migration, with nothing but *system* on them."""
    with (
        Speaker(stage, f"{label}-a", system) as source,
        Speaker(stage, f"{label}-b", system, incoming=True) as destination,
    ):
        for speaker in (source, destination):
            speaker.negotiate()
            assert speaker.answer(EVENTS_ON) == [{"return": {}}]
        if paused:
            source.answer(ask("stop"))
        uri = listen(destination.vmm)
        source.send(ask("migrate", {"uri": uri}))
        source_events = events_of(source.until("MIGRATION", status="completed"))
        return source_events, events_of(destination.until("MIGRATION", status="completed"))


@pytest.mark.parametrize("paused", [False, True], ids=["running", "paused"])
def test_a_migration_has_the_events_of_qemu(stage: Stage, qemu: str, paused: bool) -> None:
    require_dialect(qemu)
    assert migrated(stage, "ours", qemumig_system(), paused=paused) == migrated(stage, "qemu", qemu, paused=paused)


def events_of(messages: Iterable[dict[str, Any]]) -> list[str]:
    """Without answers: when that of `migrate` comes between them is a matter of speed, too."""
    return names_of(message for message in messages if "event" in message)


def refused(stage: Stage, name: str, system: str) -> list[str]:
    """The events of a migration to where nobody listens."""
    with Speaker(stage, name, system) as speaker:
        speaker.negotiate()
        speaker.answer(EVENTS_ON)
        speaker.send(ask("migrate", {"uri": "unix:DIR/nobody"}))
        return events_of(speaker.until("MIGRATION", status="failed"))


def cancelled(stage: Stage, name: str, system: str) -> list[str]:
    """The events of a migration that is slowed down, and cancelled while it is active."""
    with Speaker(stage, name, system) as speaker, socket.socket(socket.AF_UNIX) as peer:
        speaker.negotiate()
        speaker.answer(EVENTS_ON)
        speaker.answer(ask("migrate-set-parameters", {"max-bandwidth": 4096}))
        peer.bind(str(speaker.directory / "peer"))
        peer.listen()
        speaker.send(ask("migrate", {"uri": "unix:DIR/peer"}))
        came = speaker.until("MIGRATION", status="active")
        speaker.send(ask("migrate_cancel"))
        return events_of(came + speaker.until("MIGRATION", status="cancelled"))


def members(value: dict[str, Any]) -> list[str]:
    return sorted(value)


STATE = ask("query-migrate", view=members)
PAUSE = {"capability": "pause-before-switchover", "state": True}
GO_ON = ask("migrate-continue", {"state": "pre-switchover"})


def paused(stage: Stage, name: str, system: str, *, end: Step, status: str) -> list[Any]:
    """The events around a pause before the switchover that ends with *end*, and what can be seen and done in it."""
    with Speaker(stage, f"{name}-a", system) as source, Speaker(stage, f"{name}-b", system, incoming=True) as destination:
        for speaker in (source, destination):
            speaker.negotiate()
        events_on: list[Any] = [*(EVENTS_ON.arguments or {})["capabilities"], PAUSE]
        source.answer(ask("migrate-set-capabilities", {"capabilities": events_on}))
        start = ask("migrate", {"uri": listen(destination.vmm)})
        came = source.until_answered(start, "MIGRATION", status="pre-switchover")
        seen = [source.answer(STATE)[-1], source.answer(ask("migrate-continue", {"state": "device"}))[-1]]
        seen += [source.answer(ask("cont"))[-1], source.answer(ask("query-status", view=without("singlestep")))[-1]]
        came += source.until_answered(end, "MIGRATION", status=status)
        # In a cancel's wake a QEMU may find an error of its channel, too.
        after = ask("query-migrate", view=lambda value: members(without("error-desc")(value)))
        return [events_of(came), *seen, source.answer(after)[-1]]


def goes_on(stage: Stage, name: str, system: str) -> list[Any]:
    return paused(stage, name, system, end=GO_ON, status="completed")


def cancelled_in_the_pause(stage: Stage, name: str, system: str) -> list[Any]:
    return paused(stage, name, system, end=ask("migrate_cancel"), status="cancelled")


def yanked(stage: Stage, name: str, system: str) -> list[Any]:
    """The events of a migration to a peer that reads nothing, broken by yank, and what query-migrate shows meanwhile."""
    with Speaker(stage, name, system) as speaker, socket.socket(socket.AF_UNIX) as peer:
        speaker.negotiate()
        speaker.answer(EVENTS_ON)
        peer.bind(str(speaker.directory / "peer"))
        peer.listen()
        came = speaker.until_answered(ask("migrate", {"uri": "unix:DIR/peer"}), "MIGRATION", status="active")
        came.append(speaker.answer(STATE)[-1])
        end = ask("yank", {"instances": [{"type": "migration"}]})
        came += speaker.until_answered(end, "MIGRATION", status="failed")
        return [events_of(came), speaker.answer(STATE)[-1]]


@pytest.mark.parametrize(
    "scenario",
    [refused, cancelled, goes_on, cancelled_in_the_pause, yanked],
    ids=lambda scenario: scenario.__name__,
)
def test_a_migration_that_fails_has_the_events_of_qemu(stage: Stage, qemu: str, scenario: Any) -> None:
    """Whether the answer or the next event is first is a race on both sides, so answers are left out."""
    require_dialect(qemu)
    assert scenario(stage, "ours", qemumig_system()) == scenario(stage, "qemu", qemu)
