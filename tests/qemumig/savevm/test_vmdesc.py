"""The VM description: its text, and what takes a recorded section apart with it (stream.md §8, vmstate.md §5)."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from qemumig.errors import StreamError
from qemumig.savevm import fields as kinds
from qemumig.savevm import vmdesc
from qemumig.savevm.vmstate import VMState

FIELD = {"name": "x", "type": "uint16", "size": 2}


def _device(*fields: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"name": "d", "instance_id": 0, "vmsd_name": "d", "version": 1, "fields": list(fields), **more}


def test_the_text_is_one_line_with_keys_in_order() -> None:
    device = vmdesc.device("d", 3, {"vmsd_name": "d", "version": 1, "fields": []})
    text = vmdesc.encode([device], configuration={"vmsd_name": "configuration"})
    assert text == (
        b'{"configuration": {"vmsd_name": "configuration"}, "page_size": 4096, "devices": '
        b'[{"name": "d", "instance_id": 3, "vmsd_name": "d", "version": 1, "fields": []}]}'
    )
    assert vmdesc.encode([]) == b'{"page_size": 4096, "devices": []}'


def test_numbers_are_read_with_their_sign() -> None:
    device = _device(
        {"name": "a", "type": "int16", "size": 2},
        {"name": "b", "type": "uint16", "size": 2},
        {"name": "c", "type": "int64 equal", "size": 2},
    )
    assert [piece.value for piece in vmdesc.split(device, b"\xff\xff" * 3)] == [-1, 0xFFFF, 0xFFFF]


def test_arrays_and_indices_become_paths() -> None:
    device = _device({**FIELD, "array_len": 2}, {**FIELD, "index": 7})
    assert [piece.path for piece in vmdesc.split(device, bytes(6))] == ["x[0]", "x[1]", "x[7]"]


def test_pieces_know_where_they_lie() -> None:
    pieces = vmdesc.split(_device(FIELD, FIELD), b"\x00\x01\x00\x02")
    assert [(piece.offset, piece.value) for piece in pieces] == [(0, 1), (2, 2)]


@dataclass
class Element:
    a: int = 0


ELEMENT = VMState("element", 0, (kinds.uint8("a"),), record=Element)


@pytest.mark.parametrize("elements", [[], [Element(1)], [Element(1), Element(2)]])
def test_lists_are_taken_apart_element_by_element(elements: list[Element]) -> None:
    vmstate = VMState("d", 1, (kinds.qtailq("x", ELEMENT, maximum=3),))
    data, description = vmstate.save(SimpleNamespace(x=elements))
    (device,) = vmdesc.parse(vmdesc.encode([vmdesc.device("d", 0, description)]))["devices"]
    pieces = vmdesc.split(device, data)
    values = {piece.path: piece.value for piece in pieces if piece.type == "uint8"}
    assert values == {f"x[{number}].a": element.a for number, element in enumerate(elements)}
    assert b"".join(piece.data for piece in pieces) == data


@pytest.mark.parametrize("key", [None, ELEMENT])
def test_trees_are_taken_apart_node_by_node(key: VMState | None) -> None:
    vmstate = VMState("d", 1, (kinds.gtree("x", ELEMENT, key=key, maximum=3),))
    nodes = [(5 if key is None else Element(5), Element(6)), (7 if key is None else Element(7), Element(8))]
    data, description = vmstate.save(SimpleNamespace(x=nodes))
    (device,) = vmdesc.parse(vmdesc.encode([vmdesc.device("d", 0, description)]))["devices"]
    numbers = [piece.value for piece in vmdesc.split(device, data) if piece.type in ("uint8", "uint64")]
    assert numbers == [5, 6, 7, 8]


def _nested(depth: int) -> dict[str, Any]:
    inner: dict[str, Any] = {"vmsd_name": "d", "version": 1, "fields": []}
    for _ in range(depth):
        inner = {"vmsd_name": "d", "version": 1, "fields": [{"name": "x", "type": "struct", "struct": inner, "size": 0}]}
    return {"name": "d", **inner}


@pytest.mark.parametrize(
    ("device", "payload", "finding"),
    [
        (_device(FIELD), b"abc", "accounts for 2 of 3 bytes"),
        (_device(FIELD), b"a", "ends inside field x"),
        (_device({"name": "x", "type": "buffer", "size": 1 << 40}), b"a", "ends inside field x"),
        (_device({"name": "x", "type": "buffer", "size": -1}), b"a", "size -1 of 'x' is no length"),
        (_device({"name": "x", "type": "buffer", "size": "1"}), b"a", "size '1' of 'x' is no length"),
        (_device({"name": "x", "type": "buffer"}), b"a", "malformed: KeyError"),
        (_device({"type": "buffer", "size": 1}), b"a", "malformed: KeyError"),
        (_device({**FIELD, "array_len": 1 << 60}), b"ab", "array_len .* is more than"),
        (_device({**FIELD, "array_len": "2"}), b"abcd", "malformed: TypeError"),
        (_device({"name": "x", "type": "struct", "struct": 5, "size": 1}), b"a", "malformed: TypeError"),
        ({"name": "d"}, b"", "malformed: KeyError"),
        ({"name": "d", "fields": 7}, b"", "malformed: TypeError"),
        (_nested(40), b"", "nest deeper than 32"),
        (
            _device(subsections=[{"vmsd_name": "d/s", "version": 1, "fields": []}]),
            b"\x05\x03d/t\x00\x00\x00\x01",
            "subsection 'd/s' version 1 expected at offset 0x0",
        ),
        (_device(subsections=[{"vmsd_name": "d/s", "version": 1, "fields": []}]), b"\x05\x03d", "ends inside the head"),
        (_device(subsections=[{"vmsd_name": "d/s", "version": -1, "fields": []}]), bytes(20), "version -1 expected"),
    ],
)
def test_a_description_that_does_not_fit_the_bytes_is_refused(device: dict, payload: bytes, finding: str) -> None:
    with pytest.raises(StreamError, match=finding):
        vmdesc.split(device, payload)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"{}", b'{"devices": 1}', b"\xff", b"[" * 100_000])
def test_a_text_that_is_no_description_is_refused(text: bytes) -> None:
    with pytest.raises(StreamError, match="VM description"):
        vmdesc.parse(text)
