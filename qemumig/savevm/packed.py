"""Numbers that stand side by side go in one piece: state is written and read while a guest stands still.

    segs[0] … segs[5]  ldt  tr  cr0  cr2  dr[0] … dr[7]        fields, and states without a will of their own
    └────────────────── one struct.Struct ──────────────┘      one pack, one unpack

Most of device state is numbers whose place and size never change.  What decides as it goes (a hook, a subsection, a
condition, a pointer, a count from the record) goes field by field, and so does whatever does not fit: a value too large
or a stream too short.  That way is slower, and knows which field it was.

Holds     bytes, records and descriptions are those of the fields one by one
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, groupby, islice, repeat
from typing import TYPE_CHECKING, Any

from .kinds import Boolean, Description, Integer, Struct, get_member, set_member
from .place import Loading, Saving

if TYPE_CHECKING:
    from .fields import Field
    from .vmstate import VMState

_AT_LEAST = 2  # fields that are worth it
_PEEKED_AT_MOST = 4096  # bytes that a reader can look ahead

Gather = Callable[[Any, list[Any]], None]  # append the numbers of a record
Scatter = Callable[[Any, Iterator[Any]], None]  # take them back, in the same order


class PackedFields:
    """Some of a state's *fields*, neighbours, of which every one is always there and holds plain numbers."""

    def __init__(self, fields: Sequence[Field], wire_names: Sequence[str]) -> None:
        self.fields = fields
        self.wire_names = wire_names
        self._binary = struct.Struct(">" + "".join(map(_format, fields)))
        self._gather = [_gatherer(one) for one in fields]
        self._scatter = [_scatterer(one) for one in fields]
        self._descriptions: list[Description] | None = None

    def save(self, saving: Saving, record: Any) -> list[Description]:
        """Append them; their description objects."""
        if saving.describes and self._descriptions is None:
            self._descriptions = self._save_one_by_one(saving, record)
            return self._descriptions
        values: list[Any] = []
        try:
            for gather in self._gather:
                gather(record, values)
            saving.out += self._binary.pack(*values)
        except (struct.error, TypeError, AttributeError, IndexError):
            return self._save_one_by_one(saving, record)
        return self._descriptions or []

    def load(self, loading: Loading, record: Any) -> None:
        """Read them into *record*."""
        reader = loading.reader
        if len(reader.peek(self._binary.size)) < self._binary.size:
            for one in self.fields:
                one.load(loading, record)
            return
        values = iter(self._binary.unpack(reader.read(self._binary.size)))
        for scatter in self._scatter:
            scatter(record, values)

    def _save_one_by_one(self, saving: Saving, record: Any) -> list[Description]:
        found = []
        for wire_name, one in zip(self.wire_names, self.fields, strict=True):
            found += one.save(saving, record, wire_name)
        return found


def steps_of(vmstate: VMState, wire_names: Sequence[str]) -> Iterator[PackedFields | tuple[Field, str]]:
    """The fields of *vmstate* in their order, what can be packed together."""
    named = zip(vmstate.fields, wire_names, strict=True)
    for packs, group in groupby(named, key=lambda one: one[0].version <= vmstate.oldest_version and _is_packed(one[0])):
        run = list(group)
        if packs and len(run) >= _AT_LEAST and sum(_size(one) for one, _ in run) <= _PEEKED_AT_MOST:
            yield PackedFields(*zip(*run, strict=True))
        else:
            yield from run


def _is_packed(one: Field) -> bool:
    if one.exists is not None or one.pointer or one.first is not None or not isinstance(one.count, int | None):
        return False
    if one.attr is None:
        return False
    return _is_plain(one.kind.vmstate) if isinstance(one.kind, Struct) else type(one.kind) in (Integer, Boolean)


def _is_plain(vmstate: VMState) -> bool:
    """Nothing but numbers: what surrounds it need not know that it is a state."""
    hooks = (vmstate.pre_save, vmstate.post_save, vmstate.pre_load, vmstate.post_load)
    if vmstate.subsections or any(hooks):
        return False
    return all(one.version <= vmstate.version_id and _is_packed(one) for one in vmstate.fields)


def _size(one: Field) -> int:
    return struct.calcsize(">" + _format(one))


def _shape(one: Field) -> tuple[str | int, int | None]:
    """Where a packed field lives in its record, and how many elements it has; None: it is no array."""
    assert one.attr is not None and isinstance(one.count, int | None)
    return one.attr, one.count


def _format(one: Field) -> str:
    _, count = _shape(one)
    times = 1 if count is None else count
    if isinstance(one.kind, Struct):
        return "".join(map(_format, one.kind.vmstate.fields)) * times
    return f"{times}{one.kind.letter if isinstance(one.kind, Integer) else '?'}"


def _gatherer(one: Field) -> Gather:
    """Appends what *one* holds in a record; TypeError, AttributeError or IndexError where its shape is another."""
    attr, count = _shape(one)
    inner = [_gatherer(inside) for inside in one.kind.vmstate.fields] if isinstance(one.kind, Struct) else []

    def number(record: Any, values: list[Any]) -> None:
        values.append(get_member(record, attr))

    def state(record: Any, values: list[Any]) -> None:
        element = get_member(record, attr)
        for gather in inner:
            gather(element, values)

    def array(record: Any, values: list[Any]) -> None:
        elements = get_member(record, attr)
        if len(elements) != count:
            raise TypeError("another number of elements")
        if not inner:
            values += elements
        for element in elements if inner else ():
            for gather in inner:
                gather(element, values)

    if count is not None:
        return array
    return state if inner else number


def _scatterer(one: Field) -> Scatter:
    """Fills what *one* holds in a record, from the numbers that come next."""
    attr, count = _shape(one)
    if isinstance(one.kind, Struct):
        return _state_scatterer(one.kind.vmstate, attr, count)
    if count is None:
        return lambda record, values: set_member(record, attr, next(values))
    return lambda record, values: set_member(record, attr, list(islice(values, count)))


def _state_scatterer(vmstate: VMState, attr: str | int, count: int | None) -> Scatter:
    inner = [_scatterer(inside) for inside in vmstate.fields]

    def fill(element: Any, values: Iterator[Any]) -> Any:
        element = vmstate.record() if element is None else element
        for scatter in inner:
            scatter(element, values)
        return element

    def state(record: Any, values: Iterator[Any]) -> None:
        set_member(record, attr, fill(get_member(record, attr), values))

    def array(record: Any, values: Iterator[Any]) -> None:
        local = islice(chain(get_member(record, attr) or (), repeat(None)), count)
        set_member(record, attr, [fill(element, values) for element in local])

    return state if count is None else array
