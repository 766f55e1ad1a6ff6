"""kvm.from_text: texts of the command line as the values that declared types want."""

import pytest

from kvm.from_text import block_pairs, json_object, nest, typed
from kvm.keyval import UsageError
from qemumig.commands.command import BOOL, INT, SIZE, STR, UINT32, Argument, Enum, ListOf, Struct

THING = Struct(
    Argument("kind", Enum(("file", "list"))),
    tag="kind",
    variants={
        "file": Struct(Argument("name", STR), Argument("offset", SIZE), Argument("shared", BOOL)),
        "list": Struct(Argument("numbers", ListOf(INT)), Argument("count", UINT32)),
    },
)


def test_dotted_keys_become_objects_and_lists():
    pairs = [("a.b.c", "1"), ("a.d", "2"), ("l.0", "x"), ("l.1.y", "z"), ("p", "")]
    assert nest(pairs) == {"a": {"b": {"c": "1"}, "d": "2"}, "l": ["x", {"y": "z"}], "p": ""}


@pytest.mark.parametrize("keys", [("a", "a.b"), ("a.b", "a"), ("a.b.c", "a.b")])
def test_a_key_is_a_value_or_an_object(keys):
    with pytest.raises(UsageError, match="used inconsistently"):
        nest([(key, "x") for key in keys])


def test_a_key_without_a_value_is_a_mistake():
    with pytest.raises(UsageError, match="Expected '=' after parameter 'a'"):
        nest([("a", None)])


def test_numbers_that_leave_a_gap_are_names():
    assert nest([("l.0", "a"), ("l.2", "b")]) == {"l": {"0": "a", "2": "b"}}


def test_texts_turn_into_what_is_declared():
    text = {"kind": "file", "name": "7", "offset": "1k", "shared": "on"}
    assert typed(text, THING) == {"kind": "file", "name": "7", "offset": 1024, "shared": True}
    assert typed({"kind": "list", "numbers": ["1", "-2"], "count": "0x10"}, THING)["numbers"] == [1, -2]


def test_what_is_no_text_stays_for_the_check():
    assert typed({"kind": "file", "offset": 5, "shared": "off", "more": "x"}, THING) == {
        "kind": "file",
        "offset": 5,
        "shared": False,
        "more": "x",
    }
    assert typed(None, THING) is None


@pytest.mark.parametrize(
    ("values", "desc"),
    [
        ({"offset": "x"}, "Parameter 'offset' expects a size value"),
        ({"shared": "maybe"}, "Parameter 'shared' expects 'on' or 'off'"),
        ({"kind": "list", "count": "x"}, "Parameter 'count' expects integer"),
        ({"kind": "list", "numbers": ["x"]}, r"Parameter 'numbers\[0\]' expects integer"),
    ],
)
def test_a_text_that_is_no_such_thing_is_named(values, desc):
    with pytest.raises(UsageError, match=desc):
        typed({"kind": "file", **values}, THING)


@pytest.mark.parametrize(
    ("text", "desc"), [("{", "premature EOI"), ("[]", "JSON object expected"), ("5", "object expected")]
)
def test_only_an_object_is_one(text, desc):
    with pytest.raises(UsageError, match=desc):
        json_object(text)


def test_a_device_in_json_is_the_same_as_one_in_dotted_keys():
    assert block_pairs('{"driver": "d", "cache": {"direct": true}}') == block_pairs("d,cache.direct=on", "driver")
