"""A line in, text out: finding commands, reading their arguments, saying what is wrong (hmp.md §1)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvm.monitor.hmp.errors import LineError
from kvm.monitor.hmp.expression import MAX_NESTING, evaluate
from qemumig.commands.command import CommandError
from tests.kvm.monitor.human import Person

TRY = 'Try "help {}" for more information\n'
STATUS = {"status": "running", "running": True}
CPUS = [{"cpu-index": 0, "thread-id": 11}, {"cpu-index": 1, "thread-id": 12}]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1+2*3", 7),
        ("5|1&2+3", 3),  # & and | bind tighter than +, and alike
        ("7%4*2", 6),
        ("-5/2", -2),
        ("-5%3", -2),
        ("~0", -1),
        ("--1", 1),
        ("( 1 + 2 ) * 3", 9),
        ("0x10 - 0x20", -16),
        ("017", 15),
        ("'A'", 65),
        ("0xffffffffffffffff", -1),
        ("0x7fffffffffffffff+1", -(1 << 63)),
    ],
)
def test_expressions_are_worth_what_they_are_in_c_with_one_odd_precedence(text, value):
    assert evaluate(text, 0) == (value, len(text))


@pytest.mark.parametrize(("text", "end"), [("08", 1), ("0x", 1), ("1k", 1), ("1.5", 1), ("1<<4", 1), ("1 2", 2), ("1)", 1)])
def test_an_expression_ends_where_it_cannot_go_on(text, end):
    assert evaluate(text, 0)[1] == end


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "unexpected end of expression"),
        ("1+", "unexpected end of expression"),
        ("(1+2", "')' expected"),
        ("foo", "invalid char 'f' in expression"),
        ("7/0", "division by zero"),
        ("7%0", "division by zero"),
        ("99999999999999999999", "number too large"),
        ("9" * 5000, "number too large"),
        ("0x1ffffffffffffffff", "number too large"),
        ("'", "character constant expected"),
        ("'AB'", "missing terminating ' character"),
        ("$rip", "unknown register"),
        ("(" * 100_000, f"expression has more than {MAX_NESTING} nested parentheses"),
    ],
)
def test_a_bad_expression_says_why(text, complaint):
    with pytest.raises(LineError) as error:
        evaluate(text, 0)
    assert str(error.value) == complaint


@given(st.text("0123456789abcdefx+-*/%&|^~()' $", max_size=40))
def test_any_expression_is_a_number_or_an_error(text):
    try:
        value, end = evaluate(text, 0)
    except LineError:
        return
    assert -(1 << 63) <= value < 1 << 63
    assert 0 < end <= len(text)


@pytest.mark.parametrize(
    ("line", "printed"),
    [
        ("", ""),
        ("   ", ""),
        ("foo bar", "unknown command: 'foo'\n"),
        ("  foo bar", "unknown command: '  foo'\n"),
        ("a ; b", "unknown command: 'a'\n"),
        ("STOP", "unknown command: 'STOP'\n"),
        ("/x", "unknown command: ''\n"),
        ("info nosuch", "unknown command: 'info nosuch'\n"),
        ("info  nosuch/x y", "unknown command: 'info  nosuch'\n"),
        ("info/bar", "unknown command: 'info'\n"),
        ("help nosuch", "unknown command: 'nosuch'\n"),
        ("help info nosuch", "unknown command: 'info nosuch'\n"),
        ("stop x", "stop|s: extraneous characters at the end of line\n" + TRY.format("stop")),
        ("s x", "stop|s: extraneous characters at the end of line\n" + TRY.format("s")),
        ("stop/x", "stop|s: extraneous characters at the end of line\n" + TRY.format("stop")),
        (" info  status x", "status: extraneous characters at the end of line\n" + TRY.format(" info  status")),
        ("migrate", "migrate: string expected\n" + TRY.format("migrate")),
        ("migrate -x", "migrate: unsupported option -x\n" + TRY.format("migrate")),
        ("migrate -d -d u", "migrate: unsupported option -d\n" + TRY.format("migrate")),
        ("migrate -r -d u", "migrate: extraneous characters at the end of line\n" + TRY.format("migrate")),
        ("migrate -dr u", "migrate: extraneous characters at the end of line\n" + TRY.format("migrate")),
        ('migrate "abc', "migrate: string expected\n" + TRY.format("migrate")),
        ('migrate "a\\qb"', "migrate: string expected\n" + TRY.format("migrate")),
        ('migrate "a"b', "migrate: extraneous characters at the end of line\n" + TRY.format("migrate")),
        ("cpu", "unexpected end of expression\n" + TRY.format("cpu")),
        ("cpu -1", "'cpu' has failed: integer is for 32-bit values\n" + TRY.format("cpu")),
        ("cpu 4294967296", "'cpu' has failed: integer is for 32-bit values\n" + TRY.format("cpu")),
        ("cpu 2", "invalid CPU index\n"),
        ("print/z 0", "invalid char in format: 'z'\n" + TRY.format("print")),
        ("print/99999999999x 0", "print|p: the count 999999999… is too large\n" + TRY.format("print")),
    ],
)
def test_what_is_wrong_with_a_line_is_said_in_qemus_words(line, printed):
    names = ("stop", "migrate", "query-migrate", "query-status")
    assert Person({**{name: {} for name in names}, "query-cpus-fast": CPUS}).type(line) == printed


@pytest.mark.parametrize(
    ("line", "uri", "resume"),
    [
        ("migrate -d tcp:a:1", "tcp:a:1", False),
        ("migrate -d -r tcp:a:1", "tcp:a:1", True),
        ("migrate  -r  tcp:a:1 ", "tcp:a:1", True),
        ('migrate -d "exec:cat > \\"a b\\""', 'exec:cat > "a b"', False),
        ('migrate -d ""', "", False),
        ("migrate -d a\"b'c", "a\"b'c", False),
    ],
)
def test_arguments_reach_the_qmp_command_as_they_are_meant(line, uri, resume):
    person = Person({"migrate": {}, "query-migrate": {}})
    person.type(line)
    assert person.asked[0] == ("migrate", {"uri": uri, "resume": resume})


def test_a_refusal_of_qmp_is_printed_behind_error():
    assert Person({"stop": CommandError("it will not")}).type("stop") == "Error: it will not\n"


def test_a_command_is_there_only_with_the_qmp_command_it_stands_on():
    without = Person({})
    assert without.type("stop") == "unknown command: 'stop'\n"
    assert "stop" not in without.type("help")
    assert Person({"stop": {}}).type("stop") == ""


def test_a_fault_inside_a_command_costs_one_answer(capsys):
    person = Person({"query-status": {"no": "status"}, "query-name": {"name": "vm"}})
    assert person.type("info status") == "Error: Internal error: KeyError: 'running'\n"
    assert "KeyError" in capsys.readouterr().err
    assert person.type("info name") == "vm\n"


def test_help_has_a_line_for_every_command_and_topic():
    person = Person({"stop": {}, "query-status": {}})
    assert [line.split()[0] for line in person.type("help").splitlines()] == [
        *("help|?", "info", "print|p", "stop|s", "x", "xp")
    ]
    assert person.type("?") == person.type("help")
    assert person.type("help stop").startswith("stop|s ")
    assert person.type("help s") == person.type("help stop")
    assert person.type("info") == person.type("help info")
    assert [line.split()[:2] for line in person.type("info").splitlines()] == [["info", "history"], ["info", "status"]]
    assert person.type("help info status").startswith("info status ")


def test_a_name_cannot_be_taken_twice():
    person = Person({})
    with pytest.raises(ValueError, match=r"'p.*' is registered twice"):
        person.shell.commands.add([person.shell.commands.find("p")])


def test_human_monitor_command_prints_crlf_and_speaks_for_the_cpu_it_is_given():
    person = Person({"query-cpus-fast": CPUS})
    assert person.type_to_qmp("info cpus") == "* CPU #0: thread_id=11\r\n  CPU #1: thread_id=12\r\n"
    assert person.type_to_qmp("info cpus", cpu_index=1) == "  CPU #0: thread_id=11\r\n* CPU #1: thread_id=12\r\n"
    for index in (2, -1):
        with pytest.raises(CommandError, match="Parameter 'cpu-index' expects a CPU number"):
            person.type_to_qmp("info cpus", cpu_index=index)


def test_a_terminal_remembers_its_cpu():
    person = Person({"query-cpus-fast": CPUS})
    assert person.type("cpu 1") == ""
    assert person.type("info cpus") == "  CPU #0: thread_id=11\n* CPU #1: thread_id=12\n"


@pytest.mark.parametrize(
    ("line", "answer", "printed"),
    [
        ("info status", {"query-status": STATUS}, "VM status: running\n"),
        ("info status", {"query-status": {"status": "paused", "running": False}}, "VM status: paused\n"),
        ("info status", {"query-status": {"status": "postmigrate", "running": False}}, "VM status: paused (postmigrate)\n"),
        ("info name", {"query-name": {"name": "a b"}}, "a b\n"),
        ("info name", {"query-name": {}}, ""),
        ("info uuid", {"query-uuid": {"UUID": "0-1"}}, "0-1\n"),
        ("info kvm", {"query-kvm": {"enabled": True, "present": True}}, "kvm support: enabled\n"),
        ("info kvm", {"query-kvm": {"enabled": False, "present": True}}, "kvm support: disabled\n"),
        (
            "info version",
            {"query-version": {"qemu": {"major": 10, "minor": 0, "micro": 2}, "package": "Debian"}},
            "10.0.2Debian\n",
        ),
    ],
)
def test_info_tells_what_qmp_knows(line, answer, printed):
    assert Person(answer).type(line) == printed


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("", ["?", "help", "info", "migrate_set_capability", "p", "print", "s", "stop", "x", "xp"]),
        ("st", ["stop"]),
        ("info s", ["status"]),
        ("help info s", ["status"]),
        ("? st", ["stop"]),
        ("migrate_set_capability post", ["postcopy-blocktime", "postcopy-preempt", "postcopy-ram"]),
        ("migrate_set_capability events ", ["off", "on"]),
        ("migrate_set_capability events on ", []),
        ("nosuch ", []),
    ],
)
def test_completion_offers_what_may_come_next(line, found):
    person = Person({name: {} for name in ("stop", "query-status", "migrate-set-capabilities")})
    assert sorted(person.shell.complete(line)) == found
