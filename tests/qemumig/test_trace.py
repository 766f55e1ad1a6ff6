"""Trace events: silent until asked, one line each, harmless whatever becomes of the line."""

from __future__ import annotations

import ast
import os
import re
import string
import sys
import threading
from pathlib import Path

import pytest

import kvm
import kvm.trace
import qemumig
from qemumig import trace
from qemumig.trace import LONGEST_LINE, TRACE, Trace


@pytest.fixture
def traced(tmp_path):
    """A trace of its own with two events, and where its lines go."""
    made = Trace()
    made.event("one_thing", "size {} at {:#x}")
    made.event("other_thing")
    made.open_file(str(tmp_path / "trace"))
    yield made, tmp_path / "trace"
    made.close()


def test_an_event_is_silent_until_it_is_enabled(traced):
    made, path = traced
    one, other = made.events()
    one(1, 2)
    made.enable("one_thing")
    one(5, 255)
    other()
    assert path.read_text() == "one_thing size 5 at 0xff\n"


def test_a_silent_event_formats_nothing(traced):
    class Costly:
        def __format__(self, spec):
            raise AssertionError("formatted")

    traced[0].events("one_thing")[0](Costly(), Costly())


@pytest.mark.parametrize(
    ("pattern", "names"),
    [("*", ["one_thing", "other_thing"]), ("o?e*", ["one_thing"]), ("one_thing", ["one_thing"]), ("one", []), ("[o]*", [])],
)
def test_a_pattern_finds_what_qemu_would_find(traced, pattern, names):
    assert [event.name for event in traced[0].events(pattern)] == names


def test_a_name_that_is_none_is_told_and_a_pattern_without_match_is_fine(traced):
    made, _ = traced
    assert not made.enable("nosuch")
    assert not made.enable("nosuc?")
    assert made.enable("nosuch*")


def test_a_line_is_one_line_whatever_a_peer_calls_its_things(traced):
    made, path = traced
    made.enable("one_thing")
    made.events()[0]("a\nmigrate_set_state new state completed\x1b[2J", 1)
    assert path.read_text().splitlines() == [r"one_thing size a\nmigrate_set_state new state completed\x1b[2J at 0x1"]


def test_a_line_that_is_too_long_is_cut(traced):
    made, path = traced
    made.enable("one_thing")
    made.events()[0]("é" * 5000, 1)
    line = path.read_bytes()
    assert len(line) == LONGEST_LINE
    assert line.endswith(b" [cut]\n")


def test_timestamps_are_those_of_messages(traced):
    made, path = traced
    made.timestamps = True
    made.enable("other_thing")
    made.events("other*")[0]()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z other_thing \n", path.read_text())


def test_lines_of_many_threads_do_not_mix(traced):
    made, path = traced
    made.enable("one_thing")
    event = made.events()[0]
    threads = [threading.Thread(target=lambda n=n: [event(n, i) for i in range(200)]) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = path.read_text().splitlines()
    assert sorted(lines) == sorted(f"one_thing size {n} at {i:#x}" for n in range(4) for i in range(200))


def test_a_file_keeps_what_was_in_it(tmp_path):
    path = tmp_path / "trace"
    path.write_text("before\n")
    made = Trace()
    event = made.event("thing", "{}")
    made.open_file(str(path))
    made.enable("*")
    event(1)
    made.close()
    event(2)
    assert path.read_text() == "before\nthing 1\n"


def test_a_full_disk_costs_nothing_but_the_line():
    made = Trace()
    event = made.event("thing")
    made.open_file("/dev/full")
    made.enable("*")
    event()
    event()
    made.close()


def into_pipe(made: Trace) -> tuple[int, int]:
    """Let *made* write into a pipe: the reading end, and how much the pipe takes."""
    reader, writer = os.pipe()
    size = os.write(writer, b"\0" * 4096)
    while size % 4096 == 0:
        os.set_blocking(writer, False)
        try:
            size += os.write(writer, b"\0" * 4096)
        except BlockingIOError:
            break
    os.set_blocking(writer, True)
    made.open_file(f"/proc/self/fd/{writer}")
    os.close(writer)
    return reader, size


def test_a_reader_that_stands_still_holds_nobody_and_is_told_what_it_missed():
    made = Trace()
    event = made.event("thing", "{}")
    reader, size = into_pipe(made)
    made.enable("*")
    for number in range(50):
        event(number)
    while size:
        size -= len(os.read(reader, size))
    event(50)
    assert os.read(reader, 4096) == b"trace: 50 lines were lost\nthing 50\n"
    made.close()
    os.close(reader)


def test_a_reader_that_is_gone_costs_nothing():
    made = Trace()
    event = made.event("thing")
    reader, _ = into_pipe(made)
    os.close(reader)
    made.enable("*")
    event()
    made.close()


def test_with_standard_error_closed_from_the_start_descriptor_2_is_left_alone(monkeypatch, capfd):
    made = Trace()
    event = made.event("thing", "{}")
    made.enable("*")
    event(1)
    monkeypatch.setattr(sys, "__stderr__", None)
    event(2)
    assert capfd.readouterr().err == "thing 1\n"


def test_a_file_that_cannot_be_opened_is_an_error_at_once(tmp_path):
    made = Trace()
    with pytest.raises(FileNotFoundError):
        made.open_file(str(tmp_path / "missing" / "trace"))


def test_a_name_is_declared_once():
    made = Trace()
    made.event("thing")
    with pytest.raises(ValueError, match="thing"):
        made.event("thing")


# ---- the events of the program ----


def declared() -> dict[str, trace.Event]:
    return {event.name: event for event in TRACE.events()}


def calls() -> list[tuple[str, str, ast.Call]]:
    """Every call trace.NAME(…) in the program: its place, the name, the call."""
    found = []
    for package in (qemumig, kvm):
        root = Path(package.__file__).parent
        for path in sorted(root.rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                match node:
                    case ast.Call(func=ast.Attribute(value=ast.Name(id="trace"), attr=name)):
                        found.append((f"{path.relative_to(root.parent)}:{node.lineno}", name, node))
    return found


def test_every_event_goes_by_the_name_of_its_variable():
    events = {name: value for module in (trace, kvm.trace) for name, value in vars(module).items()}
    assert {name for name, value in events.items() if isinstance(value, trace.Event)} == set(declared())
    assert all(value.name == name for name, value in events.items() if isinstance(value, trace.Event))


def test_every_call_fills_its_event_s_template():
    events, wrong, used = declared(), [], set()
    for place, name, call in calls():
        used.add(name)
        places = [field for _, field, _, _ in string.Formatter().parse(events[name].template) if field is not None]
        starred = any(isinstance(argument, ast.Starred) for argument in call.args)
        if len(places) != len(call.args) and not starred:
            wrong.append(f"{place}: {name} takes {len(places)} values, gets {len(call.args)}")
    assert wrong == []
    assert used == set(events)
