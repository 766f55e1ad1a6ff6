"""What an analysis has found: plain records that the table, the JSON and the comparison are made from.

Offsets are those of the file, lengths are in bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import IO

from ...ram.scan import RamScan
from ...ram.scan_pages import ScannedPages
from ...savevm.commands import Command
from ...savevm.sections import Configuration
from ...savevm.vmdesc import DescribedField
from ...wire.format import SectionType


@dataclass
class Block:
    """A RAM block and how many records came for it, by kind."""

    name: str
    index: int  # in the scan
    length: int | None = None  # None: the recording has no list of blocks
    host_page_size: int | None = None  # only told in postcopy, and when it is not the usual one
    address: int | None = None  # guest-physical; only told with x-ignore-shared
    pages_offset: int | None = None  # of a mapped-ram file
    counts: dict[str, int] = field(default_factory=dict)


@dataclass
class Section:
    """A section; PARTs that follow each other are one record with *count* > 1."""

    type: SectionType
    section_id: int
    idstr: str
    instance_id: int
    version_id: int
    offset: int
    payload_offset: int
    payload_length: int = 0
    count: int = 1
    packaged: bool = False  # inside a PACKAGED command
    fields: list[DescribedField] = field(default_factory=list)
    split_by: str = "records"  # how its end was found: "records", "description", "known layout", "footer"

    @property
    def identity(self) -> tuple[str, int]:
        return self.idstr, self.instance_id


@dataclass
class CommandElement:
    """A command of the source."""

    offset: int
    command: Command
    packaged: bool = False


@dataclass
class Packets:
    """What a multifd channel carries."""

    channel_id: int
    uuid: bytes
    packets: int = 0
    syncs: int = 0
    data_bytes: int = 0
    compression: str = "none"


@dataclass(frozen=True)
class Problem:
    """Where the recording does not make sense, and why."""

    offset: int
    message: str


@dataclass
class Stream:
    """A recording, taken apart as far as it makes sense."""

    name: str
    size: int
    start: int
    kind: str = "migration stream"
    configuration: Configuration | None = None
    page_size: int = 4096
    footers: bool | None = None  # None: no section has come
    blocks: list[Block] = field(default_factory=list)
    elements: list[Section | CommandElement] = field(default_factory=list)
    packets: Packets | None = None
    flushes: int = 0  # MULTIFD_FLUSH records
    description: tuple[int, int] | None = None  # offset and length of its text
    end: int | None = None  # where it ended, when it did
    notes: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    scan: RamScan | None = None
    scratch: IO[bytes] | None = None  # the pages that deltas have changed; lives as long as the scan

    @cached_property
    def pages(self) -> ScannedPages:
        """The memory in it; there is a scan."""
        assert self.scan is not None
        return ScannedPages(self.scan)

    @property
    def sections(self) -> list[Section]:
        return [one for one in self.elements if isinstance(one, Section)]

    @property
    def machine_type(self) -> str | None:
        return self.configuration.machine_type if self.configuration else None

    def block(self, name: str) -> Block | None:
        """The block of that name."""
        return next((one for one in self.blocks if one.name == name), None)
