"""Numbers in one piece: the same bytes, records, descriptions and complaints as field by field."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from qemumig.errors import StreamError
from qemumig.savevm.devices.cpu import CPU
from qemumig.savevm.fields import boolean, int16, struct, uint8, uint32, uint64
from qemumig.savevm.packed import PackedFields
from qemumig.savevm.place import Loading, Saving
from qemumig.savevm.reader import BytesReader
from qemumig.savevm.vmstate import VMState


@dataclass
class Part:
    low: int = 1
    high: int = 2


@dataclass
class Whole:
    on: bool = True
    balance: int = -3
    words: list[int] = field(default_factory=lambda: [4, 5, 6])
    part: Part = field(default_factory=Part)
    parts: list[Part] = field(default_factory=lambda: [Part(7, 8), Part(9, 10)])
    pair: list[int] = field(default_factory=lambda: [11, 12])
    last: int = 13


PART = VMState("part", 1, (uint8("low"), uint64("high")), record=Part)
PAIR = VMState("pair", 1, (uint32("pair[0]", 0), uint32("pair[1]", 1)), record=lambda: [0, 0])
FIELDS = (
    boolean("on"),
    int16("balance"),
    uint32("words", count=3),
    struct("part", PART),
    struct("parts", PART, count=2),
    struct("pair", PAIR),
    uint64("last"),
)
WHOLE = VMState("whole", 1, FIELDS, record=Whole)
BYTES = bytes.fromhex(
    "01 fffd 000000040000000500000006 010000000000000002"
    "070000000000000008 09000000000000000a 0000000b0000000c 000000000000000d"
)


def one_by_one(record: Whole) -> tuple[bytes, list[dict[str, Any]]]:
    saving = Saving("whole", 0)
    described = [description for one in FIELDS for description in one.save(saving, record, one.name)]
    return bytes(saving.out), described


def test_all_of_a_state_of_numbers_goes_in_one_piece_and_nothing_shows_it() -> None:
    assert [type(step) for step in WHOLE.steps] == [PackedFields]
    for _ in range(2):  # the first time it notes the description
        data, description = WHOLE.save(Whole())
        assert (data, description["fields"]) == one_by_one(Whole())
        assert data == BYTES
    blank = Whole(False, 0, [0] * 3, Part(0, 0), [Part(0, 0), Part(0, 0)], [0, 0], 0)
    assert WHOLE.load(BytesReader(BYTES), 1, record=blank) == Whole()


def test_what_decides_as_it_goes_stands_between_the_pieces() -> None:
    packed = [step.fields[0].name for step in CPU.steps if isinstance(step, PackedFields)]
    alone = [step[0].name for step in CPU.steps if not isinstance(step, PackedFields)]
    assert (packed, alone) == (["env.regs", "env.segs"], ["env.fpregs", "env.xcr0", "env.xstate_bv", "env.xmm_regs"])


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"balance": 40000}, r"field balance: 40000 does not fit int16"),
        ({"words": [1, -1, 1]}, r"field words\[1\]: -1 does not fit uint32"),
        ({"words": [1]}, r"field words: the record holds 1 elements, expected 3"),
        ({"parts": [Part(), Part(low=256)]}, r"field parts\[1\]\.low: 256 does not fit uint8"),
        ({"last": None}, r"field last: None does not fit uint64"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_value_that_does_not_fit_is_named(wrong: dict[str, Any], text: str) -> None:
    WHOLE.save(Whole())
    with pytest.raises(ValueError, match=text):
        WHOLE.save(Whole(**wrong))


@pytest.mark.parametrize(("length", "where"), [(0, "on"), (10, "words[1]"), (25, "parts[0]"), (len(BYTES) - 1, "last")])
def test_a_stream_that_ends_inside_names_the_field(length: int, where: str) -> None:
    loading = Loading(BytesReader(BYTES[:length]), "whole", 0)
    with pytest.raises(StreamError, match="stream ends inside a field"):
        WHOLE.read(loading, Whole(), 1)
    assert str(loading).startswith(f"section 'whole' instance 0, field {where}")
