"""The frame of the stream: header, configuration, section headers and footers, description (stream.md §2 to §8).

    stream  = "QEVM" be32 3  configuration  element*  EOF  vmdescription
    section = START or FULL   be32 section_id  idstr  be32 instance_id  be32 version_id   payload  footer
            | PART or END     be32 section_id                                             payload  footer
    footer  = 0x7e  be32 section_id

Nothing here has a length: a payload ends where its loader stops reading, and the footer tells whether that was right.
`encode_…` gives the bytes a sender writes; `read_…` takes them apart and refuses with StreamError.

Section ids are private to the sender.  `SectionTable` binds them to entries of this machine as START and FULL are
seen; PART, END and footers are then checked against that binding.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Generic, NoReturn, TypeVar
from uuid import UUID

from ..errors import StreamError
from ..options import CAPABILITIES
from ..wire.format import (
    QEMU_VM_FILE_MAGIC,
    QEMU_VM_FILE_VERSION,
    QEMU_VM_FILE_VERSION_COMPAT,
    TARGET_PAGE_BITS,
    SectionType,
)
from . import remedies
from .fields import Field, buffer, capability, uint8, uint32
from .kinds import Count, Description
from .reader import Reader, counted_string, read_counted_string
from .vmstate import Subsection, Value, VMState, plain_subsection

VALIDATED_CAPABILITIES = ("x-ignore-shared", "mapped-ram")
"""The capabilities that the two ends compare; the second exists since 9.0."""

_REMOVED_CAPABILITIES = {"compress", "block"}  # in QEMU until 9.0
_KNOWN_CAPABILITIES = {one.name for one in CAPABILITIES} | _REMOVED_CAPABILITIES

CONFIGURATION_OFFSET = 8
"""Bytes before the configuration: the file header."""

_MAX_MACHINE_TYPE = 256  # bytes
_MAX_CAPABILITIES = 64


# -- file header (stream.md §2)


def encode_file_header() -> bytes:
    """Magic and version."""
    return struct.pack(">II", QEMU_VM_FILE_MAGIC, QEMU_VM_FILE_VERSION)


def read_file_header(reader: Reader) -> None:
    """Read magic and version; StreamError unless both are the ones of this format."""
    offset = reader.offset
    magic = reader.read_be32("the file header")
    if magic != QEMU_VM_FILE_MAGIC:
        found = f"magic {magic:#010x} found, expected {QEMU_VM_FILE_MAGIC:#010x} (QEVM)"
        _refuse("file header", offset, found, remedies.for_magic(magic))
    version = reader.read_be32("the file header")
    if version == QEMU_VM_FILE_VERSION_COMPAT:
        _refuse("file header", offset + 4, f"version {version} is obsolete, expected {QEMU_VM_FILE_VERSION}")
    if version != QEMU_VM_FILE_VERSION:
        _refuse("file header", offset + 4, f"version {version} found, expected {QEMU_VM_FILE_VERSION}")


def _refuse(what: str, offset: int, finding: str, remedy: object = "") -> NoReturn:
    """Raise StreamError about *what*, which stands at *offset*."""
    raise StreamError(f"{what} at offset {offset:#x}: {finding}", offset=offset, section="configuration", remedy=remedy)


# -- configuration (stream.md §4)


@dataclass
class CapabilityList:
    """The validated capabilities that are on."""

    capabilities: list[str] = field(default_factory=list)
    caps_count: int = 0


@dataclass
class Configuration:
    """What both ends must agree on before anything else; None: the subsection is absent."""

    name: bytes = b""  # the machine type
    length: int = 0
    target_page_bits: int | None = None
    capabilities: CapabilityList | None = None
    uuid: bytes | None = None  # 16 bytes

    @classmethod
    def of(cls, machine_type: str, *, capabilities: Iterable[str] = (), uuid: bytes | None = None) -> Configuration:
        """What a sender announces: of *capabilities* (all that are on) only the validated ones; *uuid* when it is
        to be validated."""
        name = machine_type.encode()
        given = set(capabilities)
        on = [one for one in VALIDATED_CAPABILITIES if one in given]
        announced = CapabilityList(on, len(on)) if on else None
        return cls(name, len(name), capabilities=announced, uuid=uuid)

    @property
    def machine_type(self) -> str:
        return self.name.decode(errors="backslashreplace")

    @property
    def enabled_capabilities(self) -> list[str]:
        """The names announced; empty without the subsection."""
        return self.capabilities.capabilities if self.capabilities else []


def _uuid_data(name: str, attr: str) -> Field:
    return uint8(name, attr, count=16)


def _to_bytes(record: Value, version_id: int) -> None:
    record.value = bytes(record.value)


CONFIGURATION = VMState(
    "configuration",
    1,
    (uint32("len", "length"), buffer("name", Count("length", _MAX_MACHINE_TYPE))),
    minimum_version_id=0,
    subsections=(
        plain_subsection("target_page_bits", "configuration/target-page-bits", uint32, "target_page_bits"),
        Subsection(
            "capabilities",
            VMState(
                "configuration/capabilities",
                1,
                (
                    uint32("caps_count"),
                    capability("capabilities", count=Count("caps_count", _MAX_CAPABILITIES)),
                ),
                record=CapabilityList,
            ),
        ),
        plain_subsection("uuid", "configuration/uuid", _uuid_data, "uuid.data", post_load=_to_bytes),
    ),
    record=Configuration,
)


def encode_configuration(configuration: Configuration) -> tuple[bytes, Description]:
    """The configuration section with its marker, and how the VM description tells of it."""
    data, description = CONFIGURATION.save(configuration)
    return bytes([SectionType.QEMU_VM_CONFIGURATION]) + data, description


def read_configuration(reader: Reader) -> Configuration:
    """Read marker and configuration, without judging it; StreamError when the section is missing or malformed."""
    offset = reader.offset
    marker = reader.read_u8("the configuration marker")
    if marker != SectionType.QEMU_VM_CONFIGURATION:
        found = f"{marker:#04x} found, expected its marker ({SectionType.QEMU_VM_CONFIGURATION:#04x})"
        remedy = remedies.for_property("send-configuration", on_here=True)
        _refuse("configuration", offset, found, remedy if marker in _WITH_IDENTITY else "")
    record: Configuration = CONFIGURATION.load(reader, 0, section="configuration")
    return record


def check_configuration(
    received: Configuration,
    *,
    machine_type: str,
    capabilities: Iterable[str] = (),
    uuid: bytes | None = None,
    offset: int = CONFIGURATION_OFFSET,
) -> None:
    """Compare *received* with this side: its machine type, the capabilities that are on, its UUID (None: it has none).

    Raises StreamError for the first difference that matters; *offset* is where the configuration began, for the message.
    A UUID that this side cannot compare is accepted.
    """
    difference = _difference(received, machine_type, frozenset(capabilities), uuid)
    if difference is not None:
        _refuse("configuration", offset, *difference)


Difference = tuple[str, object]  # what is not the same, and what would help


def _difference(
    received: Configuration, machine_type: str, capabilities: frozenset[str], uuid: bytes | None
) -> Difference | None:
    if received.name != machine_type.encode():
        found = f"machine type {received.machine_type!r} received, this machine is {machine_type!r}"
        return found, remedies.for_machine_type(received.machine_type, machine_type)
    if received.target_page_bits not in (None, TARGET_PAGE_BITS):
        return f"target page bits {received.target_page_bits} received, this machine has {TARGET_PAGE_BITS}", ""
    if received.uuid is not None and uuid is not None and received.uuid != uuid:
        there, here = UUID(bytes=received.uuid), UUID(bytes=uuid)
        return f"UUID {there} received, this machine has {here}", remedies.for_uuid(str(there))
    return _difference_in_capabilities(received.enabled_capabilities, capabilities)


def _difference_in_capabilities(received: Sequence[str], local: frozenset[str]) -> Difference | None:
    for name in received:
        if name not in _KNOWN_CAPABILITIES:
            return f"unknown capability {name!r} received", remedies.for_capability(name, on_here=False)
    for name in VALIDATED_CAPABILITIES:
        if (name in received) != (name in local):
            there, here = ("on", "off") if name in received else ("off", "on")
            found = f"capability {name!r} is {there} at the source and {here} here, expected the same"
            return found, remedies.for_capability(name, on_here=name in local)
    return None


# -- section headers and footers (stream.md §3)


@dataclass(frozen=True)
class SectionHeader:
    """How a section begins.  PART and END carry no identity: *idstr* is empty there."""

    type: SectionType
    section_id: int
    idstr: str = ""
    instance_id: int = 0
    version_id: int = 0


_WITH_IDENTITY = (SectionType.QEMU_VM_SECTION_START, SectionType.QEMU_VM_SECTION_FULL)
_CONTINUATIONS = (SectionType.QEMU_VM_SECTION_PART, SectionType.QEMU_VM_SECTION_END)


def encode_section_header(header: SectionHeader) -> bytes:
    """The bytes before a payload."""
    data = struct.pack(">BI", header.type, header.section_id)
    if header.type in _CONTINUATIONS:
        return data
    return data + counted_string(header.idstr) + struct.pack(">II", header.instance_id, header.version_id)


def read_section_header(reader: Reader, section_type: int) -> SectionHeader:
    """What follows the type byte of START, PART, END and FULL."""
    kind = SectionType(section_type)
    section_id = reader.read_be32("a section header")
    if kind in _CONTINUATIONS:
        return SectionHeader(kind, section_id)
    offset = reader.offset
    idstr = read_counted_string(reader, "the name of a section")
    if not idstr:
        raise StreamError(f"section header at offset {offset:#x} has an empty name", offset=offset)
    instance_id = reader.read_be32(f"the header of section {idstr!r}")
    version_id = reader.read_be32(f"the header of section {idstr!r}")
    return SectionHeader(kind, section_id, idstr, instance_id, version_id)


def encode_section_footer(section_id: int) -> bytes:
    """The bytes after a payload."""
    return struct.pack(">BI", SectionType.QEMU_VM_SECTION_FOOTER, section_id)


def read_section_footer(reader: Reader, section_id: int, idstr: str, *, is_certain_end: bool = False) -> None:
    """Read the footer of the section *idstr*; StreamError unless it carries the id of its header.

    A footer that is not there means that the payload was longer or shorter than its loader believed; or, when the
    payload tells its own end (*is_certain_end*), that the source writes none.
    """
    offset = reader.offset
    marker = reader.read_u8(f"the footer of section {idstr!r}")
    if marker != SectionType.QEMU_VM_SECTION_FOOTER:
        raise StreamError(
            f"section {idstr!r} at offset {offset:#x}: {marker:#04x} found, "
            f"expected its footer ({SectionType.QEMU_VM_SECTION_FOOTER:#04x})",
            offset=offset,
            section=idstr,
            remedy=remedies.for_property("send-section-footer", on_here=True) if is_certain_end else "",
        )
    found = reader.read_be32(f"the footer of section {idstr!r}")
    if found != section_id:
        raise StreamError(
            f"section {idstr!r}: footer at offset {offset:#x} has id {found}, expected {section_id}",
            offset=offset,
            section=idstr,
        )


# -- end and description (stream.md §8)


def encode_vmdescription(text: bytes) -> bytes:
    """The description behind EOF."""
    return struct.pack(">BI", SectionType.QEMU_VM_VMDESCRIPTION, len(text)) + text


def skip_vmdescription(reader: Reader, limit: int = 64 << 20) -> bytes | None:
    """Read the description behind EOF and return it; None when something else is there, which is no error.

    A receiver reads it lest the sender meets a closed connection; nobody looks into it.  A description of more
    than *limit* bytes is refused.
    """
    if reader.peek(1) != bytes([SectionType.QEMU_VM_VMDESCRIPTION]):
        return None
    offset = reader.offset
    reader.read(1)
    length = reader.read_be32("the VM description")
    if length > limit:
        raise StreamError(
            f"VM description at offset {offset:#x} is {length} bytes long, expected at most {limit}", offset=offset
        )
    parts = []
    while length > 0:
        parts.append(reader.read(min(length, 1 << 20), "the VM description"))
        length -= len(parts[-1])
    return b"".join(parts)


# -- which entry of this machine is meant (stream.md §3.3)

Owner = TypeVar("Owner")


@dataclass(frozen=True)
class SectionEntry(Generic[Owner]):
    """Something of this machine that takes sections of one identity; *owner* is what the caller gets back.

    *compat_idstr* and *compat_instance_id*: an older identity under which the same state may arrive.
    """

    idstr: str
    instance_id: int
    version_id: int
    owner: Owner
    minimum_version_id: int
    compat_idstr: str | None = None
    compat_instance_id: int = 0

    def matches(self, header: SectionHeader) -> bool:
        """True when a section with that header is meant for this entry."""
        identity = header.idstr, header.instance_id
        return identity in ((self.idstr, self.instance_id), (self.compat_idstr, self.compat_instance_id))


@dataclass(frozen=True)
class BoundSection(Generic[Owner]):
    """A section id of the sender, the entry it stands for, and the version of its START or FULL."""

    section_id: int
    version_id: int
    entry: SectionEntry[Owner]


class SectionTable(Generic[Owner]):
    """The entries of this machine, and the ids that the sender has used for them.

    One table lives as long as the migration: after a recovery the bindings of the first connection still hold.
    """

    def __init__(self, entries: Iterable[SectionEntry[Owner]]) -> None:
        self._entries = list(entries)
        self._bound: dict[int, BoundSection[Owner]] = {}

    def bind(self, header: SectionHeader, offset: int | None = None) -> BoundSection[Owner]:
        """The entry that a START or FULL header means, from now on also known by the header's id.

        The same section may come more than once.  Raises StreamError when no name, instance or version fits;
        *offset* is where the header began, for the message.
        """
        entry = next((one for one in self._entries if one.matches(header)), None)
        if entry is None:
            remedy = remedies.for_section(header.idstr, header.instance_id)
            self._refuse(self._unknown(header), header, offset, remedy)
        oldest, newest = entry.minimum_version_id, entry.version_id
        if not oldest <= header.version_id <= newest:
            finding = f"version {header.version_id} received, this machine takes {oldest} to {newest}"
            self._refuse(finding, header, offset, remedies.for_version(header.version_id, newest))
        bound = BoundSection(header.section_id, header.version_id, entry)
        self._bound[header.section_id] = bound
        return bound

    def lookup(self, section_id: int, offset: int | None = None) -> BoundSection[Owner]:
        """What a PART or END section continues; StreamError when its id was never started."""
        bound = self._bound.get(section_id)
        if bound is None:
            known = ", ".join(str(one) for one in sorted(self._bound)) or "none"
            place = f"section id {section_id}" + ("" if offset is None else f" at offset {offset:#x}")
            raise StreamError(f"{place} was never started, ids so far: {known}", offset=offset)
        return bound

    def _unknown(self, header: SectionHeader) -> str:
        here = sorted(one.instance_id for one in self._entries if one.idstr == header.idstr)
        if not here:
            return f"this machine has no section of that name, it has {_in_words(self._names())}"
        numbers = _in_words([str(one) for one in here])
        return f"this machine has {header.idstr} instance{'s' if len(here) > 1 else ''} {numbers}"

    def _names(self) -> list[str]:
        return list(dict.fromkeys(repr(one.idstr) for one in self._entries))

    def _refuse(self, finding: str, header: SectionHeader, offset: int | None, remedy: object) -> NoReturn:
        place = f"section {header.idstr!r} instance {header.instance_id}"
        place += "" if offset is None else f" at offset {offset:#x}"
        raise StreamError(f"{place}: {finding}", offset=offset, section=header.idstr, remedy=remedy)


def _in_words(several: Sequence[str]) -> str:
    *others, last = several or ("nothing",)
    return f"{', '.join(others)} and {last}" if others else last
