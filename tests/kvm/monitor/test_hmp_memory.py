"""x, xp and print: values in the columns of QEMU (hmp.md §2)."""

import pytest

from kvm.monitor.hmp.arguments import Format
from kvm.monitor.hmp.memory import MAX_DUMP, dump
from tests.kvm.monitor.human import PAGE, Person

SAMPLE = bytes.fromhex("ff80fffeffffffff7f000080ffffffffffffffff0102030405060708090a0b0c")


@pytest.mark.parametrize(
    ("count", "letter", "size", "lines"),
    [
        (9, "x", 1, ["0xff 0x80 0xff 0xfe 0xff 0xff 0xff 0xff", "0x7f"]),
        (2, "x", 2, ["0x80ff 0xfeff"]),
        (5, "x", 4, ["0xfeff80ff 0xffffffff 0x8000007f 0xffffffff", "0xffffffff"]),
        (1, "x", 8, ["0xfffffffffeff80ff"]),
        (4, "d", 1, ["255 128 255 254"]),
        (4, "d", 2, ["33023 65279 65535 65535"]),
        (4, "u", 4, ["4278157567 4294967295 2147483775 4294967295"]),
        (2, "d", 8, ["           -16809729          -2147483521"]),
        (2, "u", 8, ["18446744073692741887 18446744071562068095"]),
        (4, "o", 1, ["0377 0200 0377 0376"]),
        (2, "o", 2, ["0100377 0177377"]),
        (2, "o", 4, ["037677700377 037777777777"]),
        (2, "c", 2, [r"'\xff' '\x80' '\xff' '\xfe'"]),
    ],
)
def test_values_stand_in_the_columns_of_qemu(count, letter, size, lines):
    printed = dump(Format(count, letter, size), 0x5000, lambda address, size: SAMPLE[address - 0x5000 :][:size])
    assert [line.partition(": ")[2] for line in printed.splitlines()] == lines


def test_small_values_are_padded_to_the_width_of_the_largest():
    zeroes = lambda address, size: bytes(size)  # noqa: E731
    assert dump(Format(2, "u", 4), 0, zeroes) == "0000000000000000:          0          0\n"
    assert dump(Format(2, "o", 2), 0, zeroes) == "0000000000000000:      0      0\n"
    assert dump(Format(1, "d", 8), 0, zeroes) == "0000000000000000:                    0\n"


def test_the_format_of_the_last_dump_stays_for_everybody():
    person = Person({})
    assert person.type("xp 0") == "0000000000000000: 0x150e0700\n"
    person.type_to_qmp("xp/2xb 0")
    assert person.type("xp 0") == "0000000000000000: 0x00\n"
    assert person.type("print/d 16") == "16\n"
    assert person.type("xp/2 0") == "0000000000000000:   0   7\n"


def test_a_dump_ends_at_the_first_line_that_is_not_all_there():
    assert Person({}).type("xp/4xw 0xfff8") == "000000000000fff8: Cannot access memory\n"
    assert Person({}).type("xp/24xb 0xfff0").splitlines()[1:] == [
        "000000000000fff8: 0xc8 0xcf 0xd6 0xdd 0xe4 0xeb 0xf2 0xf9",
        "0000000000010000: Cannot access memory",
    ]


def test_x_goes_through_the_page_tables_of_the_chosen_cpu():
    person = Person({})
    person.session.cpu = 1
    assert person.type("x/1xb 0x10") == person.type("xp/1xb 0x1010").replace("1010:", "0010:")
    assert person.type("x/1xb 0x9000") == "0000000000009000: Cannot access memory\n"


def test_a_line_across_a_page_boundary_is_read_from_both_pages():
    person = Person({})
    person.session.cpu = 2
    assert person.type("x/4xw 0x0ff8") == person.type("xp/4xw 0x2ff8").replace("2ff8", "0ff8")
    assert person.type("x/4xw 0x8ff8") == "0000000000008ff8: Cannot access memory\n"


def test_each_page_is_looked_up_once():
    person = Person({})
    person.type(f"x/{2 * PAGE}xb 0")
    assert person.memory.lookups == 2


@pytest.mark.parametrize(
    ("line", "printed"),
    [
        ("print 1+2", "0x3"),
        ("print 0", "0"),
        ("p/x -1", "0xffffffffffffffff"),
        ("p/d -1", "-1"),
        ("p/u -1", "18446744073709551615"),
        ("p/o 8", "010"),
        ("p/c 65", "'A'"),
        ("p/c 10", r"'\n'"),
        ("p/c 39", r"'\''"),
        ("p/c 92", r"'\\'"),
        ("p/c 0", r"'\x00'"),
        ("p/c 256", r"'\x100'"),
        ("p/i 4", "4"),
    ],
)
def test_print_shows_a_number(line, printed):
    assert Person({}).type(line) == f"{printed}\n"


def test_what_no_one_can_read_is_refused():
    bytes_asked = 8 * 999_999_999
    assert (
        Person({}).type("xp/999999999xg 0")
        == f"Error: {bytes_asked} bytes were asked for, a dump shows at most {MAX_DUMP}\n"
    )
    assert Person({}).type("xp/i 0") == "Error: there is no disassembler here; use x, d, u, o or c\n"
    assert Person({}).type("xp/0x 0") == ""
