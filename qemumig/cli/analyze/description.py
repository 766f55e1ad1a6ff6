"""The VM description at the end of a recording: finding it before the walk comes there, and measuring sections with it.

Device sections have no length (stream.md §3), so the walk over the devices needs what stands behind them.  The file is
searched backwards for EOF, the marker, a length that fits and JSON:

    … last section | 0x00 | 0x06 | be32 length | {"configuration": …, "page_size": 4096, "devices": […]} |
"""

from __future__ import annotations

import mmap
from collections import deque
from typing import Any

from ...errors import StreamError
from ...savevm import vmdesc
from ...wire.format import SectionType

SEARCHED = 64 << 20  # bytes at the end of the file
_MARK = bytes([SectionType.QEMU_VM_EOF, SectionType.QEMU_VM_VMDESCRIPTION])
MAX_STATE = 64 << 20  # bytes of one section
_MAX_PIECES = 1 << 20  # fields of one section, elements of arrays counted one by one
_MAX_DEPTH = 32


class Descriptions:
    """The descriptions of the device sections of one stream, each used in the order in which it stands there."""

    def __init__(self, top: dict[str, Any]) -> None:
        self._devices: dict[tuple[str, int], deque[dict[str, Any]]] = {}
        for device in top["devices"]:
            if isinstance(device, dict):
                identity = str(device.get("name")), device.get("instance_id", 0)
                if isinstance(identity[1], int):
                    self._devices.setdefault(identity, deque()).append(device)
        size = top.get("page_size")
        self.page_size = size if isinstance(size, int) and 1024 <= size <= 65536 and size & (size - 1) == 0 else None

    def take(self, idstr: str, instance_id: int) -> dict[str, Any] | None:
        """The description of the next section of that identity; the last one serves for all that follow."""
        several = self._devices.get((idstr, instance_id))
        if several is None:
            return None
        return several.popleft() if len(several) > 1 else several[0]


def find(data: bytes | mmap.mmap, start: int, end: int) -> Descriptions | None:
    """The description that stands nearest to the end, if there is one that can be read."""
    floor = max(start, end - SEARCHED)
    at = data.rfind(_MARK, floor, end)
    while at >= 0:
        text_start = at + 6
        length = int.from_bytes(data[at + 2 : text_start], "big")
        if 2 <= length <= end - text_start and data[text_start : text_start + 1] == b"{":
            try:
                return Descriptions(vmdesc.parse(data[text_start : text_start + length]))
            except StreamError:
                pass  # guest memory may look like that, too
        at = data.rfind(_MARK, floor, at)
    return None


def measure(device: dict[str, Any]) -> int:
    """How many bytes the section has that *device* describes (vmstate.md §5).

    StreamError when the description is malformed, or stands for more than a device can have.
    """
    try:
        length, pieces = _measure_state(device, 0)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StreamError(f"VM description of {device.get('name')!r} is malformed: {error!r}") from None
    if length > MAX_STATE or pieces > _MAX_PIECES:
        raise StreamError(
            f"VM description of {device.get('name')!r} stands for {pieces} fields in {length} bytes, "
            f"expected at most {_MAX_PIECES} in {MAX_STATE}"
        )
    return length


def _measure_state(state: dict[str, Any], depth: int) -> tuple[int, int]:
    """Bytes and pieces of a state with its subsections."""
    if depth > _MAX_DEPTH:
        raise ValueError(f"structures nest deeper than {_MAX_DEPTH}")
    length, pieces = 0, 1
    for one in state["fields"]:
        count = one.get("array_len", 1)
        if not isinstance(count, int) or count < 0:
            raise ValueError(f"array_len {count!r} is no count")
        field_length, field_pieces = _measure_field(one, depth)
        length += count * field_length
        pieces += count * field_pieces
    for subsection in state.get("subsections", ()):
        head = 1 + 1 + len(subsection["vmsd_name"].encode()) + 4
        field_length, field_pieces = _measure_state(subsection, depth + 1)
        length += head + field_length
        pieces += field_pieces
    return length, pieces


def _measure_field(one: dict[str, Any], depth: int) -> tuple[int, int]:
    """Bytes and pieces of one element of a field."""
    if not isinstance(one["type"], str) or not isinstance(one["name"], str):
        raise TypeError(f"name {one['name']!r} and type {one['type']!r} are no text")
    if one["type"] == "struct":
        return _measure_state(one["struct"], depth + 1)
    if one["type"] == "vstruct":
        return _measure_state(one, depth + 1)
    size = one["size"]
    if not isinstance(size, int) or size < 0:
        raise ValueError(f"size {size!r} is no length")
    return size, 1
