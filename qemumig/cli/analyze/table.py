"""An analysis as plain text, for people; it stays readable in a pipe and in a mail."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from .model import Block, CommandElement, Section, Stream
from .values import command_text, printable, shown, thousands

_KINDS = ("zero", "normal", "xbzrle", "compressed")
_SPLITTERS = {"known layout": "layout known", "footer": "fields not described"}


def lines(stream: Stream, *, fields: bool) -> Iterator[str]:
    """The whole report, line by line; with *fields* those of every section, too."""
    yield from _head(stream)
    if stream.blocks:
        yield ""
        yield from _blocks(stream)
    if stream.elements:
        yield ""
        yield from _elements(stream, fields)
    for note in stream.notes:
        yield f"note: {note}"
    yield from problem_lines(stream)


def title(name: str, stream: Stream) -> str:
    """What kind of file *name* is."""
    return f"{printable(name)}: {stream.kind}, {thousands(stream.size)} bytes"


def problem_lines(stream: Stream) -> Iterator[str]:
    """Where the recording does not make sense."""
    for problem in stream.problems:
        place = f"{problem.offset:#x}"
        told = re.search(rf"\b{place}\b", problem.message)
        yield f"problem{'' if told else f' at offset {place}'}: {printable(problem.message)}"


def grid(rows: Sequence[Sequence[str]], left: Sequence[int]) -> Iterator[str]:
    """Rows of cells as aligned columns; the columns *left* are flush left, all others flush right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()


def _head(stream: Stream) -> Iterator[str]:
    yield title(stream.name, stream)
    configuration = stream.configuration
    if configuration is not None:
        yield f"  machine       {printable(configuration.machine_type)}"
        if configuration.enabled_capabilities:
            yield f"  capabilities  {printable(', '.join(configuration.enabled_capabilities))}"
        if configuration.uuid is not None:
            yield f"  UUID          {configuration.uuid.hex()}"
    if stream.packets is not None:
        packets = stream.packets
        yield f"  channel       {packets.channel_id}, UUID {packets.uuid.hex()}"
        yield f"  packets       {thousands(packets.packets)}, of them {thousands(packets.syncs)} with SYNC"
        yield f"  page data     {thousands(packets.data_bytes)} bytes, compression {packets.compression}"
    yield f"  page size     {stream.page_size}"
    if stream.flushes:
        yield f"  multifd       {thousands(stream.flushes)} MULTIFD_FLUSH records: the pages are on channels of their own"
    if stream.description is not None:
        offset, length = stream.description
        yield f"  description   {thousands(length)} bytes at {offset:#x}"


def _blocks(stream: Stream) -> Iterator[str]:
    extra = [one for one in ("host_page_size", "address", "pages_offset") if _any(stream.blocks, one)]
    titles = {"host_page_size": "host page", "address": "address", "pages_offset": "pages at"}
    rows = [["RAM block", "bytes", *_KINDS, *(titles[one] for one in extra)]]
    for block in stream.blocks:
        row = [printable(block.name), "?" if block.length is None else thousands(block.length)]
        row += [thousands(block.counts.get(kind, 0)) for kind in _KINDS]
        row += ["" if getattr(block, one) is None else f"{getattr(block, one):#x}" for one in extra]
        rows.append(row)
    yield from grid(rows, left=(0,))


def _any(blocks: list[Block], attribute: str) -> bool:
    return any(getattr(block, attribute) is not None for block in blocks)


def _elements(stream: Stream, fields: bool) -> Iterator[str]:
    for element in stream.elements:
        inside = "  in package" if element.packaged else ""
        if isinstance(element, CommandElement):
            yield f"{element.offset:#012x}  COMMAND  {command_text(element.command)}{inside}"
        else:
            yield f"{element.offset:#012x}  {_section_text(element)}{inside}"
            if fields:
                yield from _fields(element)


def _section_text(section: Section) -> str:
    kind = section.type.name.removeprefix("QEMU_VM_SECTION_").ljust(7)
    count = f" × {thousands(section.count)}" if section.count > 1 else ""
    how = f", {_SPLITTERS[section.split_by]}" if section.split_by in _SPLITTERS else ""
    return (
        f"{kind}  {printable(section.idstr)} instance {section.instance_id} version {section.version_id}, "
        f"id {section.section_id}: {thousands(section.payload_length)} bytes{count}{how}"
    )


def _fields(section: Section) -> Iterator[str]:
    if not section.fields:
        return
    width = min(48, max(len(one.path) for one in section.fields))
    for one in section.fields:
        yield f"    {printable(one.path):{width}}  {printable(one.type):8}  {shown(one)}"
