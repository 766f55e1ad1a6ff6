"""The line editor: what a terminal shows after each key (hmp.md §1)."""

import pytest

from kvm.monitor.readline import MAX_HISTORY, MAX_LINE, LineEditor

LEFT, RIGHT, REST = b"\x1b[D", b"\x1b[C", b"\x1b[K"
WORDS = ["stop", "stopcapture", "info", "i", "status", "stats"]


def editor():
    made = LineEditor(b"(qemu) ", lambda line: [word for word in WORDS if word.startswith(line.rpartition(" ")[2])])
    made.prompt()
    return made


def press(made, keys):
    """What the terminal is sent for *keys*, and the last line that they entered."""
    sent, entered = [], None
    for key in keys:
        drawn, line = made.key(key)
        sent.append(drawn)
        if line is not None:
            entered = line
            made.prompt()
    return b"".join(sent), entered


def line_after(keys):
    return press(editor(), keys + b"\r")[1]


def test_each_key_draws_the_line_anew():
    assert press(editor(), b"abc")[0] == b"a" + REST + LEFT + b"ab" + REST + LEFT * 2 + b"abc" + REST


def test_everything_before_the_last_erasure_may_be_stripped():
    sent = press(editor(), b"info status")[0]
    assert sent[: -len(REST)].endswith(b"info status")


@pytest.mark.parametrize("end", [b"\r", b"\n"])
def test_a_line_ends_with_crlf_on_the_terminal(end):
    assert press(editor(), b"a" + end) == (b"a" + REST + b"\r\n", b"a")
    assert press(editor(), end) == (b"\r\n", b"")


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        (b"abc\x01Z", b"Zabc"),
        (b"abc\x01\x05Z", b"abcZ"),
        (b"abc\x08Z", b"abZ"),
        (b"abc\x7fZ", b"abZ"),
        (b"\x08a", b"a"),
        (b"abc\x01\x04", b"bc"),
        (b"abc\x04", b"abc"),
        (b"abc\x1b[D\x1b[DZ", b"aZbc"),
        (b"abc\x1b[D\x1b[CZ", b"abcZ"),
        (b"abc\x1b[CZ", b"abcZ"),
        (b"abc\x1b[1~\x1b[3~Z", b"Zbc"),
        (b"abc\x1b[1~\x1b[4~Z", b"abcZ"),
        (b"abc\x1bOHZ\x1bOFY", b"ZabcY"),
        (b"abc\x9bDZ", b"abZc"),
        (b"abc\x1b[3DZ", b"abZc"),
        (b"abc\x1b[33~Z", b"abcZ"),
        (b"abc\x1b[1;5DZ", b"abc5DZ"),  # a sequence with two numbers is not known
        (b"abc\x1b\x1b[DZ", b"abc[DZ"),
        (b"abc\x1bbZ", b"abcZ"),
        (b"abc\x1bO3~Z", b"abc~Z"),
        (b"aa  bb  \x17Z", b"aa  Z"),
        (b"aa bb\x17\x17\x17Z", b"Z"),
        (b"aa bb cc\x1b[D\x1b[D\x1b[D\x1b[D\x17", b"aa b cc"),
        (b"abcdef\x1b[D\x1b[D\x15", b"ef"),
        (b"a\x00\x02\x03\x06\x07\x0b\x0f\x1ab", b"ab"),
        (b"\xc3\xa4\x80", b"\xc3\xa4\x80"),
        (b"a" * (MAX_LINE + 5), b"a" * MAX_LINE),
    ],
)
def test_keys_edit_the_line(keys, line):
    assert line_after(keys) == line


def test_moving_the_cursor_draws_only_the_move():
    made = editor()
    press(made, b"abc")
    assert press(made, b"\x01")[0] == LEFT * 3
    assert press(made, b"\x1b[C")[0] == RIGHT
    assert press(made, b"Z")[0] == LEFT + b"aZbc" + REST + LEFT * 2
    assert press(made, b"\x05")[0] == RIGHT * 2


def test_clearing_the_screen_keeps_line_and_cursor():
    made = editor()
    press(made, b"abc\x1b[D")
    assert press(made, b"\x0c")[0] == b"\x1b[2J\x1b[1;1H(qemu) abc" + REST + LEFT


def test_earlier_lines_come_back():
    made = editor()
    press(made, b"one\rtwo\r")
    assert press(made, b"xy\x1b[A")[0].endswith(LEFT * 2 + b"two" + REST)
    assert press(made, b"\x10")[0] == LEFT * 3 + b"one" + REST
    assert press(made, b"\x1b[A")[0] == b""
    assert press(made, b"\x0e")[0] == LEFT * 3 + b"two" + REST
    assert press(made, b"\x1b[B")[0] == LEFT * 3 + REST
    assert press(made, b"\x1b[B")[0] == b""


def test_history_holds_each_line_once_and_no_empty_one():
    made = editor()
    press(made, b"one\rtwo\r\rone\r \r")
    assert made.history == [b"two", b"one", b" "]


def test_history_forgets_the_oldest():
    made = editor()
    for number in range(MAX_HISTORY + 3):
        press(made, b"%d\r" % number)
    assert made.history == [b"%d" % number for number in range(3, MAX_HISTORY + 3)]


def test_the_only_completion_goes_in_with_a_blank():
    made = editor()
    assert press(made, b"inf")[0]
    assert press(made, b"\t")[0] == LEFT * 3 + b"info " + REST


def test_several_completions_are_listed_and_what_they_share_goes_in():
    made = editor()
    press(made, b"sto")
    assert press(made, b"\t")[0] == b"\r\nstop         stopcapture  \r\n(qemu) stop" + REST


def test_a_completion_in_the_middle_leaves_the_rest():
    made = editor()
    press(made, b"info stXX\x1b[D\x1b[D")
    assert press(made, b"\t")[0].endswith(b"\r\n(qemu) info stXX" + REST + LEFT * 2)
    press(made, b"at\t")
    assert press(made, b"\r")[1] == b"info statXX"


def test_no_completion_changes_nothing():
    made = editor()
    press(made, b"zz")
    assert press(made, b"\t")[0] == b""


def test_lists_have_as_many_columns_as_the_screen_takes():
    made = LineEditor(b"> ", lambda line: ["a" * 24, "b", "c", "d"])
    made.prompt()
    rows = press(made, b"\t")[0].split(b"\r\n")
    assert rows[1] == b"a" * 24 + b"  " + b"b".ljust(26) + b"c".ljust(26)
    assert rows[2] == b"d".ljust(26)
