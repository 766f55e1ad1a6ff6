"""The `ram` section of a recording: its block list, its records, and the pages of a mapped-ram file (ram.md §3, §10).

Which fields an entry of the list has is not marked in the stream.  `x-ignore-shared` and `mapped-ram` are announced in
the configuration.  A page size comes after POSTCOPY_ADVISE, for some blocks only: a be64 that is a page size can be
nothing else there, because a name is never empty and a record's head never has those bits alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

from ...errors import StreamError
from ...ram.scan import RamScan
from ...savevm.reader import read_counted_string
from .model import Block, Stream
from .recording import MappedReader

MAPPED_RAM_VERSION = 1
_MAX_PAGE_SIZE = 1 << 40


class RamSection:
    """What the RAM sections of one stream have in common."""

    def __init__(self, stream: Stream, scan: RamScan, look_round: Callable[[int], None]) -> None:
        self._stream = stream
        self._scan = scan
        self._look_round = look_round
        self.advised = False  # POSTCOPY_ADVISE has been seen
        capabilities = stream.configuration.enabled_capabilities if stream.configuration else []
        self._addresses = "x-ignore-shared" in capabilities
        self._mapped = "mapped-ram" in capabilities

    def read_body(self, reader: MappedReader) -> None:
        """Walk one body, up to and with its EOS."""
        while (stop := self._walk(reader)) == "list":
            self._read_block_list(reader)
        if stop == "end":
            raise StreamError(
                f"stream ends inside section 'ram' at offset {reader.offset:#x}, expected another record",
                offset=reader.offset,
                section="ram",
            )

    def read_channel(self, reader: MappedReader) -> None:
        """Walk the records of a preempt channel: no frame, and EOS only from old machine types."""
        while self._walk(reader) == "eos":
            pass

    def _walk(self, reader: MappedReader) -> str:
        try:
            return self._scan.walk_body(reader.offset, self._look_round)
        finally:
            reader.seek(min(self._scan.offset, reader.end))
            self.collect()

    def collect(self) -> None:
        """Bring the blocks of the stream up to date with what has been walked."""
        for index in range(len(self._stream.blocks), len(self._scan.names)):
            name = self._scan.names[index].decode(errors="backslashreplace")
            self._stream.blocks.append(Block(name, index))
        self._stream.flushes = self._scan.flushes

    def _read_block_list(self, reader: MappedReader) -> None:
        total = left = self._scan.list_total
        while left:
            place = reader.offset
            name = read_counted_string(reader, "the list of RAM blocks")
            length = reader.read_be64(f"the entry of RAM block {name!r}")
            if not name:
                self._refuse(place, "an entry of the list of blocks has an empty name, expected one")
            if length > left:
                self._refuse(
                    place, f"block {name!r} has {length:#x} bytes, only {left:#x} are left of the total of {total:#x}"
                )
            left -= length
            self._read_entry(reader, place, name, length)

    def _read_entry(self, reader: MappedReader, place: int, name: str, length: int) -> None:
        pages = -(-length // self._scan.page_size)
        block = Block(name, self._scan.add_block(name.encode(), pages), length)
        if self.advised and _is_page_size(reader.peek(8)):
            block.host_page_size = reader.read_be64(f"the page size of RAM block {name!r}")
        if self._addresses:
            block.address = reader.read_be64(f"the address of RAM block {name!r}")
        if self._mapped:
            self._read_mapped(reader, block, pages)
        known = self._stream.block(name)
        if known is None:
            self._stream.blocks.append(block)
        elif known.length != length:
            self._refuse(place, f"block {name!r} has {length:#x} bytes, the list before said {known.length}")

    def _read_mapped(self, reader: MappedReader, block: Block, pages: int) -> None:
        """The header of the block's pages, and the pages: they stand right there, before the next entry."""
        place = reader.offset
        what = f"the mapped-ram header of block {block.name!r}"
        version = reader.read_be32(what)
        page_size, bitmap_offset, pages_offset = (reader.read_be64(what) for _ in range(3))
        bitmap_end = reader.offset + (pages + 63) // 64 * 8
        if version != MAPPED_RAM_VERSION:
            self._refuse(place, f"{what} has version {version}, expected {MAPPED_RAM_VERSION}")
        if page_size != self._scan.page_size:
            self._refuse(place, f"{what} says pages of {page_size} bytes, expected {self._scan.page_size}")
        if bitmap_offset != reader.offset:
            self._refuse(place, f"{what} puts the bitmap at {bitmap_offset:#x}, expected {reader.offset:#x}, behind it")
        if pages_offset < bitmap_end or pages_offset % page_size:
            self._refuse(
                place,
                f"{what} puts the pages at {pages_offset:#x}, expected a multiple of {page_size:#x} "
                f"not below {bitmap_end:#x}, where the bitmap ends",
            )
        end = pages_offset + pages * page_size
        if end > reader.end:
            self._refuse(place, f"the pages of block {block.name!r} end at {end:#x}, the file at {reader.end:#x}")
        self._scan.map_block(block.index, bitmap_offset, pages_offset)
        block.pages_offset = pages_offset
        reader.seek(pages_offset + (block.length or 0))

    def _refuse(self, place: int, finding: str) -> NoReturn:
        raise StreamError(f"RAM section at {place:#x}: {finding}", offset=place, section="ram")


def _is_page_size(data: bytes) -> bool:
    value = int.from_bytes(data, "big")
    return len(data) == 8 and 4096 <= value <= _MAX_PAGE_SIZE and value & (value - 1) == 0
