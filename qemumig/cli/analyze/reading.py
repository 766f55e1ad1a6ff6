"""One walk over a recording, from its first byte to its last, or to where it stops making sense.

    header ─▶ configuration ─▶ elements ─▶ EOF ─▶ VM description             a migration stream
                               elements ─▶ EOF                               the second connection of a recovery
                               RAM records                                   a preempt channel
                               packets                                       a multifd channel

Live sections end where their own records say so.  Device sections have no length; where one ends is told, in this order, by
the VM description (found before the walk begins), by the layouts that this package knows, and by the nearest footer
that something sensible follows.

Holds (1) whatever the bytes are, the outcome is a Stream with its problems: no exception but OSError
      (2) no bytes are kept but those of device sections
"""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Callable
from typing import NoReturn

from ...errors import StreamError
from ...ram.scan import RamScan
from ...savevm import commands, sections, vmdesc
from ...savevm.vmdesc import DescribedField
from ...wire.format import QEMU_VM_FILE_MAGIC, TARGET_PAGE_SIZE, MigCommand, SectionType
from . import description, known, live, multifd
from .model import CommandElement, Problem, Section, Stream
from .ram import RamSection
from .recording import MappedReader, Recording

LookRound = Callable[[int, int | None], None]  # (bytes done, bytes in all or None)

_STARTING = (SectionType.QEMU_VM_SECTION_START, SectionType.QEMU_VM_SECTION_FULL)
_CONTINUING = (SectionType.QEMU_VM_SECTION_PART, SectionType.QEMU_VM_SECTION_END)
_FOOTER_LENGTH = 5
_HELD = 32 << 20  # bytes of the file that may stay in this process
_PAGE_HEADS = (0x002, 0x008)  # a page with the name of its block: how a preempt channel begins


def read_stream(recording: Recording, look_round: LookRound, *, start: int = 0, keep_pages: bool = False) -> Stream:
    """Take *recording* apart from offset *start* on; *keep_pages*: memory can be read from the result's scan.

    OSError when there is no room for the pages that deltas have changed.
    """
    return _Walk(recording, look_round, start, keep_pages).run()


class _Walk:
    def __init__(self, recording: Recording, look_round: LookRound, start: int, keep_pages: bool) -> None:
        self._reader = MappedReader(recording.data, min(start, recording.size), recording.size)
        self._recording = recording
        self._look_round = look_round
        self._size = recording.size
        self._stream = Stream(recording.name, recording.size, start)
        self._keep_pages = keep_pages
        self._descriptions: description.Descriptions | None = None
        self._bound: dict[int, Section] = {}  # by section id: its START or FULL
        self._ram: RamSection | None = None
        self._let_go_at = _HELD
        self._parts: dict[int, Section] = {}  # PARTs that the next one may be counted with

    def run(self) -> Stream:
        try:
            self._read()
        except StreamError as error:
            self._problem(error)
        if self._ram is not None:
            self._ram.collect()
        if self._stream.scan is not None:
            for block in self._stream.blocks:
                block.counts = self._stream.scan.counts(block.index)
        return self._stream

    def _problem(self, error: StreamError) -> None:
        offset = self._reader.offset if error.offset is None else error.offset
        self._stream.problems.append(Problem(offset, str(error)))

    # -- what kind of recording it is

    def _read(self) -> None:
        reader = self._reader
        first = reader.peek(9)
        magic = int.from_bytes(first[:4], "big")
        if magic == multifd.MAGIC:
            self._stream.kind = "multifd channel"
            multifd.read_channel(reader, self._stream, self._progress)
        elif magic == QEMU_VM_FILE_MAGIC:
            self._read_from_header()
        elif first[:1] == bytes([SectionType.QEMU_VM_COMMAND]):
            self._stream.kind = "second connection of a postcopy recovery"
            self._begin_ram()
            self._read_elements(reader, packaged=False)
        elif len(first) == 9 and int.from_bytes(first[:8], "big") % TARGET_PAGE_SIZE in _PAGE_HEADS and first[8]:
            self._stream.kind = "preempt channel"
            self._begin_ram().read_channel(reader)
            self._stream.end = reader.offset
        else:
            sections.read_file_header(reader)

    def _read_from_header(self) -> None:
        reader, stream = self._reader, self._stream
        sections.read_file_header(reader)
        self._descriptions = description.find(reader.data, reader.offset, reader.end)
        if reader.peek(1) == bytes([SectionType.QEMU_VM_CONFIGURATION]):
            stream.configuration = sections.read_configuration(reader)
        else:
            stream.notes.append("there is no configuration section: the source had send-configuration=off")
        stream.page_size = self._page_size()
        self._begin_ram()
        if self._read_elements(reader, packaged=False):
            self._read_description()

    def _page_size(self) -> int:
        configuration = self._stream.configuration
        bits = configuration.target_page_bits if configuration else None
        if bits is not None:
            if not 10 <= bits <= 16:
                raise StreamError(f"configuration: {bits} target page bits, expected 10 to 16")
            return 1 << bits
        described = self._descriptions.page_size if self._descriptions else None
        return described or TARGET_PAGE_SIZE

    def _begin_ram(self) -> RamSection:
        scratch = tempfile.TemporaryFile(prefix="qemumig-analyze-") if self._keep_pages else None  # noqa: SIM115
        stream = self._stream
        stream.scratch = scratch
        fd = scratch.fileno() if scratch else -1
        stream.scan = RamScan(self._reader.data, stream.page_size, self._keep_pages, fd)
        self._ram = RamSection(stream, stream.scan, self._progress)
        return self._ram

    def _progress(self, offset: int) -> None:
        if offset >= self._let_go_at:
            self._let_go_at = offset + _HELD
            self._recording.let_go()
        self._look_round(offset, self._size)

    # -- elements

    def _read_elements(self, reader: MappedReader, packaged: bool) -> bool:
        """Read elements up to EOF, or to the end of a package; True when EOF came."""
        while reader.remaining or not packaged:
            place = reader.offset
            if not reader.remaining:
                raise StreamError(
                    f"stream ends at offset {place:#x}, expected a section, a command or the end mark", offset=place
                )
            kind = reader.read_u8()
            if kind == SectionType.QEMU_VM_EOF:
                self._stream.end = reader.offset
                return True
            if kind == SectionType.QEMU_VM_COMMAND:
                self._read_command(reader, place, packaged)
            elif kind in _STARTING or kind in _CONTINUING:
                self._read_section(reader, place, kind, packaged)
            else:
                raise StreamError(
                    f"section at offset {place:#x}: type {kind:#04x} found, expected a section (0x01 to 0x04), "
                    f"a command (0x08) or the end mark (0x00)",
                    offset=place,
                )
            self._progress(reader.offset)
        return False

    def _read_command(self, reader: MappedReader, place: int, packaged: bool) -> None:
        command = commands.read_command(reader)
        self._parts.clear()
        self._stream.elements.append(CommandElement(place, command, packaged))
        if isinstance(command, commands.PostcopyAdvise) and self._ram is not None:
            self._ram.advised = command.target_page_size is not None
        if isinstance(command, commands.Packaged):
            if command.length > reader.remaining:
                raise StreamError(
                    f"the package at offset {reader.offset:#x} has {command.length} bytes, "
                    f"{reader.remaining} are left of the file",
                    offset=reader.offset,
                )
            inner = MappedReader(reader.data, reader.offset, reader.offset + command.length)
            self._read_elements(inner, packaged=True)
            reader.seek(inner.offset)

    def _read_section(self, reader: MappedReader, place: int, kind: int, packaged: bool) -> None:
        header = sections.read_section_header(reader, kind)
        if kind in _STARTING:
            section = Section(
                *(header.type, header.section_id, header.idstr, header.instance_id, header.version_id),
                *(place, reader.offset),
                packaged=packaged,
            )
            self._bound[header.section_id] = section
            self._parts.clear()
            self._stream.elements.append(section)
        else:
            section = self._continue(reader, place, header, packaged)
        start = reader.offset
        try:
            self._read_payload(reader, section)
        finally:
            section.payload_length += reader.offset - start
        self._read_footer(reader, section)

    def _continue(self, reader: MappedReader, place: int, header: sections.SectionHeader, packaged: bool) -> Section:
        """The record of a PART or END; a PART is counted with the one before."""
        running = self._parts.get(header.section_id)
        if running is not None and header.type == SectionType.QEMU_VM_SECTION_PART:
            running.count += 1
            return running
        begun = self._bound.get(header.section_id)
        if begun is None and self._stream.blocks == [] and self._stream.kind != "migration stream":
            begun = Section(header.type, header.section_id, "ram", 0, 4, place, place)  # begun on the first connection
            self._bound[header.section_id] = begun
        if begun is None:
            known_ids = ", ".join(map(str, sorted(self._bound))) or "none"
            raise StreamError(
                f"section id {header.section_id} at offset {place:#x} was never started, ids so far: {known_ids}",
                offset=place,
            )
        section = Section(
            *(header.type, header.section_id, begun.idstr, begun.instance_id, begun.version_id),
            *(place, reader.offset),
            packaged=packaged,
        )
        if header.type == SectionType.QEMU_VM_SECTION_PART:
            self._parts[header.section_id] = section
        else:
            self._parts.clear()
        self._stream.elements.append(section)
        return section

    # -- payloads

    def _read_payload(self, reader: MappedReader, section: Section) -> None:
        if section.idstr == "ram" and self._ram is not None:
            self._ram.read_body(reader)
        elif section.idstr in live.BODIES:
            live.BODIES[section.idstr](reader)
        else:
            self._read_device(reader, section)

    def _read_device(self, reader: MappedReader, section: Section) -> None:
        start = reader.offset
        described = self._descriptions.take(*section.identity) if self._descriptions else None
        faults: list[StreamError] = []
        if described is not None:
            try:
                section.fields = self._split(reader, described, section)
                section.split_by = "description"
                return
            except StreamError as error:
                faults.append(error)
                self._problem(error)
        reader.seek(start)
        if not self._load_known(reader, section, faults):
            reader.seek(start)
            self._seek_footer(reader, section, faults)

    def _load_known(self, reader: MappedReader, section: Section, faults: list[StreamError]) -> bool:
        """Read a device whose layout this package knows; False when that does not work, with the reason in *faults*."""
        start = reader.offset
        try:
            fields = known.load(reader, *section.identity, section.version_id)
        except StreamError as error:
            faults.append(error)
            return False
        if fields is None:
            return False
        if not self._ends_here(reader, section):
            faults.append(self._no_footer(reader, section, start, "its known layout has"))
            return False
        section.fields, section.split_by = fields, "known layout"
        return True

    def _split(self, reader: MappedReader, described: dict[str, object], section: Section) -> list[DescribedField]:
        """The fields as described; StreamError, with offsets of the file, when no footer stands behind them."""
        start = reader.offset
        payload = reader.read(description.measure(described), f"section {section.idstr!r}, as the VM description has it,")
        if not self._ends_here(reader, section):
            raise self._no_footer(reader, section, start, "the VM description says")
        try:
            return vmdesc.split(described, payload)
        except StreamError as error:
            raise StreamError(str(error), offset=start + (error.offset or 0), section=section.idstr) from None

    def _no_footer(self, reader: MappedReader, section: Section, start: int, who: str) -> StreamError:
        """The payload from *start* on ends here, as *who* says, but no footer follows."""
        found = reader.peek(_FOOTER_LENGTH).hex(" ") or "the end of the recording"
        return StreamError(
            f"section {section.idstr!r} instance {section.instance_id} at offset {start:#x}: {found} found at "
            f"{reader.offset:#x}, expected the footer of id {section.section_id}: {who} {reader.offset - start} bytes",
            offset=reader.offset,
            section=section.idstr,
        )

    def _seek_footer(self, reader: MappedReader, section: Section, faults: list[StreamError]) -> None:
        """Go to the nearest footer of *section* that something sensible follows.

        StreamError when there is none: the first of the *faults* that were found before, if any.
        """
        at = self._find_footer(reader, section) if self._stream.footers is not False else None
        if at is not None:
            section.split_by = "footer"
            reader.seek(at)
        elif faults:
            self._raise_once(faults[0])
        else:
            why = (
                "sections have no footers here, so only the VM description could tell"
                if self._stream.footers is False
                else f"no footer of id {section.section_id} comes before the end at {reader.end:#x}"
            )
            raise StreamError(
                f"section {section.idstr!r} instance {section.instance_id} at offset {reader.offset:#x}: where it ends is "
                f"not described in the recording, and {why}",
                offset=reader.offset,
                section=section.idstr,
            )

    def _find_footer(self, reader: MappedReader, section: Section) -> int | None:
        marker = sections.encode_section_footer(section.section_id)
        limit = min(reader.end, reader.offset + description.MAX_STATE)
        at = reader.data.find(marker, reader.offset, limit)
        while at >= 0 and not self._is_element(reader, at + _FOOTER_LENGTH):
            at = reader.data.find(marker, at + 1, limit)
        return at if at >= 0 else None

    def _raise_once(self, fault: StreamError) -> NoReturn:
        """Give up because of *fault*, which may have been noted already."""
        self._stream.problems = [one for one in self._stream.problems if one.message != str(fault)]
        raise fault

    # -- footers

    def _ends_here(self, reader: MappedReader, section: Section) -> bool:
        """Whether *section* can end at the reader's place."""
        if self._stream.footers is False or (self._stream.footers is None and not self._has_footer(reader)):
            return self._is_element(reader, reader.offset)
        return reader.peek(_FOOTER_LENGTH) == sections.encode_section_footer(section.section_id)

    @staticmethod
    def _has_footer(reader: MappedReader) -> bool:
        return reader.peek(1) == bytes([SectionType.QEMU_VM_SECTION_FOOTER])

    def _read_footer(self, reader: MappedReader, section: Section) -> None:
        if self._stream.footers is None:  # the first section tells whether the source writes any
            self._stream.footers = self._has_footer(reader) or not self._is_element(reader, reader.offset)
            if not self._stream.footers:
                self._stream.notes.append("sections have no footers: the source had send-section-footer=off")
        if self._stream.footers:
            sections.read_section_footer(reader, section.section_id, section.idstr)

    def _is_element(self, reader: MappedReader, at: int) -> bool:
        """Whether what stands at *at* can be the next element, or the end."""
        data = reader.data[at : min(at + 16, reader.end)]
        if not data:
            return True
        if data[0] == SectionType.QEMU_VM_EOF:
            return len(data) == 1 or data[1] == SectionType.QEMU_VM_VMDESCRIPTION
        if data[0] == SectionType.QEMU_VM_COMMAND:
            return len(data) >= 5 and 0 < struct.unpack_from(">H", data, 1)[0] <= max(MigCommand)
        if data[0] in _CONTINUING:
            return len(data) >= 5 and struct.unpack_from(">I", data, 1)[0] in self._bound
        return data[0] in _STARTING and len(data) > 6 and data[5] > 0 and 0x20 < data[6] < 0x7F

    # -- the end

    def _read_description(self) -> None:
        reader, stream = self._reader, self._stream
        place = reader.offset
        text = sections.skip_vmdescription(reader)
        if text is None:
            if any(isinstance(one, CommandElement) and one.packaged for one in stream.elements):
                stream.notes.append("there is no VM description: postcopy sends none")
            else:
                stream.notes.append("there is no VM description behind the end mark")
        else:
            stream.description = place + 5, len(text)
            try:
                vmdesc.parse(text)
            except StreamError as error:
                raise StreamError(str(error), offset=place + 5) from None
        if reader.remaining:
            stream.notes.append(f"{reader.remaining} bytes follow the stream, from offset {reader.offset:#x} on")
        stream.end = reader.offset
