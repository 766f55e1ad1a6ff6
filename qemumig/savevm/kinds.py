"""The kinds of elements a description is made of, and their exact bytes (vmstate.md §2).

A Kind knows one element: how it is written, read and described.  Records stay plain.  What their attributes hold:

    bool, intN, uintN        bool, int                       timer         int (ns), None when not armed
    cpudouble                int: the 64 bits of the double  buffer        bytes
    bitmap                   int: bit k is element k         struct        a record
    arrays                   list                            qtailq, qlist list of records
    array of pointers        list with None for null         gtree         list of (key, record) in key order
    unused, validate         nothing
"""

from __future__ import annotations

import struct as binary
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import index
from typing import TYPE_CHECKING, Any, Protocol

from .place import Loading, Saving

if TYPE_CHECKING:
    from .vmstate import VMState

Description = dict[str, Any]

_TIMER_NOT_ARMED = 0xFFFFFFFFFFFFFFFF
_LETTERS = {1: "B", 2: "H", 4: "I", 8: "Q"}  # of unsigned numbers, for `struct`
_NULL_POINTER = 0x30  # ASCII '0' stands for a null pointer in an array
_ONE_MORE, _NO_MORE = b"\x01", b"\x00"  # before each element of a list, and after the last


class RepeatedKey(str):
    """A key that one JSON object holds several times, as QEMU describes lists: each instance is a key of its own."""

    __slots__ = ()
    __hash__ = object.__hash__
    __eq__ = object.__eq__


def get_member(record: Any, attr: str | int) -> Any:
    """What *record* holds at *attr*."""
    return record[attr] if isinstance(attr, int) else getattr(record, attr)


def set_member(record: Any, attr: str | int, value: Any) -> None:
    """Store *value* at *attr*; an attribute that the record does not have is a mistake in a description."""
    if isinstance(attr, int):
        record[attr] = value
    else:
        getattr(record, attr)
        setattr(record, attr, value)


@dataclass(frozen=True)
class Count:
    """A number of elements, or bytes, taken from another attribute of the same record.

    *maximum* limits the product of the attribute and *times*; the attribute may come from a peer.
    """

    attr: str
    maximum: int
    times: int = 1

    def of(self, record: Any, place: Loading | Saving) -> int:
        value = get_member(record, self.attr)
        if not 0 <= value * self.times <= self.maximum:
            limit = self.maximum // self.times
            place.refuse(f"{self.attr} is {value}, expected at most {limit} and not negative")
        return value * self.times


def length_of(size: int | Count, record: Any, place: Loading | Saving) -> int:
    """*size* itself, or what it counts."""
    return size if isinstance(size, int) else size.of(record, place)


class Kind(Protocol):
    """One element of a field."""

    @property
    def type(self) -> str:
        """The name of the kind in the JSON description."""

    @property
    def compressible(self) -> bool:
        """True when one description can stand for all elements of an array (vmstate.md §5)."""

    def save(self, saving: Saving, value: Any, record: Any) -> Description:
        """Append *value*, a member of *record*; return what the description tells between `type` and `size`."""

    def load(self, loading: Loading, local: Any, record: Any) -> Any:
        """Read the value that takes the place of *local* in *record*."""


# -- the fields themselves


@dataclass(frozen=True)
class Integer:
    """A big-endian number of *size* bytes: 1, 2, 4 or 8."""

    type: str
    size: int
    signed: bool = False
    compressible = True

    def save(self, saving: Saving, value: Any, record: Any) -> Description:
        try:
            saving.out += index(value).to_bytes(self.size, "big", signed=self.signed)
        except (OverflowError, TypeError):
            saving.refuse(f"{value!r} does not fit {self.type}")
        return {}

    def load(self, loading: Loading, local: Any, record: Any) -> Any:
        return int.from_bytes(loading.reader.read(self.size), "big", signed=self.signed)

    @property
    def letter(self) -> str:
        """What `struct` calls it."""
        letter = _LETTERS[self.size]
        return letter.lower() if self.signed else letter

    def pack(self, values: Sequence[Any]) -> bytes:
        """Several at once; ValueError when one does not fit."""
        try:
            return binary.pack(f">{len(values)}{self.letter}", *values)
        except binary.error as error:
            raise ValueError(str(error)) from error


@dataclass(frozen=True)
class EqualInteger(Integer):
    """A number that must equal the local one."""

    def load(self, loading: Loading, local: Any, record: Any) -> Any:
        offset = loading.reader.offset
        value = super().load(loading, local, record)
        if value != local:
            loading.refuse(f"{value:#x} found, expected the local value {local!r}", offset)
        return value


@dataclass(frozen=True)
class AtMostInteger(Integer):
    """A number from 0 up to the local one."""

    def load(self, loading: Loading, local: Any, record: Any) -> Any:
        offset = loading.reader.offset
        value = super().load(loading, local, record)
        if not 0 <= value <= local:
            loading.refuse(f"{value} found, expected 0 to the local value {local}", offset)
        return value


@dataclass(frozen=True)
class Boolean:
    """One byte; every value but 0 is true."""

    type = "bool"
    compressible = True

    def save(self, saving: Saving, value: Any, record: Any) -> Description:
        saving.out.append(1 if value else 0)
        return {}

    def load(self, loading: Loading, local: Any, record: Any) -> bool:
        return loading.reader.read_u8() != 0


@dataclass(frozen=True)
class Timer:
    """When a timer expires, in ns of its clock; None when it is not armed."""

    type = "timer"
    compressible = True

    def save(self, saving: Saving, value: Any, record: Any) -> Description:
        number = _TIMER_NOT_ARMED if value is None else value
        return Integer("timer", 8).save(saving, number, record)

    def load(self, loading: Loading, local: Any, record: Any) -> int | None:
        value = loading.reader.read_be64()
        return None if value == _TIMER_NOT_ARMED else value


@dataclass(frozen=True)
class Buffer:
    """Raw bytes; with *partial* they are only a part of the attribute, from byte *start* on."""

    size: int | Count
    start: int = 0
    partial: bool = False
    type = "buffer"
    compressible = True

    def save(self, saving: Saving, value: Any, record: Any) -> Description:
        end = self.start + length_of(self.size, record, saving)
        if len(value) < end or (len(value) > end and not self.partial):
            saving.refuse(f"the record holds {len(value)} bytes, expected {end}")
        saving.out += value[self.start : end]
        return {}

    def load(self, loading: Loading, local: Any, record: Any) -> bytes:
        size = length_of(self.size, record, loading)
        data = loading.reader.read(size)
        if not self.partial:
            return data
        return bytes(local[: self.start]) + data + bytes(local[self.start + size :])


@dataclass(frozen=True)
class Unused:
    """Bytes that mean nothing any more: zero when written, anything when read."""

    size: int
    type = "unused_buffer"
    compressible = True

    def save(self, saving: Saving, value: Any, record: Any) -> Description:
        saving.out += bytes(self.size)
        return {}

    def load(self, loading: Loading, local: Any, record: Any) -> None:
        loading.reader.read(self.size)


@dataclass(frozen=True)
class Bitmap:
    """Bits in 64-bit words, the lowest bit of the first word first."""

    bits: Count
    type = "bitmap"
    compressible = True

    def save(self, saving: Saving, value: Any, record: Any) -> Description:
        bits = self.bits.of(record, saving)
        if value < 0 or value >> bits:
            saving.refuse(f"the bitmap holds bit {value.bit_length() - 1}, expected {bits} bits")
        for word in range(-(-bits // 64)):
            saving.out += binary.pack(">Q", value >> 64 * word & 0xFFFFFFFFFFFFFFFF)
        return {}

    def load(self, loading: Loading, local: Any, record: Any) -> int:
        bits = self.bits.of(record, loading)
        words = [loading.reader.read_be64() for _ in range(-(-bits // 64))]
        value = sum(word << 64 * number for number, word in enumerate(words))
        return value & (1 << bits) - 1


@dataclass(frozen=True)
class Capability:
    """A counted string (the configuration section only)."""

    type = "capability"
    compressible = True

    def save(self, saving: Saving, value: Any, record: Any) -> Description:
        data = value.encode()
        if len(data) > 255:
            saving.refuse(f"{value!r} is {len(data)} bytes long, a counted string holds 255")
        saving.out += bytes([len(data)]) + data
        return {}

    def load(self, loading: Loading, local: Any, record: Any) -> str:
        offset = loading.reader.offset
        data = loading.reader.read(loading.reader.read_u8())
        try:
            return data.decode()
        except UnicodeDecodeError:
            loading.refuse(f"{data!r} found, expected UTF-8 text", offset)


@dataclass(frozen=True)
class NullPointer:
    """The mark of a null pointer in an array: the receiver must have a null pointer there too."""

    type = "nullptr"
    compressible = True

    def save(self, saving: Saving, value: Any, record: Any) -> Description:
        saving.out.append(_NULL_POINTER)
        return {}

    def load(self, loading: Loading, local: Any, record: Any) -> None:
        offset = loading.reader.offset
        mark = loading.reader.read_u8()
        if mark != _NULL_POINTER:
            loading.refuse(f"{mark:#x} found, expected {_NULL_POINTER:#x}: the pointer is null here", offset)


NULL = NullPointer()


@dataclass(frozen=True)
class Validate:
    """No bytes: a predicate on the record that must hold, on load as on save."""

    holds: Callable[[Any], bool]
    type = "unknown"
    compressible = True

    def save(self, saving: Saving, value: Any, record: Any) -> Description:
        self._check(saving, record)
        return {}

    def load(self, loading: Loading, local: Any, record: Any) -> None:
        self._check(loading, record)

    def _check(self, place: Loading | Saving, record: Any) -> None:
        if not self.holds(record):
            place.refuse("the state before it is inconsistent, expected this check to hold")


# -- kinds that nest another state


@dataclass(frozen=True)
class Struct:
    """Another state in the middle of this one, always in its own newest version."""

    vmstate: VMState
    type = "struct"

    @cached_property
    def compressible(self) -> bool:
        if self.vmstate.subsections:
            return False
        return all(one.exists is None and one.kind.compressible for one in self.vmstate.fields)

    def save(self, saving: Saving, value: Any, record: Any) -> Description:
        return {"struct": self.vmstate.write(saving, value)}

    def load(self, loading: Loading, local: Any, record: Any) -> Any:
        inner = self.vmstate.record() if local is None else local
        self.vmstate.read(loading, inner, self.vmstate.version_id)
        return inner


@dataclass(frozen=True)
class VersionedStruct:
    """Another state, in both directions as of *struct_version*."""

    vmstate: VMState
    struct_version: int
    type = "vstruct"
    compressible = True

    def save(self, saving: Saving, value: Any, record: Any) -> Description:
        return self.vmstate.write(saving, value, self.struct_version)

    def load(self, loading: Loading, local: Any, record: Any) -> Any:
        inner = self.vmstate.record() if local is None else local
        self.vmstate.read(loading, inner, self.struct_version)
        return inner


@dataclass(frozen=True)
class Temporary:
    """A state of a helper record that lives only while it is saved or loaded.

    The helper's hooks move what it holds from and to its `parent`, the record that has this field.
    """

    vmstate: VMState
    version: int
    type = "tmp"
    compressible = True

    def _helper(self, parent: Any) -> Any:
        helper = self.vmstate.record()
        helper.parent = parent
        return helper

    def save(self, saving: Saving, value: Any, record: Any) -> Description:
        return self.vmstate.write(saving, self._helper(record))

    def load(self, loading: Loading, local: Any, record: Any) -> None:
        self.vmstate.read(loading, self._helper(record), self.version)


@dataclass(frozen=True)
class LinkedList:
    """Elements of one state, each behind a byte 1, and a byte 0 after the last."""

    type: str
    vmstate: VMState
    version: int
    maximum: int
    compressible = True

    def save(self, saving: Saving, value: Any, record: Any) -> Description:
        described: Description = {}
        for element in value:
            saving.out += _ONE_MORE
            described |= _repeatable(self.vmstate.write(saving, element))
        saving.out += _NO_MORE
        return described

    def load(self, loading: Loading, local: Any, record: Any) -> list[Any]:
        elements: list[Any] = []
        while loading.reader.read_u8():
            if len(elements) == self.maximum:
                loading.refuse(f"the list goes on, expected at most {self.maximum} elements")
            element = self.vmstate.record()
            self.vmstate.read(loading, element, self.version)
            elements.append(element)
        return elements


_DIRECT_KEY = Integer("uint64", 8)


@dataclass(frozen=True)
class Tree:
    """Keys and values in key order, their number first; *key* None: keys are 64-bit numbers."""

    vmstate: VMState
    key: VMState | None
    version: int
    maximum: int
    type = "gtree"
    compressible = True

    def save(self, saving: Saving, value: Any, record: Any) -> Description:
        saving.out += binary.pack(">I", len(value))
        described: Description = {}
        for key, element in value:
            saving.out += _ONE_MORE
            if self.key is None:
                _DIRECT_KEY.save(saving, key, record)
            else:
                described |= _repeatable(self.key.write(saving, key))
            described |= _repeatable(self.vmstate.write(saving, element))
        saving.out += _NO_MORE
        return described

    def load(self, loading: Loading, local: Any, record: Any) -> list[tuple[Any, Any]]:
        offset = loading.reader.offset
        announced = loading.reader.read_be32()
        if announced > self.maximum:
            loading.refuse(f"{announced} nodes announced, expected at most {self.maximum}", offset)
        nodes: list[tuple[Any, Any]] = []
        while loading.reader.read_u8():
            if len(nodes) == announced:
                loading.refuse(f"the tree goes on, expected the {announced} nodes that were announced")
            nodes.append((self._load_key(loading), self._load_part(loading, self.vmstate)))
        if len(nodes) != announced:
            loading.refuse(f"the tree ends after {len(nodes)} nodes, {announced} were announced")
        return nodes

    def _load_key(self, loading: Loading) -> Any:
        return loading.reader.read_be64() if self.key is None else self._load_part(loading, self.key)

    def _load_part(self, loading: Loading, vmstate: VMState) -> Any:
        record = vmstate.record()
        vmstate.read(loading, record, self.version)
        return record


def _repeatable(state: Description) -> Description:
    return {RepeatedKey(key): value for key, value in state.items()}
