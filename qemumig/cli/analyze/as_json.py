"""An analysis as one JSON object, for programs: nothing is shortened, offsets and lengths are numbers."""

from __future__ import annotations

import dataclasses
from typing import Any

from ...savevm.commands import Command
from ...savevm.vmdesc import DescribedField
from .model import Block, CommandElement, Section, Stream
from .values import is_number


def document(stream: Stream, *, fields: bool) -> dict[str, Any]:
    """The whole report; with *fields* those of every section, too."""
    return {
        "file": stream.name,
        "size": stream.size,
        "start": stream.start,
        "end": stream.end,
        "kind": stream.kind,
        "machine": stream.machine_type,
        "capabilities": stream.configuration.enabled_capabilities if stream.configuration else [],
        "uuid": stream.configuration.uuid.hex() if stream.configuration and stream.configuration.uuid else None,
        "page_size": stream.page_size,
        "footers": stream.footers,
        "multifd_flushes": stream.flushes,
        "description": dict(zip(("offset", "length"), stream.description, strict=True)) if stream.description else None,
        "multifd": _packets(stream),
        "blocks": [_block(one) for one in stream.blocks],
        "elements": [_element(one, fields) for one in stream.elements],
        "notes": stream.notes,
        "problems": [dataclasses.asdict(one) for one in stream.problems],
    }


def _packets(stream: Stream) -> dict[str, Any] | None:
    if stream.packets is None:
        return None
    return {**dataclasses.asdict(stream.packets), "uuid": stream.packets.uuid.hex()}


def _block(block: Block) -> dict[str, Any]:
    entry = {"name": block.name, "length": block.length, **block.counts}
    for attribute in ("host_page_size", "address", "pages_offset"):
        if (value := getattr(block, attribute)) is not None:
            entry[attribute] = value
    return entry


def _element(element: Section | CommandElement, fields: bool) -> dict[str, Any]:
    if isinstance(element, CommandElement):
        return _command(element)
    entry: dict[str, Any] = {
        "type": element.type.name.removeprefix("QEMU_VM_SECTION_").lower(),
        "offset": element.offset,
        "section_id": element.section_id,
        "idstr": element.idstr,
        "instance_id": element.instance_id,
        "version_id": element.version_id,
        "payload_offset": element.payload_offset,
        "payload_length": element.payload_length,
        "count": element.count,
        "packaged": element.packaged,
        "split_by": element.split_by,
    }
    if fields:
        entry["fields"] = [field_entry(one) for one in element.fields]
    return entry


def field_entry(field: DescribedField) -> dict[str, Any]:
    """A field with its bytes, and as a number when it is one."""
    entry: dict[str, Any] = {"path": field.path, "type": field.type, "hex": field.data.hex(), "offset": field.offset}
    if is_number(field):
        entry["value"] = field.value
    return entry


def _command(element: CommandElement) -> dict[str, Any]:
    command: Command = element.command
    return {
        "type": "command",
        "offset": element.offset,
        "command": command.type.name,
        "packaged": element.packaged,
        **dataclasses.asdict(command),
    }
