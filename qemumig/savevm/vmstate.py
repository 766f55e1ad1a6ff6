"""VMState: a description of device state, and the engine that writes and reads it (vmstate.md).

In    a record (a plain dataclass) → save → its bytes and their JSON description
      bytes of a peer → load → a record

    state = field*  subsection*                                          nothing names, types or measures a field
    subsection = 0x05  u8 length  name  be32 version  state              present or not; found by looking ahead

A description is data: a `VMState` holds fields (`fields.py`) and subsections, both in wire order.  Records are
dataclasses whose defaults are the reset values of the device; a subsection is an optional attribute of its parent's
record, None when it is absent.  A load always fills a fresh record, so nothing has happened when it fails.

The JSON description is written as QEMU 10.0 writes it: the last element of an array that is listed one by one has no
`index`, and null pointers are listed as `nullptr`.  Receivers ignore it; tools live on it.

Holds (1) load(save(record)) == record
      (2) the description accounts for every byte that was written
      (3) no byte of a peer is used as a count before it was compared with a limit
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import MachineError, StreamError
from ..wire.format import SectionType
from . import remedies
from .fields import Field, ordinal_names
from .kinds import Description, get_member, set_member
from .packed import PackedFields, steps_of
from .place import Loading, Saving
from .reader import Reader, counted_string

_SUBSECTION = int(SectionType.QEMU_VM_SUBSECTION)

Hook = Callable[[Any], None]


@dataclass
class Value:
    """The record of a subsection that is a plain value in its parent's record."""

    value: Any = None


@dataclass(frozen=True, eq=False)
class VMState:
    """What one piece of state looks like on the wire, and which record holds it.

    The hooks run in the order of vmstate.md §6.  A hook that does not like what it sees raises ValueError saying
    what it found and what it expected; a load turns that into a StreamError that names the place.
    """

    name: str
    version_id: int
    fields: Sequence[Field]
    minimum_version_id: int | None = None  # oldest version accepted; None: only version_id
    subsections: Sequence[Subsection] = ()
    needed: Callable[[Any], bool] | None = None  # False: the section, or subsection, is not written
    pre_save: Hook | None = None
    post_save: Hook | None = None  # also after a field that could not be saved
    pre_load: Hook | None = None
    post_load: Callable[[Any, int], None] | None = None  # with the version that was read
    record: Callable[[], Any] = Value
    unmigratable: bool = False  # blocks every migration, in both directions
    steps: tuple[PackedFields | tuple[Field, str], ...] = field(init=False)  # the fields with their names on the wire

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", tuple(steps_of(self, ordinal_names(self.fields))))

    @property
    def oldest_version(self) -> int:
        return self.version_id if self.minimum_version_id is None else self.minimum_version_id

    def accepts(self, version_id: int) -> bool:
        """True when state of that version can be read."""
        return self.oldest_version <= version_id <= self.version_id

    def is_needed(self, record: Any) -> bool:
        """True when *record* has to be sent at all."""
        return self.needed is None or self.needed(record)

    def save(self, record: Any, *, section: str = "", instance_id: int = 0) -> tuple[bytes, Description]:
        """The bytes of *record* and their JSON description; *section* and *instance_id* are for messages.

        Raises ValueError when the record holds what its field cannot, MachineError for unmigratable state.
        """
        if self.unmigratable:
            raise MachineError(f"State blocked by non-migratable device '{section or self.name}'")
        saving = Saving(section or self.name, instance_id)
        description = self.write(saving, record)
        return bytes(saving.out), description

    def load(
        self,
        reader: Reader,
        version_id: int,
        *,
        section: str = "",
        instance_id: int = 0,
        record: Any = None,
    ) -> Any:
        """Read state of *version_id* into a fresh record and return it.

        *record* is the fresh record to fill when the local machine sets something that must agree with the
        peer (null pointers, local counts, values that must be equal); its values count as local ones.
        Raises StreamError, naming section, instance, field and offset, for everything that is refused.
        """
        loading = Loading(reader, section or self.name, instance_id)
        if self.unmigratable:
            loading.refuse("this state cannot be migrated")
        self.check_version(loading, version_id)
        record = self.record() if record is None else record
        try:
            self.read(loading, record, version_id)
        except StreamError as error:
            if error.section:
                raise
            raise StreamError(f"{loading}: {error}", offset=error.offset, section=loading.section) from error
        return record

    def check_version(self, loading: Loading, version_id: int) -> None:
        """Refuse a version outside of what can be read."""
        if not self.accepts(version_id):
            loading.refuse(f"{self.name!r} has version {version_id}, expected {self.oldest_version} to {self.version_id}")

    # -- the walk: also entered by the fields that nest a state

    def write(self, saving: Saving, record: Any, version_id: int | None = None) -> Description:
        """Append *record* to what is saved, as of *version_id* (default: the newest); return its description."""
        version_id = self.version_id if version_id is None else version_id
        if self.pre_save:
            self.pre_save(record)
        try:
            description = {
                "vmsd_name": self.name,
                "version": version_id,
                "fields": self._write_fields(saving, record, version_id),
            }
            subsections = self._write_subsections(saving, record)
        finally:
            if self.post_save:
                self.post_save(record)
        if subsections:
            description["subsections"] = subsections
        return description

    def _write_fields(self, saving: Saving, record: Any, version_id: int) -> list[Description]:
        descriptions: list[Description] = []
        for step in self.steps:
            if isinstance(step, PackedFields):
                descriptions += step.save(saving, record)
            elif step[0].takes_part(record, version_id):
                descriptions += step[0].save(saving, record, step[1])
        return descriptions

    def _write_subsections(self, saving: Saving, record: Any) -> list[Description]:
        descriptions = []
        for subsection in self.subsections:
            inner = subsection.record_of(record)
            if inner is None or not subsection.vmstate.is_needed(inner):
                continue
            name = counted_string(subsection.vmstate.name)
            saving.out += bytes([_SUBSECTION]) + name + struct.pack(">I", subsection.vmstate.version_id)
            descriptions.append(subsection.vmstate.write(saving, inner))
        return descriptions

    def read(self, loading: Loading, record: Any, version_id: int) -> None:
        """Fill *record* from the stream; the version was checked before."""
        self._run_hook(loading, self.pre_load, record)
        for step in self.steps:
            if isinstance(step, PackedFields):
                step.load(loading, record)
            elif step[0].takes_part(record, version_id):
                step[0].load(loading, record)
        self._read_subsections(loading, record)
        self._run_hook(loading, self.post_load, record, version_id)

    def _run_hook(self, loading: Loading, hook: Callable[..., None] | None, *arguments: Any) -> None:
        if hook is None:
            return
        try:
            hook(*arguments)
        except ValueError as error:
            loading.refuse(str(error))

    def _read_subsections(self, loading: Loading, record: Any) -> None:
        """Read the subsections that are there; the attributes of all others become None."""
        local = {one.attr: one.record_of(record) for one in self.subsections}
        for attr in local:
            set_member(record, attr, None)
        while name := self._peek_subsection_name(loading.reader):
            subsection = next((one for one in self.subsections if one.vmstate.name.encode() == name), None)
            if subsection is None:
                text = name.decode(errors="backslashreplace")
                loading.refuse(f"unknown subsection {text!r} of {self.name!r}", remedy=remedies.for_subsection(text))
            loading.reader.read(2 + len(name))
            subsection.load(loading, record, local[subsection.attr])

    def _peek_subsection_name(self, reader: Reader) -> bytes:
        """The name of the subsection of this state that comes next; empty when none does.

        A byte 0x05 that is not followed by a name of ours belongs to an outer structure, or to the next element
        of an array: it is left alone, without an error.
        """
        head = reader.peek(2)
        if len(head) < 2 or head[0] != _SUBSECTION or head[1] <= len(self.name.encode()):
            return b""
        name = reader.peek(2 + head[1])[2:]
        return name if len(name) == head[1] and name.startswith(self.name.encode()) else b""


@dataclass(frozen=True)
class Subsection:
    """A state inside another one that is there or not: attribute *attr* of the parent's record, None for absent."""

    attr: str
    vmstate: VMState

    @property
    def is_plain(self) -> bool:
        """True when the attribute is a plain value and no record of its own."""
        return self.vmstate.record is Value

    def record_of(self, parent: Any) -> Any:
        """The record to save, or None."""
        value = get_member(parent, self.attr)
        return Value(value) if self.is_plain and value is not None else value

    def load(self, loading: Loading, parent: Any, local: Any) -> None:
        """Read version and state into *parent*; marker and name are read already.  A repeated one is read again.

        *local*: the record of the local machine, or None.
        """
        vmstate = self.vmstate
        loading.path.append((f"<{vmstate.name}>", None))
        version_id = loading.reader.read_be32("the version of a subsection")
        vmstate.check_version(loading, version_id)
        record = vmstate.record() if local is None else local
        vmstate.read(loading, record, version_id)
        set_member(parent, self.attr, record.value if self.is_plain else record)
        loading.path.pop()


def plain_subsection(attr: str, name: str, make: Callable[..., Field], field_name: str, **options: Any) -> Subsection:
    """A subsection of version 1 with a single field, whose value is the attribute *attr* of the parent.

    *make* is a constructor of `fields` (uint32, …); *options* go to the VMState.
    """
    return Subsection(attr, VMState(name, 1, (make(field_name, "value"),), **options))


def when_nonzero(record: Value) -> bool:
    """A `needed` for plain values: QEMU sends them only when they are not zero."""
    return bool(record.value)
