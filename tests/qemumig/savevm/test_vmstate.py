"""States: versions, subsections, hooks, and the two promises: what is saved loads again, and is fully described."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qemumig.errors import MachineError, StreamError
from qemumig.savevm import fields as kinds
from qemumig.savevm import vmdesc
from qemumig.savevm.fields import Field
from qemumig.savevm.kinds import Count
from qemumig.savevm.reader import BytesReader
from qemumig.savevm.vmstate import Subsection, VMState, plain_subsection, when_nonzero


@dataclass
class Part:
    b: int = 0


@dataclass
class Box:
    a: int = 0
    part: Part | None = None
    number: int | None = None
    trail: list[str] = field(default_factory=list)


PART = VMState("box/part", 2, (kinds.uint8("b"),), minimum_version_id=1, record=Part)
BOX = VMState(
    "box",
    3,
    (kinds.uint8("a"),),
    minimum_version_id=2,
    subsections=(Subsection("part", PART), plain_subsection("number", "box/number", kinds.uint16, "dev.number")),
    record=Box,
)
PART_HEAD = b"\x05\x08box/part\x00\x00\x00\x02"
NUMBER_HEAD = b"\x05\x0abox/number\x00\x00\x00\x01"


def _load(vmstate: VMState, data: bytes, version_id: int | None = None) -> tuple[Any, int]:
    """The record, and how many bytes were left alone."""
    reader = BytesReader(data)
    record = vmstate.load(reader, vmstate.version_id if version_id is None else version_id)
    return record, reader.remaining


# -- subsections


def test_a_state_without_its_subsections_is_only_its_fields() -> None:
    data, description = BOX.save(Box(7))
    assert data == b"\x07"
    fields = [{"name": "a", "type": "uint8", "size": 1}]
    assert description == {"vmsd_name": "box", "version": 3, "fields": fields}
    assert _load(BOX, data) == (Box(7), 0)


def test_subsections_follow_in_the_order_of_the_description() -> None:
    data, description = BOX.save(Box(7, Part(8), 9))
    assert data == b"\x07" + PART_HEAD + b"\x08" + NUMBER_HEAD + b"\x00\x09"
    assert [one["vmsd_name"] for one in description["subsections"]] == ["box/part", "box/number"]
    assert description["subsections"][1]["fields"] == [{"name": "dev.number", "type": "uint16", "size": 2}]
    assert _load(BOX, data) == (Box(7, Part(8), 9), 0)


def test_subsections_are_taken_in_any_order_and_again_when_repeated() -> None:
    number, part = NUMBER_HEAD + b"\x00\x01", PART_HEAD + b"\x02"
    assert _load(BOX, b"\x07" + number + part)[0] == Box(7, Part(2), 1)
    assert _load(BOX, b"\x07" + number + NUMBER_HEAD + b"\x00\x03")[0] == Box(7, None, 3)


@pytest.mark.parametrize(
    "tail",
    [
        b"\x05",  # the end of the stream
        b"\x05\x03box",  # no longer than our own name
        b"\x05\x08xyz/part\x00\x00\x00\x02\x01",  # somebody else's
        b"\x05\x0abox/pa",  # cut short
        b"\x7e\x00\x00\x00\x09",  # a footer
        b"\x05\xff" + b"box/" + bytes(40),  # longer than what is left
    ],
)
def test_what_is_no_subsection_of_ours_is_left_for_the_others(tail: bytes) -> None:
    assert _load(BOX, b"\x07" + tail) == (Box(7), len(tail))


def test_an_unknown_subsection_with_our_prefix_is_refused() -> None:
    with pytest.raises(StreamError, match=r"section 'box' instance 0 at offset 0x1: unknown subsection 'box/lid' of 'box'"):
        _load(BOX, b"\x07\x05\x07box/lid\x00\x00\x00\x01")
    with pytest.raises(StreamError, match="unknown subsection 'boxes'"):
        _load(BOX, b"\x07\x05\x05boxes\x00\x00\x00\x01")


@pytest.mark.parametrize(("version", "fine"), [(0, False), (1, True), (2, True), (3, False), (0xFFFFFFFF, False)])
def test_the_version_of_a_subsection_must_fit(version: int, fine: bool) -> None:
    data = b"\x07\x05\x08box/part" + version.to_bytes(4, "big") + b"\x09"
    if fine:
        assert _load(BOX, data)[0].part == Part(9)
    else:
        with pytest.raises(StreamError, match=rf"field <box/part> .*'box/part' has version {version}, expected 1 to 2"):
            _load(BOX, data)


def test_a_subsection_is_sent_only_when_it_is_needed() -> None:
    needy = plain_subsection("number", "box/number", kinds.uint16, "number", needed=when_nonzero)
    vmstate = VMState("box", 1, (kinds.uint8("a"),), subsections=(needy,), record=Box)
    assert vmstate.save(Box(1, number=0))[0] == b"\x01"
    assert vmstate.save(Box(1, number=None))[0] == b"\x01"
    assert vmstate.save(Box(1, number=2))[0] == b"\x01" + NUMBER_HEAD + b"\x00\x02"


def test_a_subsection_that_does_not_come_is_none_whatever_the_reset_value() -> None:
    vmstate = VMState("box", 3, BOX.fields, subsections=BOX.subsections, record=lambda: Box(0, Part(4), 5))
    assert _load(vmstate, b"\x07")[0] == Box(7, None, None)
    assert _load(vmstate, b"\x07" + NUMBER_HEAD + b"\x00\x09")[0] == Box(7, None, 9)


@dataclass
class Inner:
    b: int = 0
    part: Part | None = None


def test_a_nested_state_does_not_swallow_the_subsections_of_the_outer_one() -> None:
    inner = VMState("inner", 1, (kinds.uint8("b"),), subsections=(Subsection("part", PART),), record=Inner)
    outer = VMState(
        "box", 1, (kinds.struct("a", inner),), subsections=(Subsection("part", PART),), record=lambda: Box(None)
    )
    record, left = _load(outer, b"\x01" + PART_HEAD + b"\x02")
    assert (record.a, record.part, left) == (Inner(1), Part(2), 0)


# -- versions


@pytest.mark.parametrize("version", [0, 1, 4, 0xFFFFFFFF])
def test_a_version_outside_of_the_range_is_refused(version: int) -> None:
    with pytest.raises(StreamError, match=rf"'box' has version {version}, expected 2 to 3"):
        _load(BOX, b"\x07", version)


def test_an_unmigratable_state_goes_neither_way() -> None:
    stuck = VMState("stuck", 1, (), unmigratable=True)
    with pytest.raises(MachineError, match="State blocked by non-migratable device 'usb0/stuck'"):
        stuck.save(None, section="usb0/stuck")
    with pytest.raises(StreamError, match="cannot be migrated"):
        stuck.load(BytesReader(b""), 1)


# -- hooks


def _tracing(name: str, **more: Any) -> VMState:
    def note(step: str) -> Callable[..., None]:
        return lambda record, *version: calls.append(f"{name} {step}{version or ''}")

    hooks = {step: note(step) for step in ("pre_save", "post_save", "pre_load", "post_load")}
    return VMState(name, 1, (kinds.uint8("b", version=0),), record=Part, **hooks, **more)


calls: list[str] = []


@dataclass
class Nest:
    b: int = 0
    inner: Part = field(default_factory=Part)
    extra: Part | None = None


def test_hooks_run_around_the_fields_and_the_inner_ones_first() -> None:
    calls.clear()
    extra = _tracing("nest/extra")
    nest = VMState(
        "nest",
        1,
        (kinds.struct("inner", _tracing("inner")),),
        subsections=(Subsection("extra", extra),),
        pre_save=lambda record: calls.append("nest pre_save"),
        post_save=lambda record: calls.append("nest post_save"),
        pre_load=lambda record: calls.append("nest pre_load"),
        post_load=lambda record, version: calls.append(f"nest post_load({version},)"),
        record=Nest,
    )
    data, _ = nest.save(Nest(extra=Part(1)))
    around = [f"{name} {step}" for name in ("inner", "nest/extra") for step in ("pre_save", "post_save")]
    assert calls == ["nest pre_save", *around, "nest post_save"]
    calls.clear()
    nest.load(BytesReader(data), 1)
    around = [f"{name} {step}" for name in ("inner", "nest/extra") for step in ("pre_load", "post_load(1,)")]
    assert calls == ["nest pre_load", *around, "nest post_load(1,)"]


def test_post_save_runs_even_when_a_field_could_not_be_saved() -> None:
    calls.clear()
    with pytest.raises(ValueError, match="does not fit"):
        _tracing("inner").save(Part(999))
    assert calls == ["inner pre_save", "inner post_save"]


@pytest.mark.parametrize("hook", ["pre_load", "post_load"])
def test_a_hook_that_objects_refuses_the_section(hook: str) -> None:
    def object_to(record: Part, *version: int) -> None:
        raise ValueError(f"b is {record.b}, expected 3")

    vmstate = VMState("box", 1, (kinds.uint8("b"),), record=Part, **{hook: object_to})
    offset, value = (0, 0) if hook == "pre_load" else (1, 5)
    with pytest.raises(StreamError, match=rf"section 'box' instance 4 at offset {offset:#x}: b is {value}, expected 3"):
        vmstate.load(BytesReader(b"\x05"), 1, instance_id=4)


def test_a_load_fills_the_record_it_is_given_and_no_other() -> None:
    mine = Box(1, trail=["mine"])
    assert BOX.load(BytesReader(b"\x09"), 3, record=mine) is mine
    assert (mine.a, mine.trail) == (9, ["mine"])


def test_is_needed_asks_the_predicate() -> None:
    vmstate = VMState("box", 1, (), needed=lambda record: record.a > 0)
    assert vmstate.is_needed(Box(1))
    assert not vmstate.is_needed(Box(0))
    assert BOX.is_needed(Box())


# -- the promises, on states that nobody wrote down


@dataclass(frozen=True)
class Drawn:
    """A state and a record for it; records are lists here, attributes their indices."""

    vmstate: VMState
    record: list[Any]


INTEGERS = {
    kinds.int8: (-(1 << 7), (1 << 7) - 1),
    kinds.uint8: (0, (1 << 8) - 1),
    kinds.int16: (-(1 << 15), (1 << 15) - 1),
    kinds.uint16: (0, (1 << 16) - 1),
    kinds.int32: (-(1 << 31), (1 << 31) - 1),
    kinds.uint32: (0, (1 << 32) - 1),
    kinds.int64: (-(1 << 63), (1 << 63) - 1),
    kinds.uint64: (0, (1 << 64) - 1),
}


@st.composite
def fields_and_values(draw: Any, index: int, depth: int) -> tuple[Field, Any]:
    """One field that lives at *index* of the record, and a value for it."""
    name = draw(st.sampled_from(["x", "y", "dev.z"]))
    choices = ["integer", "array", "boolean", "timer", "buffer", "list", "tree", "pointers"]
    if depth:
        choices += ["struct", "structs", "vstruct"]
    match draw(st.sampled_from(choices)):
        case "integer":
            make, (low, high) = draw(st.sampled_from(list(INTEGERS.items())))
            return make(name, index), draw(st.integers(low, high))
        case "array":
            make, (low, high) = draw(st.sampled_from(list(INTEGERS.items())))
            values = draw(st.lists(st.integers(low, high), max_size=4))
            exists = draw(st.sampled_from([None, lambda record, version: True]))
            return make(name, index, count=len(values), exists=exists), values
        case "boolean":
            return kinds.boolean(name, index), draw(st.booleans())
        case "timer":
            return kinds.timer(name, index), draw(st.none() | st.integers(0, (1 << 64) - 2))
        case "buffer":
            value = draw(st.binary(max_size=9))
            return kinds.buffer(name, len(value), index), value
        case "list":
            make = draw(st.sampled_from([kinds.qtailq, kinds.qlist]))
            return make(name, ELEMENT, index, maximum=3), draw(st.lists(elements(), max_size=3))
        case "tree":
            key = draw(st.sampled_from([None, ELEMENT]))
            keys = st.integers(0, (1 << 64) - 1) if key is None else elements()
            nodes = draw(st.lists(st.tuples(keys, elements()), max_size=3))
            return kinds.gtree(name, ELEMENT, index, key=key, maximum=3), nodes
        case "pointers":
            values = draw(st.lists(st.none() | st.integers(0, 255), max_size=5))
            return kinds.uint8(name, index, count=len(values), pointer=True), values
        case "struct":
            inner = draw(states(depth - 1))
            return kinds.struct(name, inner.vmstate, index), inner.record
        case "structs":
            inner = draw(states(0))
            same = draw(st.integers(0, 3))
            return kinds.struct(name, inner.vmstate, index, count=same), [list(inner.record) for _ in range(same)]
        case _:
            inner = draw(states(depth - 1))
            return kinds.vstruct(name, inner.vmstate, inner.vmstate.version_id, index), inner.record


@dataclass
class Element:
    a: int = 0
    b: bool = False


ELEMENT = VMState("element", 0, (kinds.uint32("a"), kinds.boolean("b")), record=Element)


def elements() -> Any:
    return st.builds(Element, st.integers(0, (1 << 32) - 1), st.booleans())


@st.composite
def states(draw: Any, depth: int = 2) -> Drawn:
    """A state of a few fields, in states up to *depth* deep."""
    count = draw(st.integers(0, 5))
    pairs = [draw(fields_and_values(index, depth)) for index in range(count)]
    version = draw(st.integers(0, 9))
    nulls = [_shape(value) for _, value in pairs]
    vmstate = VMState(
        draw(st.sampled_from(["s", "state"])), version, tuple(one for one, _ in pairs), record=lambda: list(nulls)
    )
    return Drawn(vmstate, [value for _, value in pairs])


def _shape(value: Any) -> Any:
    """What the local machine holds: arrays know where their null pointers are."""
    is_array = isinstance(value, list) and all(one is None or isinstance(one, int) for one in value)
    return [None if one is None else 0 for one in value] if is_array else None


@settings(max_examples=120, deadline=None)
@given(states())
def test_what_was_saved_loads_again(drawn: Drawn) -> None:
    data, _ = drawn.vmstate.save(drawn.record)
    reader = BytesReader(data)
    assert drawn.vmstate.load(reader, drawn.vmstate.version_id) == drawn.record
    assert reader.remaining == 0


@settings(max_examples=120, deadline=None)
@given(states())
def test_the_description_accounts_for_every_byte(drawn: Drawn) -> None:
    data, description = drawn.vmstate.save(drawn.record)
    text = vmdesc.encode([vmdesc.device("s", 0, description)])
    (device,) = vmdesc.parse(text)["devices"]
    assert b"".join(piece.data for piece in vmdesc.split(device, data)) == data
    assert json.loads(text)["page_size"] == 4096


@settings(max_examples=120, deadline=None)
@given(states(), st.data())
def test_damage_is_either_refused_or_a_whole_record(drawn: Drawn, data: st.DataObject) -> None:
    saved = bytearray(drawn.vmstate.save(drawn.record)[0])
    if saved:
        place = data.draw(st.integers(0, len(saved) - 1))
        saved[place] ^= data.draw(st.integers(1, 255))
    cut = bytes(saved[: data.draw(st.integers(0, len(saved)))])
    try:
        record = drawn.vmstate.load(BytesReader(cut), drawn.vmstate.version_id)
    except StreamError as error:
        assert error.section
    else:
        assert len(record) == len(drawn.record)


def test_counts_that_a_peer_controls_never_reserve_memory() -> None:
    vmstate = VMState(
        "box", 1, (kinds.uint32("a"), kinds.buffer("trail", Count("a", 1 << 20))), record=lambda: Box(trail=[])
    )
    with pytest.raises(StreamError, match="a is 4294967295, expected at most 1048576"):
        vmstate.load(BytesReader(b"\xff\xff\xff\xff" + bytes(16)), 1)
