"""Bodies of the live sections other than `ram`: disk contents and dirty bitmaps (block.md §1.2, §2.1).

Both are lists of chunks that end with a chunk EOS.  Only the way through them is needed here.
"""

from __future__ import annotations

from ...errors import StreamError
from ...savevm.reader import read_counted_string
from .recording import MappedReader

_CHUNK = 1 << 20
_DEVICE_BLOCK, _BLOCK_EOS, _PROGRESS, _ZERO_BLOCK = 0x01, 0x02, 0x04, 0x08
_SECTOR_MASK = 0x1FF
_EOS, _ZEROES, _BITMAP_NAME, _DEVICE_NAME, _START, _COMPLETE, _BITS = (1 << bit for bit in range(7))
_MAX_BITS = 10240  # bytes of one chunk


def skip_block_body(reader: MappedReader) -> None:
    """Section `block`: sectors of disks, until 9.0."""
    flags = 0
    while not flags & _BLOCK_EOS:
        place = reader.offset
        flags = reader.read_be64("a chunk of section 'block'") & _SECTOR_MASK
        if flags & _DEVICE_BLOCK:
            read_counted_string(reader, "the device of a chunk of section 'block'")
            if not flags & _ZERO_BLOCK:
                reader.read(_CHUNK, "a chunk of section 'block'")
        elif not flags & (_PROGRESS | _BLOCK_EOS):
            raise StreamError(
                f"section 'block': chunk at {place:#x} has flags {flags:#x}, "
                f"expected DEVICE_BLOCK (0x1), EOS (0x2) or PROGRESS (0x4)",
                offset=place,
                section="block",
            )


def skip_bitmap_body(reader: MappedReader) -> None:
    """Section `dirty-bitmap`: which sectors of disks a backup has to copy."""
    what = "a chunk of section 'dirty-bitmap'"
    while True:
        place = reader.offset
        flags = reader.read_u8(what)
        if flags & _DEVICE_NAME:
            read_counted_string(reader, "the node of a chunk of section 'dirty-bitmap'")
        if flags & _BITMAP_NAME:
            read_counted_string(reader, "the bitmap of a chunk of section 'dirty-bitmap'")
        if flags & _EOS:
            return
        if flags & _START:
            reader.read(5, what)
        elif flags & _BITS:
            _skip_bits(reader, flags, place)
        elif not flags & _COMPLETE:
            raise StreamError(
                f"section 'dirty-bitmap': chunk at {place:#x} has flags {flags:#x}, "
                f"expected EOS (0x1), START (0x10), COMPLETE (0x20) or BITS (0x40)",
                offset=place,
                section="dirty-bitmap",
            )


def _skip_bits(reader: MappedReader, flags: int, place: int) -> None:
    reader.read(12, "the range of a chunk of section 'dirty-bitmap'")
    if flags & _ZEROES:
        return
    size = reader.read_be64("the length of a chunk of section 'dirty-bitmap'")
    if size > _MAX_BITS:
        raise StreamError(
            f"section 'dirty-bitmap': chunk at {place:#x} has {size} bytes of bits, expected at most {_MAX_BITS}",
            offset=place,
            section="dirty-bitmap",
        )
    reader.read(size, "the bits of a chunk of section 'dirty-bitmap'")


BODIES = {"block": skip_block_body, "dirty-bitmap": skip_bitmap_body}
