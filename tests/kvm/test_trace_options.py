"""-trace: patterns, files of patterns, files of lines; what is said about mistakes."""

import pytest

from kvm.diagnostics import Diagnostics
from kvm.keyval import UsageError
from kvm.options import HelpRequested, parse
from kvm.trace_options import start_tracing
from qemumig.trace import TRACE, Trace

BASE = ["-bios", "b"]


@pytest.fixture
def trace():
    made = Trace()
    for name in ("savevm_state_header", "savevm_state_setup", "migrate_error"):
        made.event(name, "{}")
    yield made
    made.close()


@pytest.fixture
def start(trace, capfd):
    """Start *trace* with some -trace options: whether that worked, what is on then, what was said."""

    def run(*texts, timestamps=False):
        requests = parse([*BASE, *(word for text in texts for word in ("-trace", text))]).traces
        works = start_tracing(trace, requests, Diagnostics("PROG", timestamps))
        return works, [event.name for event in trace.events() if event.enabled], capfd.readouterr().err

    return run


@pytest.mark.parametrize(
    ("texts", "names"),
    [
        (["migrate_error"], ["migrate_error"]),
        (["enable=savevm*"], ["savevm_state_header", "savevm_state_setup"]),
        (["savevm*", "-savevm_state_s*"], ["savevm_state_header"]),
        (["nosuch*", ""], []),
    ],
)
def test_patterns_switch_on_and_off(start, texts, names):
    assert start(*texts) == (True, names, "")


def test_an_event_that_is_none_is_warned_of(start):
    assert start("nosuch") == (True, [], "PROG: -trace nosuch: warning: trace event 'nosuch' does not exist\n")


def test_patterns_come_from_a_file(start, tmp_path):
    path = tmp_path / "events"
    path.write_text("# mine\n\nsavevm*  # both\nnosuch\n-savevm_state_setup\n")
    warning = f"PROG:{path}:4: warning: trace event 'nosuch' does not exist\n"
    assert start(f"events={path}") == (True, ["savevm_state_header"], warning)


def test_a_file_of_patterns_that_is_missing_ends_it(start):
    assert start("events=/nonexistent") == (False, [], "PROG:/nonexistent: No such file or directory\n")


def test_a_file_for_lines_that_cannot_be_opened_ends_it(start):
    message = "PROG: Error opening logfile /nonexistent/x: No such file or directory\n"
    assert start("migrate_error,file=/nonexistent/x") == (False, [], message)


def test_lines_go_to_the_file_or_to_standard_error(start, trace, tmp_path, capfd):
    start("migrate_error")
    event = trace.events("migrate_error")[0]
    event("first")
    assert capfd.readouterr().err == "migrate_error first\n"
    start(f"file={tmp_path}/lines")
    event("second")
    assert (tmp_path / "lines").read_text() == "migrate_error second\n"


@pytest.mark.parametrize("text", ["help", "enable=help", "?", "help,file=x"])
def test_help_lists_the_events(text):
    with pytest.raises(HelpRequested) as asked:
        parse([*BASE, "-trace", text])
    assert str(asked.value).splitlines() == [event.name for event in TRACE.events()]
    assert "migrate_set_state" in str(asked.value)


def test_an_unknown_key_is_refused():
    with pytest.raises(UsageError) as error:
        parse([*BASE, "-trace", "foo=bar"])
    assert error.value.messages == ("-trace foo=bar: Invalid parameter 'foo'",)
