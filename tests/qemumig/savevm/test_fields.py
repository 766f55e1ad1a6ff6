"""Every kind of field: its exact bytes, its description, and what it refuses (vmstate.md §2)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from qemumig.errors import StreamError
from qemumig.savevm import fields as kinds
from qemumig.savevm.fields import Field
from qemumig.savevm.kinds import Count, Description
from qemumig.savevm.place import Loading, Saving
from qemumig.savevm.reader import BytesReader
from qemumig.savevm.vmstate import Subsection, VMState


def _state(*members: Field, **values: Any) -> VMState:
    """A state of those members; *values* are the reset values of its record."""
    return VMState("box", 1, members, record=lambda: SimpleNamespace(**values))


def _save(vmstate: VMState, **values: Any) -> tuple[str, list[Description]]:
    data, description = vmstate.save(SimpleNamespace(**values))
    return data.hex(" "), description["fields"]


def _load(vmstate: VMState, data: str) -> Any:
    reader = BytesReader(bytes.fromhex(data))
    record = vmstate.load(reader, 1)
    assert reader.remaining == 0
    return record


SCALARS = [
    (kinds.boolean, "bool", True, "01"),
    (kinds.int8, "int8", -2, "fe"),
    (kinds.uint8, "uint8", 0xFE, "fe"),
    (kinds.int16, "int16", -2, "ff fe"),
    (kinds.uint16, "uint16", 0xFFFE, "ff fe"),
    (kinds.int32, "int32", -2, "ff ff ff fe"),
    (kinds.uint32, "uint32", 0x01020304, "01 02 03 04"),
    (kinds.int64, "int64", -2, "ff ff ff ff ff ff ff fe"),
    (kinds.uint64, "uint64", 0x0102030405060708, "01 02 03 04 05 06 07 08"),
    (kinds.uint8_equal, "uint8 equal", 7, "07"),
    (kinds.uint16_equal, "uint16 equal", 7, "00 07"),
    (kinds.uint32_equal, "uint32 equal", 7, "00 00 00 07"),
    (kinds.uint64_equal, "int64 equal", 7, "00 00 00 00 00 00 00 07"),
    (kinds.int32_equal, "int32 equal", -7, "ff ff ff f9"),
    (kinds.int32_le, "int32 le", 7, "00 00 00 07"),
    (kinds.cpudouble, "CPU_Double_U", 0x3FF0000000000000, "3f f0 00 00 00 00 00 00"),
    (kinds.timer, "timer", 5, "00 00 00 00 00 00 00 05"),
    (kinds.timer, "timer", None, "ff ff ff ff ff ff ff ff"),
    (kinds.capability, "capability", "xbzrle", "06 78 62 7a 72 6c 65"),
]


@pytest.mark.parametrize(("make", "name", "value", "data"), SCALARS)
def test_scalars_have_their_bytes_and_their_name(make: Any, name: str, value: Any, data: str) -> None:
    vmstate = _state(make("dev.x"), x=value)
    size = len(bytes.fromhex(data))
    assert _save(vmstate, x=value) == (data, [{"name": "dev.x", "type": name, "size": size}])
    assert _load(vmstate, data).x == value


def test_any_byte_but_zero_is_true() -> None:
    vmstate = _state(kinds.boolean("x"), x=None)
    assert _load(vmstate, "80").x is True
    assert _load(vmstate, "00").x is False


@pytest.mark.parametrize("make", [kinds.uint8_equal, kinds.uint64_equal, kinds.int32_equal])
def test_a_value_that_must_be_equal_is_compared_with_the_local_one(make: Any) -> None:
    vmstate = _state(make("x"), x=3)
    data = vmstate.save(SimpleNamespace(x=4))[0]
    with pytest.raises(StreamError, match=r"field x at offset 0x0: 0x4 found, expected the local value 3"):
        vmstate.load(BytesReader(data), 1)


@pytest.mark.parametrize(
    ("data", "fine"), [("00000000", True), ("00000003", True), ("00000004", False), ("ffffffff", False)]
)
def test_a_bounded_value_lies_between_zero_and_the_local_one(data: str, fine: bool) -> None:
    vmstate = _state(kinds.int32_le("x"), x=3)
    if fine:
        assert _load(vmstate, data).x == int(data, 16)
    else:
        with pytest.raises(StreamError, match="expected 0 to the local value 3"):
            _load(vmstate, data)


@pytest.mark.parametrize(
    ("make", "value"),
    [(kinds.uint8, 256), (kinds.uint8, -1), (kinds.int32, 1 << 31), (kinds.uint16, "7"), (kinds.uint16, 1.0)],
)
def test_a_record_that_holds_too_much_is_our_own_mistake(make: Any, value: Any) -> None:
    with pytest.raises(ValueError, match=r"section 'box' instance 0, field dev\.x: .* does not fit"):
        _state(make("dev.x")).save(SimpleNamespace(x=value))


@pytest.mark.parametrize(
    ("make", "value"), [(kinds.int8, 200), (kinds.uint8, 256), (kinds.uint32, -1), (kinds.uint64, "7")]
)
def test_an_array_names_the_element_that_does_not_fit(make: Any, value: Any) -> None:
    with pytest.raises(ValueError, match=r"field x\[2\]: .* does not fit"):
        _state(make("x", count=3)).save(SimpleNamespace(x=[0, 1, value]))


# -- bytes


def test_a_buffer_is_raw_bytes() -> None:
    vmstate = _state(kinds.buffer("x", 3), x=b"")
    assert _save(vmstate, x=b"abc") == ("61 62 63", [{"name": "x", "type": "buffer", "size": 3}])
    assert _load(vmstate, "616263").x == b"abc"


@pytest.mark.parametrize("value", [b"ab", b"abcd"])
def test_a_buffer_of_another_length_is_not_saved(value: bytes) -> None:
    with pytest.raises(ValueError, match="bytes, expected 3"):
        _state(kinds.buffer("x", 3)).save(SimpleNamespace(x=value))


def test_a_part_of_a_buffer_leaves_the_rest_alone() -> None:
    vmstate = _state(kinds.buffer("x", 2, start=1, partial=True), x=b"....")
    assert _save(vmstate, x=b"abcd")[0] == "62 63"
    assert _load(vmstate, "6263").x == b".bc."


def test_a_variable_buffer_is_as_long_as_the_field_before_it_says() -> None:
    vmstate = _state(kinds.uint8("n"), kinds.buffer("x", Count("n", 16, times=4)), n=0, x=b"")
    assert _save(vmstate, n=1, x=b"abcd")[0] == "01 61 62 63 64"
    assert _load(vmstate, "0161626364").x == b"abcd"
    with pytest.raises(StreamError, match=r"field x at offset 0x1: n is 5, expected at most 4"):
        _load(vmstate, "05" + "00" * 20)


def test_unused_bytes_are_zero_on_the_way_out_and_anything_on_the_way_in() -> None:
    vmstate = _state(kinds.unused(2), kinds.uint8("x"), x=0)
    assert _save(vmstate, x=9)[0] == "00 00 09"
    assert _load(vmstate, "beef09").x == 9


def test_unused_bytes_may_be_counted() -> None:
    vmstate = _state(kinds.uint8("n"), kinds.unused(2, count=Count("n", 4)), n=0)
    data, described = _save(vmstate, n=2)
    assert data == "02 00 00 00 00"
    assert described[1] == {"name": "unused", "array_len": 2, "type": "unused_buffer", "size": 2}
    assert _load(vmstate, "02deadbeef").n == 2


def test_a_bitmap_is_words_with_the_lowest_bit_first() -> None:
    vmstate = _state(kinds.int32("n"), kinds.bitmap("x", Count("n", 128)), n=0, x=0)
    data, described = _save(vmstate, n=65, x=1 << 64 | 0b101)
    assert data == "00 00 00 41 00 00 00 00 00 00 00 05 00 00 00 00 00 00 00 01"
    assert described[1]["size"] == 16
    assert _load(vmstate, data).x == 1 << 64 | 0b101


def test_bits_beyond_a_bitmap_are_ignored_on_the_way_in_and_refused_on_the_way_out() -> None:
    vmstate = _state(kinds.bitmap("x", Count("n", 64)), n=2, x=0)
    assert _load(vmstate, "00000000000000ff").x == 0b11
    with pytest.raises(ValueError, match="holds bit 2, expected 2 bits"):
        vmstate.save(SimpleNamespace(n=2, x=0b100))


@pytest.mark.parametrize("count", ["ffffffff", "00000081", "80000000"])
def test_a_hostile_bit_count_is_refused(count: str) -> None:
    vmstate = _state(kinds.int32("n"), kinds.bitmap("x", Count("n", 128)), n=0, x=0)
    with pytest.raises(StreamError, match="expected at most 128 and not negative"):
        _load(vmstate, count + "00" * 64)


# -- arrays


def test_a_fixed_array_is_back_to_back_and_described_once() -> None:
    vmstate = _state(kinds.uint16("x", count=3), x=[0, 0, 0])
    described = [{"name": "x", "array_len": 3, "type": "uint16", "size": 2}]
    assert _save(vmstate, x=[1, 2, 3]) == ("00 01 00 02 00 03", described)
    assert _load(vmstate, "000100020003").x == [1, 2, 3]


def test_an_array_of_one_is_described_like_a_single_field_and_one_of_none_not_at_all() -> None:
    assert _save(_state(kinds.uint8("x", count=1)), x=[7])[1] == [{"name": "x", "type": "uint8", "size": 1}]
    vmstate = _state(kinds.uint8("n"), kinds.uint8("x", count=Count("n", 4)), n=0, x=[])
    assert _save(vmstate, n=0, x=[]) == ("00", [{"name": "n", "type": "uint8", "size": 1}])
    assert _load(vmstate, "00").x == []


def test_a_part_of_an_array_leaves_the_rest_alone() -> None:
    vmstate = _state(kinds.uint8("x", count=2, first=1), x=[9, 9, 9, 9])
    assert _save(vmstate, x=[1, 2, 3, 4])[0] == "02 03"
    assert _load(vmstate, "0203").x == [9, 2, 3, 9]


@pytest.mark.parametrize(
    ("make", "data"), [(kinds.int32, "00000002"), (kinds.uint32, "00000002"), (kinds.uint16, "0002"), (kinds.uint8, "02")]
)
def test_the_count_of_an_array_comes_from_a_field_before_it(make: Any, data: str) -> None:
    vmstate = _state(make("n"), kinds.uint8("x", count=Count("n", 4)), n=0, x=[])
    assert _load(vmstate, data + "0506").x == [5, 6]


@pytest.mark.parametrize("data", ["00000005", "ffffffff", "80000000"])
def test_a_hostile_count_is_refused_before_anything_is_read(data: str) -> None:
    vmstate = _state(kinds.int32("n"), kinds.uint64("x", count=Count("n", 4)), n=0, x=[])
    reader = BytesReader(bytes.fromhex(data))
    with pytest.raises(StreamError, match=r"field x at offset 0x4: n is -?\d+, expected at most 4 and not negative"):
        vmstate.load(reader, 1)


@pytest.mark.parametrize("values", [[1], [1, 2, 3]])
def test_an_array_that_contradicts_its_count_is_not_saved(values: list[int]) -> None:
    vmstate = _state(kinds.uint8("n"), kinds.uint8("x", count=Count("n", 4)))
    with pytest.raises(ValueError, match="elements, expected 2"):
        vmstate.save(SimpleNamespace(n=2, x=values))


def test_an_array_of_elements_that_are_not_alike_is_listed_one_by_one() -> None:
    vmstate = _state(kinds.uint8("x", count=3, exists=lambda record, version: True))
    described = [
        {"name": "x", "index": 0, "type": "uint8", "size": 1},
        {"name": "x", "index": 1, "type": "uint8", "size": 1},
        {"name": "x", "type": "uint8", "size": 1},  # the last one has no index since 10.0
    ]
    assert _save(vmstate, x=[1, 2, 3]) == ("01 02 03", described)


def test_null_pointers_are_marked_and_described_apart() -> None:
    vmstate = _state(kinds.uint16("x", count=5, pointer=True), x=[0, None, None, 0, 0])
    data, described = _save(vmstate, x=[1, None, None, 2, 3])
    assert data == "00 01 30 30 00 02 00 03"
    assert described == [
        {"name": "x", "type": "uint16", "size": 2},
        {"name": "x", "array_len": 2, "type": "nullptr", "size": 1},
        {"name": "x", "array_len": 2, "type": "uint16", "size": 2},
    ]
    assert _load(vmstate, data).x == [1, None, None, 2, 3]


def test_a_peer_must_have_null_pointers_where_we_have_them() -> None:
    vmstate = _state(kinds.uint16("x", count=2, pointer=True), x=[0, None])
    with pytest.raises(StreamError, match=r"field x\[1\] at offset 0x2: 0x31 found, expected 0x30"):
        _load(vmstate, "000131")


def test_a_single_null_pointer_cannot_be_saved() -> None:
    with pytest.raises(ValueError, match="the pointer is null"):
        _state(kinds.uint16("x", pointer=True)).save(SimpleNamespace(x=None))


def test_names_that_occur_twice_are_numbered_even_where_one_is_absent() -> None:
    vmstate = _state(kinds.uint8("x"), kinds.uint8("y"), kinds.uint8("x", version=2), kinds.uint8("x"))
    assert [one["name"] for one in _save(vmstate, x=1, y=2)[1]] == ["x[0]", "y", "x[2]"]


# -- nested states


@dataclass
class Pair:
    a: int = 0
    b: int = 0


PAIR = VMState("pair", 0, (kinds.uint8("a"), kinds.uint8("b")), record=Pair)
PAIR_FIELDS = [{"name": "a", "type": "uint8", "size": 1}, {"name": "b", "type": "uint8", "size": 1}]
PAIR_KEYS = {"vmsd_name": "pair", "version": 0, "fields": PAIR_FIELDS}


def test_a_struct_is_its_fields() -> None:
    vmstate = _state(kinds.struct("x", PAIR), x=None)
    assert _save(vmstate, x=Pair(1, 2)) == ("01 02", [{"name": "x", "type": "struct", "struct": PAIR_KEYS, "size": 2}])
    assert _load(vmstate, "0102").x == Pair(1, 2)


def test_alike_structs_are_described_once() -> None:
    described = _save(_state(kinds.struct("x", PAIR, count=2)), x=[Pair(), Pair()])[1]
    assert [(one["array_len"], one["size"]) for one in described] == [(2, 2)]


def _with_subsection(inner: VMState) -> VMState:
    return VMState("outer", 1, (), subsections=(Subsection("inner", inner),), record=SimpleNamespace)


def _with_predicate(inner: VMState) -> VMState:
    always = kinds.struct("inner", inner, exists=lambda record, version: True)
    return VMState("outer", 1, (always,), record=SimpleNamespace)


@pytest.mark.parametrize("make", [_with_subsection, _with_predicate])
def test_structs_that_may_differ_are_listed_one_by_one_however_deep_the_reason_lies(make: Any) -> None:
    wrapped = VMState("wrapped", 1, (kinds.struct("outer", make(PAIR)),), record=SimpleNamespace)
    element = SimpleNamespace(outer=SimpleNamespace(inner=Pair()))
    described = _save(_state(kinds.struct("x", wrapped, count=3)), x=[element] * 3)[1]
    assert [one.get("index", "none") for one in described] == [0, 1, "none"]


def test_a_struct_is_read_in_its_own_version_whatever_the_outer_one() -> None:
    inner = VMState("inner", 3, (kinds.uint8("a", version=3),), minimum_version_id=1, record=Pair)
    vmstate = VMState("box", 9, (kinds.struct("x", inner),), minimum_version_id=1, record=lambda: SimpleNamespace(x=None))
    assert vmstate.load(BytesReader(b"\x05"), 1).x.a == 5


def test_a_vstruct_has_the_version_it_was_declared_with() -> None:
    inner = VMState("inner", 3, (kinds.uint8("a"), kinds.uint8("b", version=2)), minimum_version_id=1, record=Pair)
    vmstate = _state(kinds.vstruct("x", inner, 1), x=None)
    data, described = _save(vmstate, x=Pair(1, 2))
    assert data == "01"
    assert list(described[0]) == ["name", "type", "vmsd_name", "version", "fields", "size"]
    assert described[0]["version"] == 1
    assert _load(vmstate, "01").x == Pair(1, 0)
    with pytest.raises(ValueError, match="'inner' has no version 4"):
        kinds.vstruct("x", inner, 4)


@dataclass
class Swapper:
    """A helper that sees the parent's bytes in reverse order."""

    parent: Any = None
    data: bytes = b""


def _take(helper: Swapper) -> None:
    helper.data = helper.parent.x[::-1]


def _give(helper: Swapper, version_id: int) -> None:
    helper.parent.x = helper.data[::-1]


def test_a_temporary_moves_its_values_from_and_to_the_parent() -> None:
    swapper = VMState("swap", 0, (kinds.buffer("data", 2),), pre_save=_take, post_load=_give, record=Swapper)
    vmstate = _state(kinds.tmp("t", swapper), x=b"")
    data, described = _save(vmstate, x=b"ab")
    assert data == "62 61"
    assert list(described[0]) == ["name", "type", "vmsd_name", "version", "fields", "size"]
    assert _load(vmstate, "6261").x == b"ab"


@pytest.mark.parametrize("make", [kinds.qtailq, kinds.qlist])
def test_a_list_is_marked_element_by_element(make: Any) -> None:
    vmstate = _state(make("x", PAIR, maximum=2), x=[])
    data, described = _save(vmstate, x=[Pair(1, 2), Pair(3, 4)])
    assert data == "01 01 02 01 03 04 00"
    assert _load(vmstate, "01 01 02 80 03 04 00".replace(" ", "")).x == [Pair(1, 2), Pair(3, 4)]
    assert _save(vmstate, x=[])[0] == "00"
    text = json.dumps(described[0])
    assert text.count('"vmsd_name": "pair"') == 2  # the keys repeat, in the same object
    assert text.endswith('"size": 7}')


def test_a_list_that_does_not_end_is_refused() -> None:
    vmstate = _state(kinds.qtailq("x", PAIR, maximum=2), x=[])
    with pytest.raises(StreamError, match=r"field x at offset 0x7: the list goes on, expected at most 2 elements"):
        vmstate.load(BytesReader(bytes.fromhex("010102010304010506")), 1)


def test_a_tree_has_its_size_and_number_keys() -> None:
    vmstate = _state(kinds.gtree("x", PAIR, maximum=4), x=[])
    data, described = _save(vmstate, x=[(7, Pair(1, 2))])
    assert data == "00 00 00 01 01 00 00 00 00 00 00 00 07 01 02 00"
    assert described[0]["size"] == 16
    assert _load(vmstate, data).x == [(7, Pair(1, 2))]


def test_the_keys_of_a_tree_may_be_states() -> None:
    vmstate = _state(kinds.gtree("x", PAIR, key=PAIR, maximum=4), x=[])
    data, _ = _save(vmstate, x=[(Pair(5, 6), Pair(1, 2))])
    assert data == "00 00 00 01 01 05 06 01 02 00"
    assert _load(vmstate, data).x == [(Pair(5, 6), Pair(1, 2))]


@pytest.mark.parametrize(
    ("data", "finding"),
    [
        ("00000005", "5 nodes announced, expected at most 4"),
        ("00000001 00", "ends after 0 nodes, 1 were announced"),
        ("00000000 01", "goes on, expected the 0 nodes"),
    ],
)
def test_a_tree_that_lies_about_its_size_is_refused(data: str, finding: str) -> None:
    with pytest.raises(StreamError, match=finding):
        _load(_state(kinds.gtree("x", PAIR, maximum=4), x=[]), data.replace(" ", ""))


@pytest.mark.parametrize("make", [kinds.qtailq, kinds.qlist, kinds.gtree])
def test_elements_that_cannot_be_read_in_the_fields_version_are_a_mistake(make: Any) -> None:
    newer = VMState("pair", 3, PAIR.fields, minimum_version_id=2, record=Pair)
    assert make("x", newer, maximum=1, version=2).version == 2
    with pytest.raises(ValueError, match="cannot be read as of version 1"):
        make("x", newer, maximum=1, version=1)


def test_a_check_has_no_bytes_and_no_description() -> None:
    vmstate = _state(kinds.uint8("x"), kinds.validate("x is even", lambda record: record.x % 2 == 0), x=0)
    assert _save(vmstate, x=2) == ("02", [{"name": "x", "type": "uint8", "size": 1}])
    assert _load(vmstate, "04").x == 4
    with pytest.raises(StreamError, match="field x is even at offset 0x1"):
        _load(vmstate, "03")
    with pytest.raises(ValueError, match="field x is even"):
        vmstate.save(SimpleNamespace(x=3))


@dataclass(frozen=True)
class Reversed:
    """Bytes that only the device knows how to write."""

    type: str = "pci config"
    compressible: bool = True

    def save(self, saving: Saving, value: Any, record: Any) -> Description:
        saving.out += value[::-1]
        return {}

    def load(self, loading: Loading, local: Any, record: Any) -> bytes:
        return loading.reader.read(2)[::-1]


def test_a_custom_kind_writes_what_it_likes_under_its_own_name() -> None:
    vmstate = _state(kinds.custom("x", Reversed()), x=b"")
    assert _save(vmstate, x=b"ab") == ("62 61", [{"name": "x", "type": "pci config", "size": 2}])
    assert _load(vmstate, "6261").x == b"ab"


def test_an_attribute_the_record_does_not_have_is_a_mistake_of_the_description() -> None:
    with pytest.raises(AttributeError, match="nowhere"):
        _state(kinds.uint8("nowhere")).load(BytesReader(b"\x01"), 1)


def test_a_capability_that_is_no_text_is_refused() -> None:
    with pytest.raises(StreamError, match="expected UTF-8 text"):
        _load(_state(kinds.capability("x"), x=""), "01ff")


@dataclass
class Holder:
    items: list[Pair] = field(default_factory=lambda: [Pair(7, 7), Pair(8, 8)])


def test_values_of_the_local_machine_inside_arrays_of_structs_are_compared() -> None:
    numbered = VMState("numbered", 1, (kinds.uint8_equal("a"), kinds.uint8("b")), record=Pair)
    vmstate = VMState("box", 1, (kinds.struct("items", numbered, count=2),), record=Holder)
    assert vmstate.load(BytesReader(bytes([7, 1, 8, 2])), 1).items == [Pair(7, 1), Pair(8, 2)]
    with pytest.raises(StreamError, match=r"field items\[1\]\.a at offset 0x2"):
        vmstate.load(BytesReader(bytes([7, 1, 9, 2])), 1)


def _names(described: Sequence[Description]) -> list[str]:
    return [one["name"] for one in described]


def test_a_field_takes_part_from_its_version_on() -> None:
    members = (kinds.uint8("a"), kinds.uint8("b", version=2), kinds.uint8("c", exists=lambda record, version: version < 2))
    vmstate = VMState("box", 2, members, minimum_version_id=1, record=lambda: SimpleNamespace(a=0, b=0, c=0))
    assert _names(_save(vmstate, a=1, b=2, c=3)[1]) == ["a", "b"]
    old = vmstate.load(BytesReader(b"\x01\x03"), 1)
    assert (old.a, old.b, old.c) == (1, 0, 3)


def test_a_predicate_sees_what_was_loaded_before_it() -> None:
    vmstate = _state(kinds.uint8("a"), kinds.uint8("b", exists=lambda record, version: record.a == 1), a=0, b=0)
    assert _load(vmstate, "0109").b == 9
    assert _load(vmstate, "02").b == 0
