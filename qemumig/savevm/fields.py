"""Fields: what descriptions are written with (vmstate.md §2).

    Field = a name on the wire, an attribute of the record, a Kind, and perhaps a count

A Field knows whether it takes part, how many elements there are and where they live in the record; its Kind
(kinds.py) knows the bytes of one.  The count of an array is never on the wire: it is a number of the description, or
an attribute that was loaded before (`Count`), always with a limit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, groupby, repeat
from typing import TYPE_CHECKING, Any, NamedTuple

from .kinds import (
    NULL,
    AtMostInteger,
    Bitmap,
    Boolean,
    Buffer,
    Capability,
    Count,
    Description,
    EqualInteger,
    Integer,
    Kind,
    LinkedList,
    Struct,
    Temporary,
    Timer,
    Tree,
    Unused,
    Validate,
    VersionedStruct,
    get_member,
    length_of,
    set_member,
)
from .place import Loading, Saving

if TYPE_CHECKING:
    from .vmstate import VMState

Attr = str | int | None  # an attribute of the record, or an index when the record is a list

_NO_LOCAL = object()  # the local record has no such element


@dataclass(frozen=True)
class Field:
    """A member of a state: one element, or an array of them."""

    name: str
    kind: Kind
    attr: Attr
    count: int | Count | None = None  # None: no array
    version: int = 0  # takes part from this version on
    exists: Callable[[Any, int], bool] | None = None  # decides instead of `version`; sees what is loaded already
    pointer: bool = False  # elements may be None: a null pointer
    first: int | None = None  # where the array begins in a longer list; None: it is the whole list

    def takes_part(self, record: Any, version_id: int) -> bool:
        """True when the field is on the wire in state of that version."""
        return self.exists(record, version_id) if self.exists else self.version <= version_id

    def save(self, saving: Saving, record: Any, wire_name: str) -> list[Description]:
        """Append the field of *record*; return its description objects, none where they are not wanted."""
        if self.count is not None:
            return self._save_array(saving, self._values(saving, record, self.count), record, wire_name)
        element = self._save_element(saving, record, self._local(record), None)
        return [element.describe(wire_name, {})] if saving.describes else []

    def _save_array(self, saving: Saving, values: Sequence[Any], record: Any, wire_name: str) -> list[Description]:
        if not self._is_uniform or len(values) < 2:
            elements = [self._save_element(saving, record, value, number) for number, value in enumerate(values)]
            return [one for run in self._runs(elements) for one in self._describe(wire_name, run)]
        first = self._save_packed(saving, values)
        if first is None:
            first = self._save_element(saving, record, values[0], 0)
            with saving.bytes_only():
                for number, value in enumerate(values[1:], start=1):
                    self._save_element(saving, record, value, number)
        return [first.describe(wire_name, {"array_len": len(values)})] if saving.describes else []

    @cached_property
    def _is_uniform(self) -> bool:
        """Whether the first element's description stands for all (vmstate.md §5)."""
        return self.exists is None and not self.pointer and self.kind.compressible

    def _save_packed(self, saving: Saving, values: Sequence[Any]) -> _Element | None:
        """Numbers go in one piece.  None: they are none, or one does not fit, and the long way tells which."""
        if not isinstance(self.kind, Integer):
            return None
        try:
            saving.out += self.kind.pack(values)
        except ValueError:
            return None
        return _Element(0, self.kind, {}, self.kind.size)

    def _save_element(self, saving: Saving, record: Any, value: Any, number: int | None) -> _Element:
        """Append one element; *number* None: the field is no array."""
        saving.path.append((self.name, number))
        kind = self.kind
        if value is None and self.pointer:
            if number is None:
                saving.refuse("the pointer is null, expected a value")
            kind = NULL
        start = len(saving.out)
        inner = kind.save(saving, value, record)
        saving.path.pop()
        return _Element(number, kind, inner, len(saving.out) - start)

    def _values(self, saving: Saving, record: Any, count: int | Count) -> Sequence[Any]:
        """The elements of the array in *record*, as many as *count* says."""
        saving.path.append((self.name, None))
        length = length_of(count, record, saving)
        value = self._local(record)
        if self.attr is None:
            value = (None,) * length
        values: Sequence[Any] = value if self.first is None else value[self.first : self.first + length]
        if len(values) != length:
            saving.refuse(f"the record holds {len(values)} elements, expected {length}")
        saving.path.pop()
        return values

    def load(self, loading: Loading, record: Any) -> None:
        """Read the field into *record*."""
        if self.count is None:
            loading.path.append((self.name, None))
            value = self.kind.load(loading, self._local(record), record)
            loading.path.pop()
        else:
            value = self._load_array(loading, record, self.count)
        if self.attr is not None:
            set_member(record, self.attr, value)

    def _local(self, record: Any) -> Any:
        """What the record holds now."""
        return None if self.attr is None else get_member(record, self.attr)

    def _load_array(self, loading: Loading, record: Any, count: int | Count) -> list[Any]:
        loading.path.append((self.name, None))
        length = length_of(count, record, loading)
        whole = self._local(record) or []
        first = self.first or 0
        values = []
        locals_ = chain(whole[first : first + length], repeat(_NO_LOCAL))
        for number, local in zip(range(length), locals_, strict=False):
            loading.path[-1] = (self.name, number)
            kind = NULL if local is None and self.pointer else self.kind
            values.append(kind.load(loading, None if local is _NO_LOCAL else local, record))
        loading.path.pop()
        return values if self.first is None else [*whole[:first], *values, *whole[first + length :]]

    # -- description

    def _runs(self, elements: list[_Element]) -> Iterator[list[_Element]]:
        """Stretches of elements that are described together: null pointers apart from the others."""
        return (list(run) for _, run in groupby(elements, key=lambda element: element.kind is NULL))

    def _describe(self, wire_name: str, run: list[_Element]) -> Iterator[Description]:
        if len(run) > 1 and self.exists is None and run[0].kind.compressible:
            yield run[0].describe(wire_name, {"array_len": len(run)})
            return
        for element in run[:-1]:
            yield element.describe(wire_name, {"index": element.number})
        for element in run[-1:]:
            yield element.describe(wire_name, {})


class _Element(NamedTuple):
    """An element that was written: what its description says."""

    number: int | None
    kind: Kind
    inner: Description
    size: int

    def describe(self, wire_name: str, position: dict[str, int | None]) -> Description:
        head: Description = {"name": wire_name, **position, "type": self.kind.type}
        return {**head, **self.inner, "size": self.size}


def ordinal_names(fields: Sequence[Field]) -> tuple[str, ...]:
    """The names the description uses: equal ones are told apart by `[k]`, also where some do not take part."""
    total = Counter(one.name for one in fields)
    seen: Counter[str] = Counter()
    names = []
    for one in fields:
        names.append(f"{one.name}[{seen[one.name]}]" if total[one.name] > 1 else one.name)
        seen[one.name] += 1
    return tuple(names)


# -- kinds of one element


@dataclass(frozen=True)
class ValidateField(Field):
    """A check among the fields; the description does not list it."""

    def save(self, saving: Saving, record: Any, wire_name: str) -> list[Description]:
        super().save(saving, record, wire_name)
        return []


# -- constructors: what descriptions are written with


def scalar(kind: Kind) -> Callable[..., Field]:
    """A constructor of fields of one kind: `uint32("env.hflags")`, `uint64("env.regs", count=16)`."""

    def make(name: str, attr: Attr = None, **options: Any) -> Field:
        return Field(name, kind, _default_attr(name) if attr is None else attr, **options)

    return make


def _default_attr(name: str) -> str:
    """The last part of a member's name: `env.eip` lives in attribute `eip`."""
    return name.rpartition(".")[2]


boolean = scalar(Boolean())
int8 = scalar(Integer("int8", 1, signed=True))
int16 = scalar(Integer("int16", 2, signed=True))
int32 = scalar(Integer("int32", 4, signed=True))
int64 = scalar(Integer("int64", 8, signed=True))
uint8 = scalar(Integer("uint8", 1))
uint16 = scalar(Integer("uint16", 2))
uint32 = scalar(Integer("uint32", 4))
uint64 = scalar(Integer("uint64", 8))
uint8_equal = scalar(EqualInteger("uint8 equal", 1))
uint16_equal = scalar(EqualInteger("uint16 equal", 2))
uint32_equal = scalar(EqualInteger("uint32 equal", 4))
uint64_equal = scalar(EqualInteger("int64 equal", 8))  # QEMU's name for it, although it is unsigned
int32_equal = scalar(EqualInteger("int32 equal", 4, signed=True))
int32_le = scalar(AtMostInteger("int32 le", 4, signed=True))
cpudouble = scalar(Integer("CPU_Double_U", 8))
timer = scalar(Timer())
capability = scalar(Capability())


def buffer(
    name: str, size: int | Count, attr: Attr = None, *, start: int = 0, partial: bool = False, **options: Any
) -> Field:
    """*size* raw bytes; *partial*: they are only the bytes of the attribute from *start* on."""
    return scalar(Buffer(size, start, partial))(name, attr, **options)


def unused(size: int, *, name: str = "unused", **options: Any) -> Field:
    """*size* bytes without a meaning (times `count`)."""
    return Field(name, Unused(size), None, **options)


def bitmap(name: str, bits: Count, attr: Attr = None, **options: Any) -> Field:
    """As many bits as another attribute says."""
    return scalar(Bitmap(bits))(name, attr, **options)


def struct(name: str, vmstate: VMState, attr: Attr = None, **options: Any) -> Field:
    """Another state, or an array of it."""
    return scalar(Struct(vmstate))(name, attr, **options)


def vstruct(name: str, vmstate: VMState, struct_version: int, attr: Attr = None, **options: Any) -> Field:
    """Another state as of a version of its own."""
    if not vmstate.accepts(struct_version):
        raise ValueError(f"{vmstate.name!r} has no version {struct_version}")
    return scalar(VersionedStruct(vmstate, struct_version))(name, attr, **options)


def tmp(name: str, vmstate: VMState, *, version: int = 0, **options: Any) -> Field:
    """A helper state; its record has an attribute `parent` and hooks that use it."""
    return Field(name, Temporary(_readable(vmstate, version), version), None, version=version, **options)


def validate(name: str, holds: Callable[[Any], bool], **options: Any) -> Field:
    """A check of what has been loaded so far."""
    return ValidateField(name, Validate(holds), None, **options)


def qtailq(name: str, vmstate: VMState, attr: Attr = None, *, maximum: int, **options: Any) -> Field:
    """A doubly linked list of at most *maximum* elements."""
    return _list_field("qtailq", name, vmstate, attr, maximum, options)


def qlist(name: str, vmstate: VMState, attr: Attr = None, *, maximum: int, **options: Any) -> Field:
    """A singly linked list of at most *maximum* elements."""
    return _list_field("qlist", name, vmstate, attr, maximum, options)


def gtree(
    name: str,
    vmstate: VMState,
    attr: Attr = None,
    *,
    key: VMState | None = None,
    maximum: int,
    **options: Any,
) -> Field:
    """A balanced tree of at most *maximum* nodes; keys are numbers, or states of their own."""
    version = options.get("version", 0)
    if key is not None:
        _readable(key, version)
    return scalar(Tree(_readable(vmstate, version), key, version, maximum))(name, attr, **options)


def custom(name: str, kind: Kind, attr: Attr = None, **options: Any) -> Field:
    """A field whose bytes only the device knows: *kind* writes and reads them."""
    return scalar(kind)(name, attr, **options)


def _list_field(kind: str, name: str, vmstate: VMState, attr: Attr, maximum: int, options: dict[str, Any]) -> Field:
    version = options.get("version", 0)
    return scalar(LinkedList(kind, _readable(vmstate, version), version, maximum))(name, attr, **options)


def _readable(vmstate: VMState, version: int) -> VMState:
    """*vmstate*, whose elements are read as of the field's version: it must accept that (vmstate.md §4)."""
    if not vmstate.accepts(version):
        raise ValueError(f"{vmstate.name!r} cannot be read as of version {version}, its field's version")
    return vmstate
