"""An ELF file as a loader puts it into guest memory: its segments at their physical addresses, and where it begins.

Both classes, little endian, whatever kind of machine and of file the header names.  `entry` is physical as well: the
header has it as an address of the program's own, which the segment that holds it translates; one that no segment holds
is taken as it is.  Seen with QEMU 7.2, where a file that cannot be taken apart is no ELF file, but bytes like any others.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

MAGIC = b"\x7fELF"
LARGEST_IMAGE = 1 << 30  # bytes of all segments
_LITTLE_ENDIAN = 1
_PT_LOAD = 1


@dataclass(frozen=True)
class _Class:
    """The layout of one width: where the header has things, and its program headers."""

    header: struct.Struct  # entry, offset of the program headers; size and number of those
    segment: struct.Struct
    fields: tuple[str, ...]  # of `segment`


_CLASSES = {
    1: _Class(
        struct.Struct("<24x I I 10x H H 6x"),
        struct.Struct("<8I"),
        ("type", "offset", "virtual", "physical", "file_size", "size", "flags", "align"),
    ),
    2: _Class(
        struct.Struct("<24x Q Q 14x H H 6x"),
        struct.Struct("<2I6Q"),
        ("type", "flags", "offset", "virtual", "physical", "file_size", "size", "align"),
    ),
}


class ElfError(Exception):
    """The file is an ELF file, and not one to load."""


@dataclass(frozen=True)
class Segment:
    """*data*, with the zeroes that the file does not hold, goes to *address*."""

    address: int
    data: bytes


@dataclass(frozen=True)
class Elf:
    """What is to be in memory, and the physical address of the first instruction."""

    segments: list[Segment]
    entry: int


def take_apart(file: bytes) -> Elf | None:
    """The ELF file of these bytes; None when they are none, or not all of one.  ElfError for what no memory could take."""
    if not file.startswith(MAGIC) or len(file) < 6 or file[5] != _LITTLE_ENDIAN or file[4] not in _CLASSES:
        return None
    layout = _CLASSES[file[4]]
    if len(file) < layout.header.size:
        return None
    entry, table, size, number = layout.header.unpack_from(file)
    if size != layout.segment.size or table + size * number > len(file):
        return None
    found = [dict(zip(layout.fields, values, strict=True)) for values in _rows(layout, file, table, number)]
    loadable = [one for one in found if one["type"] == _PT_LOAD]
    if any(one["offset"] + one["file_size"] > len(file) for one in loadable):
        return None
    _check_sizes(loadable)
    return Elf([_segment(file, one) for one in loadable if one["size"]], _physical(entry, loadable))


def _rows(layout: _Class, file: bytes, table: int, number: int) -> list[tuple[int, ...]]:
    return [layout.segment.unpack_from(file, table + layout.segment.size * index) for index in range(number)]


def _check_sizes(loadable: list[dict[str, int]]) -> None:
    for index, one in enumerate(loadable):
        if one["file_size"] > one["size"]:
            what = f"{one['file_size']:#x} bytes in the file, {one['size']:#x} in memory"
            raise ElfError(f"ELF segment {index} at {one['physical']:#x} has {what}")
    total = sum(one["size"] for one in loadable)
    if total > LARGEST_IMAGE:
        raise ElfError(f"its ELF segments have {total:#x} bytes, at most {LARGEST_IMAGE:#x} are loaded")


def _segment(file: bytes, one: dict[str, int]) -> Segment:
    data = file[one["offset"] : one["offset"] + one["file_size"]]
    return Segment(one["physical"], data.ljust(one["size"], b"\0"))


def _physical(entry: int, loadable: list[dict[str, int]]) -> int:
    for one in loadable:
        if 0 <= entry - one["virtual"] < one["size"]:
            return one["physical"] + entry - one["virtual"]
    return entry
