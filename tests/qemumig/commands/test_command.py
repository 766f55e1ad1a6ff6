"""qemumig.commands.command: arguments of a client, checked with QEMU's words (qmp.md §2)."""

import asyncio

import pytest

from qemumig.commands.command import (
    ANY,
    BOOL,
    INT,
    SIZE,
    STR,
    STR_OR_NULL,
    UINT8,
    UINT32,
    UINT64,
    Argument,
    Command,
    CommandError,
    Enum,
    ListOf,
    Struct,
)
from qemumig.errors import OptionError

CAPABILITIES = ListOf(Struct(Argument("capability", Enum(["events", "xbzrle"])), Argument("state", BOOL)))
ADDRESS = Struct(
    Argument("transport", Enum(["socket", "file"])),
    tag="transport",
    variants={
        "socket": Struct(
            Argument("type", Enum(["inet", "unix"])),
            tag="type",
            variants={
                "inet": Struct(Argument("host", STR), Argument("port", STR)),
                "unix": Struct(Argument("path", STR)),
            },
        ),
        "file": Struct(Argument("filename", STR), Argument("offset", UINT64)),
    },
)


def refusal(argument_type, value, name="x"):
    """What is said about *value* for an argument of that type."""
    with pytest.raises(CommandError) as caught:
        Command("test", print, (Argument(name, argument_type),)).check({name: value})
    assert caught.value.error_class == "GenericError"
    return caught.value.desc


def call(handler, arguments=None, declared=()):
    return asyncio.run(Command("test", handler, declared).call(arguments or {}))


@pytest.mark.parametrize(
    ("argument_type", "value", "desc"),
    [
        (STR, 5, "Invalid parameter type for 'x', expected: string"),
        (STR, None, "Invalid parameter type for 'x', expected: string"),
        (BOOL, 1, "Invalid parameter type for 'x', expected: boolean"),
        (BOOL, "on", "Invalid parameter type for 'x', expected: boolean"),
        (STR_OR_NULL, {}, "Invalid parameter type for 'x', expected: StrOrNull"),
        (UINT8, 256, "Parameter 'x' expects uint8_t"),
        (UINT8, -1, "Parameter 'x' expects uint8_t"),
        (UINT8, "1", "Parameter 'x' expects uint64"),
        (UINT8, True, "Parameter 'x' expects uint64"),
        (UINT32, 1 << 32, "Parameter 'x' expects uint32_t"),
        (UINT64, 1 << 64, "Parameter 'x' expects uint64"),
        (UINT64, 1.5, "Parameter 'x' expects uint64"),
        (UINT64, -(1 << 63) - 1, "Parameter 'x' expects uint64"),
        (INT, "1", "Invalid parameter type for 'x', expected: integer"),
        (INT, 1 << 63, "Invalid parameter type for 'x', expected: integer"),
        (Enum(["a"]), "b", "Parameter 'x' does not accept value 'b'"),
        (Enum(["a"]), 1, "Invalid parameter type for 'x', expected: string"),
        (ListOf(Enum(["a"])), ["b"], "Parameter 'null' does not accept value 'b'"),
        (ListOf(STR), {}, "Invalid parameter type for 'x', expected: array"),
        (ListOf(STR), ["a", 5], "Invalid parameter type for 'x[1]', expected: string"),
        (CAPABILITIES, [5], "Invalid parameter type for 'x[0]', expected: object"),
        (CAPABILITIES, [[]], "Invalid parameter type for 'x[0]', expected: object"),
        (CAPABILITIES, [{"capability": "events"}], "Parameter 'x[0].state' is missing"),
        (CAPABILITIES, [{"capability": "no", "state": True}], "Parameter 'capability' does not accept value 'no'"),
        (
            CAPABILITIES,
            [{"capability": "events", "state": 1}],
            "Invalid parameter type for 'x[0].state', expected: boolean",
        ),
        (
            CAPABILITIES,
            [{"capability": "events", "state": True, "y": 1}],
            "Parameter 'x[0].y' is unexpected",
        ),
        (ADDRESS, {"y": 1}, "Parameter 'x.transport' is missing"),
        (ADDRESS, {"transport": "socket", "type": "inet", "host": "h"}, "Parameter 'x.port' is missing"),
        (ADDRESS, {"transport": "socket", "type": "tin"}, "Parameter 'type' does not accept value 'tin'"),
        (ADDRESS, {"transport": "socket", "type": "unix", "path": "p", "y": 1}, "Parameter 'x.y' is unexpected"),
        (ADDRESS, {"transport": "file", "filename": "f"}, "Parameter 'x.offset' is missing"),
    ],
)
def test_a_wrong_value_is_refused_in_the_words_of_qemu(argument_type, value, desc):
    assert refusal(argument_type, value) == desc


def test_a_missing_argument_is_named():
    with pytest.raises(CommandError, match="Parameter 'filename' is missing"):
        Command("test", print, (Argument("filename", STR),)).check({})


def test_an_unknown_argument_is_named():
    with pytest.raises(CommandError, match="Parameter 'foo' is unexpected"):
        Command("test", print, (Argument("filename", STR),)).check({"filename": "a", "foo": 1})


@pytest.mark.parametrize(
    ("argument_type", "value", "checked"),
    [
        (UINT64, -1, (1 << 64) - 1),
        (SIZE, -(1 << 63), 1 << 63),
        (UINT64, (1 << 64) - 1, (1 << 64) - 1),
        (INT, -(1 << 63), -(1 << 63)),
        (UINT8, 255, 255),
        (STR_OR_NULL, None, ""),
        (STR_OR_NULL, "a", "a"),
        (ANY, [{"a": None}], [{"a": None}]),
        (
            ADDRESS,
            {"type": "unix", "path": "p", "transport": "socket"},
            {"transport": "socket", "type": "unix", "path": "p"},
        ),
    ],
)
def test_a_right_value_reaches_the_handler(argument_type, value, checked):
    assert Command("test", print, (Argument("x", argument_type),)).check({"x": value}) == {"x": checked}


def test_dashes_become_underscores_and_absent_options_are_not_passed():
    declared = (Argument("exit-on-error", BOOL, optional=True), Argument("uri", STR, optional=True))
    assert call(lambda **given: dict(given), {"exit-on-error": True}, declared) == {"exit_on_error": True}


def test_a_handler_may_be_a_coroutine_function():
    async def handler():
        await asyncio.sleep(0)
        return [1]

    assert call(handler) == [1]


def test_a_handler_that_returns_nothing_answers_with_an_empty_object():
    assert call(lambda: None) == {}


def test_an_empty_list_is_an_answer():
    assert call(lambda: []) == []


def test_a_migration_error_becomes_a_generic_error_with_its_text():
    def handler():
        raise OptionError("no such thing", name="x")

    with pytest.raises(CommandError) as caught:
        call(handler)
    assert (caught.value.desc, caught.value.error_class) == ("no such thing", "GenericError")


def test_a_handler_is_not_called_with_bad_arguments():
    calls = []
    with pytest.raises(CommandError):
        call(lambda **given: calls.append(given), {"x": "no number"}, (Argument("x", UINT8),))
    assert calls == []
