"""A multifd channel of a recording: its init packet and its data packets (multifd.md §2 to §4)."""

from __future__ import annotations

import struct
from collections.abc import Callable

from ...errors import StreamError
from .model import Block, Packets, Stream
from .recording import MappedReader

MAGIC = 0x11223344
VERSION = 1
_SYNC = 0x01
_COMPRESSION = {0x00: "none", 0x02: "zlib", 0x04: "zstd", 0x08: "qpl", 0x10: "uadk", 0x20: "qatzip"}
_COMPRESSION_MASK = 0x3E
_INIT = struct.Struct(">II16sB39x")
_HEAD = struct.Struct(">IIIIIIQII24x256s")
_PACKET_BYTES = 524288  # of pages, at most, in one packet


def read_channel(reader: MappedReader, stream: Stream, look_round: Callable[[int], None]) -> None:
    """Count what the channel carries, block by block, into *stream*; the pages themselves are not looked at."""
    place = reader.offset
    magic, version, uuid, channel_id = _INIT.unpack(reader.read(_INIT.size, "the init packet"))
    _check_start(place, magic, version)
    packets = stream.packets = Packets(channel_id, uuid)
    while reader.remaining:
        _read_packet(reader, stream, packets)
        look_round(reader.offset)
    stream.end = reader.offset


def _check_start(place: int, magic: int, version: int) -> None:
    if (magic, version) != (MAGIC, VERSION):
        raise StreamError(
            f"multifd packet at {place:#x}: magic {magic:#010x} version {version} found, "
            f"expected {MAGIC:#010x} version {VERSION}",
            offset=place,
        )


def _read_packet(reader: MappedReader, stream: Stream, packets: Packets) -> None:
    place = reader.offset
    slots = _PACKET_BYTES // stream.page_size
    head = reader.read(_HEAD.size, "the header of a multifd packet")
    reader.read(8 * slots, "the header of a multifd packet")
    magic, version, flags, allocated, normal, size, _, zero, _, name = _HEAD.unpack(head)
    _check_start(place, magic, version)
    if allocated > slots or normal > allocated or zero > allocated - normal:
        raise StreamError(
            f"multifd packet at {place:#x}: {normal} normal and {zero} zero pages in {allocated} slots, "
            f"expected at most {slots} pages in as many slots",
            offset=place,
        )
    packets.packets += 1
    packets.syncs += flags & _SYNC
    if normal + zero == 0:
        return
    method = _COMPRESSION.get(flags & _COMPRESSION_MASK, f"{flags & _COMPRESSION_MASK:#x}")
    packets.compression = method
    length = size if flags & _COMPRESSION_MASK else normal * stream.page_size
    reader.read(length, "the pages of a multifd packet")
    packets.data_bytes += length
    _count(stream, name.partition(b"\0")[0].decode(errors="backslashreplace"), normal, zero)


def _count(stream: Stream, name: str, normal: int, zero: int) -> None:
    block = stream.block(name)
    if block is None:
        block = Block(name, -1, counts={"zero": 0, "normal": 0, "xbzrle": 0, "compressed": 0})
        stream.blocks.append(block)
    block.counts["normal"] += normal
    block.counts["zero"] += zero
