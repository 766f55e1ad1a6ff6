"""The VM description: JSON behind the last section that says what every device section was made of (stream.md §8).

Sender    `device` and `encode` put together what the VMStates tell about the bytes they wrote
Tools     `parse` and `split` take a recorded stream apart with nothing but its own description (machine.md §6)

A receiver never looks into it.  One JSON object may hold a key several times (lists of structures); `parse` keeps
such repetitions in `States`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ..errors import StreamError
from ..wire.format import TARGET_PAGE_SIZE, SectionType
from .kinds import Description
from .reader import BytesReader

_LISTS = ("qtailq", "qlist", "gtree")  # u8 1 before each element, u8 0 after the last
_MAX_ELEMENTS = 1 << 20  # of an array
_MAX_DEPTH = 32  # of structures in structures: real descriptions have five


def device(idstr: str, instance_id: int, state: Description) -> Description:
    """The entry of one device section; *state* is what `VMState.save` returned."""
    return {"name": idstr, "instance_id": instance_id, **state}


def encode(devices: Sequence[Description], *, configuration: Description | None = None) -> bytes:
    """The text of the whole description; *configuration* None: that section was not sent."""
    top: Description = {} if configuration is None else {"configuration": configuration}
    top |= {"page_size": TARGET_PAGE_SIZE, "devices": list(devices)}
    return json.dumps(top).encode()


# -- taking a stream apart


class DescribedField(NamedTuple):
    """A piece of a device section.

    *path* names it from the outside in, as `env.segs[3].base`; inside a subsection the path begins with its name in
    angle brackets.  A subsection itself is announced by a piece of type `subsection`, whose bytes are its head.
    """

    path: str
    type: str
    data: bytes
    offset: int  # of the piece, in the bytes that were split

    @property
    def value(self) -> int:
        """The bytes as a big-endian number; negative when the type says so."""
        return int.from_bytes(self.data, "big", signed=self.type.startswith("int") and "equal" not in self.type)


class States(dict[str, Any]):
    """A JSON object in which keys were repeated; *nested* holds each repetition as an object of its own."""

    nested: list[dict[str, Any]]


def parse(text: bytes) -> dict[str, Any]:
    """The description as objects; StreamError when it is not JSON or not of the expected shape."""
    try:
        top = json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise StreamError(f"VM description: {error}, expected JSON") from None
    if not isinstance(top, dict) or not isinstance(top.get("devices"), list):
        raise StreamError("VM description: no list 'devices' found")
    return top


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) == len(pairs):
        return result
    states = States(result)
    states.nested = []
    for key, value in pairs:
        if key == "vmsd_name":
            states.nested.append({})
        if states.nested and key != "size":
            states.nested[-1][key] = value
    return states


def split(description: dict[str, Any], payload: bytes) -> list[DescribedField]:
    """Take the *payload* of a device section apart as its *description* says.

    Raises StreamError when the two do not fit: a description that is malformed, or that does not account for
    every byte of the payload.
    """
    reader = BytesReader(payload)
    name = str(description.get("name", description.get("vmsd_name", "?")))
    try:
        pieces = list(_split_state(description, reader, "", 0))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StreamError(f"VM description of {name!r} is malformed: {error!r}", section=name) from None
    if reader.remaining:
        raise StreamError(
            f"section {name!r}: the VM description accounts for {reader.offset} of {len(payload)} bytes",
            offset=reader.offset,
            section=name,
        )
    return pieces


def _split_state(state: dict[str, Any], reader: BytesReader, prefix: str, depth: int) -> Iterator[DescribedField]:
    if depth > _MAX_DEPTH:
        raise ValueError(f"structures nest deeper than {_MAX_DEPTH}")
    for one in state["fields"]:
        yield from _split_field(one, reader, prefix, depth)
    for subsection in state.get("subsections", ()):
        yield from _split_subsection(subsection, reader, prefix, depth)


def _split_field(one: dict[str, Any], reader: BytesReader, prefix: str, depth: int) -> Iterator[DescribedField]:
    indices: Sequence[int | None] = range(one["array_len"]) if "array_len" in one else [one.get("index")]
    if len(indices) > _MAX_ELEMENTS:
        raise ValueError(f"array_len {len(indices)} of {one['name']!r} is more than {_MAX_ELEMENTS}")
    for index in indices:
        path = prefix + one["name"] + ("" if index is None else f"[{index}]")
        offset = reader.offset
        if one["type"] == "struct":
            yield from _split_state(one["struct"], reader, f"{path}.", depth + 1)
        elif one["type"] == "vstruct":
            yield from _split_state(one, reader, f"{path}.", depth + 1)
        elif one["type"] in _LISTS:
            yield from _split_list(one, reader, path, depth + 1)
        else:
            yield DescribedField(path, one["type"], reader.read(_size_of(one), f"field {path}"), offset)


def _split_list(one: dict[str, Any], reader: BytesReader, path: str, depth: int) -> Iterator[DescribedField]:
    """A linked list, or a tree: its states stand one after the other in the description.

    The keys of a tree are numbers where there is one state for each node, and states where there are two.
    """
    offset = reader.offset
    states = one.nested if isinstance(one, States) else [one] if "fields" in one else []
    per_node = 1
    if one["type"] == "gtree":
        nodes = reader.read_be32(f"field {path}")
        yield DescribedField(f"{path}.nodes", "uint32", nodes.to_bytes(4, "big"), offset)
        per_node = 2 if nodes and len(states) == 2 * nodes else 1
    for number in range(len(states) // per_node):
        yield DescribedField(f"{path}[{number}]", "more", reader.read(1, f"field {path}"), reader.offset - 1)
        if one["type"] == "gtree" and per_node == 1:
            yield DescribedField(f"{path}[{number}].key", "uint64", reader.read(8, f"field {path}"), reader.offset - 8)
        for state in states[per_node * number : per_node * (number + 1)]:
            yield from _split_state(state, reader, f"{path}[{number}].", depth)
    yield DescribedField(f"{path}.end", "more", reader.read(1, f"field {path}"), reader.offset - 1)
    if reader.offset - offset != one["size"]:
        raise ValueError(f"list {path!r} has {reader.offset - offset} bytes, its size says {one['size']}")


def _size_of(one: dict[str, Any]) -> int:
    size = one["size"]
    if not isinstance(size, int) or size < 0:
        raise ValueError(f"size {size!r} of {one['name']!r} is no length")
    return size


def _split_subsection(subsection: dict[str, Any], reader: BytesReader, prefix: str, depth: int) -> Iterator[DescribedField]:
    name, version = subsection["vmsd_name"], subsection["version"]
    offset = reader.offset
    start = bytes([SectionType.QEMU_VM_SUBSECTION, len(name.encode())]) + name.encode()
    head = reader.read(len(start) + 4, f"the head of subsection {name!r}")
    if not head.startswith(start) or int.from_bytes(head[-4:], "big") != version:
        raise StreamError(f"subsection {name!r} version {version} expected at offset {offset:#x}, found {head!r}")
    yield DescribedField(f"{prefix}>>{name}", "subsection", head, offset)
    yield from _split_state(subsection, reader, f"{prefix}<{name}>.", depth + 1)
