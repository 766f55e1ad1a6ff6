"""Trace events from the monitors: QMP's two commands, HMP's two, with QEMU's words."""

import asyncio

import pytest

from kvm.monitor.registry import Registry
from kvm.monitor.tracing import TraceCommands
from qemumig.commands.command import CommandError
from qemumig.trace import Trace
from tests.kvm.monitor.human import Person


@pytest.fixture
def trace():
    made = Trace()
    for name in ("savevm_state_header", "savevm_state_setup", "migrate_error"):
        made.event(name)
    return made


@pytest.fixture
def ask(trace):
    registry = Registry()
    registry.add(TraceCommands(trace).commands())
    return lambda command, **arguments: asyncio.run(registry.find(f"trace-event-{command}").call(arguments))


def test_the_state_of_one_event_and_of_a_pattern(ask, trace):
    trace.enable("savevm_state_setup")
    assert ask("get-state", name="savevm_state_header") == [{"name": "savevm_state_header", "state": "disabled"}]
    assert ask("get-state", name="savevm*") == [
        {"name": "savevm_state_setup", "state": "enabled"},
        {"name": "savevm_state_header", "state": "disabled"},
    ]
    assert ask("get-state", name="nosuch*") == []


def test_a_pattern_switches_what_it_fits(ask, trace):
    assert ask("set-state", name="savevm*", enable=True) == {}
    assert [event.enabled for event in trace.events()] == [True, True, False]
    ask("set-state", **{"name": "*_setup", "enable": False, "ignore-unavailable": True})
    assert [event.enabled for event in trace.events()] == [True, False, False]


@pytest.mark.parametrize("name", ["nosuch", "savevm_?tate_header", "", "savevm_[s]tate_header"])
def test_without_an_asterisk_it_is_the_name_of_an_event(ask, name):
    for command, arguments in (("get-state", {}), ("set-state", {"enable": True})):
        with pytest.raises(CommandError) as refusal:
            ask(command, name=name, **arguments)
        assert refusal.value.desc == f'unknown event "{name}"'


@pytest.fixture
def person(trace):
    someone = Person()
    someone.registry.add(TraceCommands(trace).commands())
    return someone


def test_a_person_switches_and_sees(person):
    assert person.type("trace-event savevm_state_setup on") == ""
    assert person.type("info trace-events savevm*") == "savevm_state_setup : state 1\nsavevm_state_header : state 0\n"
    assert person.type("trace-event * off") == ""
    assert person.type("info trace-events").splitlines()[-1] == "savevm_state_header : state 0"


def test_a_person_is_refused_in_qemu_s_words(person):
    assert person.type("trace-event nosuch on") == 'unknown event "nosuch"\n'
    assert person.type("info trace-events nosuch") == 'unknown event "nosuch"\n'
    hint = "Expected 'on' or 'off'\nTry \"help trace-event\" for more information\n"
    assert person.type("trace-event migrate_error foo") == hint
