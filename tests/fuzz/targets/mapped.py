"""Files of mapped-ram: headers, bitmaps, the pages at their places (ram.md §10).

    input    choices · the file, folded

What was taken must be what the file has at the places that its headers name.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import closing

from qemumig.channels.address import FileAddress
from qemumig.channels.channel import QuitEvent
from qemumig.channels.file import open_incoming_file
from qemumig.options import MigrationOptions
from qemumig.ram.landing import Landing
from qemumig.ram.load import RamLoader
from qemumig.ram.mapped import HEADER, MappedLoader, PageFiles
from qemumig.wire.stream import InputStream
from tests.fuzz.folding import fold, taken_apart
from tests.fuzz.oracle import PAGE, TAKEN, Guarded, outcome_of
from tests.support.fuzz_ram import EOS

FILLED, MULTIFD, IGNORE_SHARED = 1, 2, 4  # bits of the choices
PAGES, ROM_PAGES, ROM_ROOM = 66, 2, 4
RAM, ROM = Guarded(PAGES), Guarded(ROM_ROOM)
MOST = 400 << 10
EVENT = QuitEvent()


def run(data: bytes) -> str:
    (choices,), contents = taken_apart(data, 1, MOST)
    filled = 0x5A if choices & FILLED else 0
    rom = ROM.block("rom", filled=filled, used_length=ROM_PAGES * PAGE, max_length=ROM_ROOM * PAGE, shared=True, named=True)
    landing = Landing([RAM.block("ram", filled=filled), rom], ignore_shared=bool(choices & IGNORE_SHARED))
    options = MigrationOptions()
    if choices & MULTIFD:
        options.set_capabilities([("mapped-ram", True), ("multifd", True)])
        options.set_parameters({"multifd-channels": 2})
    file = os.memfd_create("fuzz")
    try:
        os.write(file, contents)
        outcome = load(f"/proc/self/fd/{file}", landing, options)
    finally:
        os.close(file)
    RAM.check()
    ROM.check()
    if outcome == TAKEN:
        compare(contents, filled, choices)
    return outcome


def load(path: str, landing: Landing, options: MigrationOptions) -> str:
    with closing(open_incoming_file(FileAddress(path), EVENT.fd)) as channel:
        stream = InputStream(channel)
        with closing(PageFiles(channel, options, "dst/recv")) as files:
            loader = RamLoader(stream, landing)
            loader.load_pages = MappedLoader(stream, landing, files, lambda: None).load_block
            return outcome_of(loader.load_body)


def compare(contents: bytes, filled: int, choices: int) -> None:
    """Fault when memory is not what the file says."""
    memory = {name: bytearray([filled]) * guarded.size for name, guarded in (("ram", RAM), ("rom", ROM))}
    at = 0
    while (head := int.from_bytes(contents[at : at + 8], "big")) != EOS:
        at, left = at + 8, head & ~0xFFF
        while left:
            at, length = load_entry(contents, at, memory, choices)
            left -= length
    for guarded, (name, plain) in zip((RAM, ROM), memory.items(), strict=True):
        guarded.compare(plain, name)


def load_entry(contents: bytes, at: int, memory: dict[str, bytearray], choices: int) -> tuple[int, int]:
    """Take one block's entry at *at* as read; where the next thing is, and how long the block."""
    name = contents[at + 1 : at + 1 + contents[at]].decode()
    at += 1 + len(name)
    (length,) = struct.unpack_from(">Q", contents, at)
    at += 8 + (8 if choices & IGNORE_SHARED else 0)
    _, _, bitmap_offset, pages_offset = HEADER.unpack_from(contents, at)
    if not (choices & IGNORE_SHARED and name == "rom"):
        for page in range(length // PAGE):
            is_there = contents[bitmap_offset + page // 8] >> page % 8 & 1
            place = pages_offset + page * PAGE
            memory[name][page * PAGE : (page + 1) * PAGE] = contents[place : place + PAGE] if is_there else bytes(PAGE)
    return pages_offset + length, length


# ---- to begin with ----


def entry(data: bytearray, name: str, pages: int, bitmap: int, choices: int) -> None:
    """Add a block's entry and its pages to the file *data*."""
    data += bytes([len(name)]) + name.encode() + (pages * PAGE).to_bytes(8, "big")
    if choices & IGNORE_SHARED:
        data += bytes(8)
    here = len(data) + HEADER.size
    size = -(-pages // 64) * 8
    pages_offset = -(-(here + size) // PAGE) * PAGE
    data += HEADER.pack(1, PAGE, here, pages_offset) + bitmap.to_bytes(size, "little")
    data += bytes(pages_offset - len(data))
    for page in range(pages):
        data += bytes([page + 1 if bitmap >> page & 1 else 0]) * PAGE


def seeds() -> Iterator[bytes]:
    for choices in range(8):
        for bitmap in (0, 0b1011, (1 << PAGES) - 1, 1 << 65 | 1 << 63 | 2):
            for rom_pages in (ROM_PAGES, ROM_ROOM):
                data = bytearray(((PAGES + rom_pages) * PAGE | 0x4).to_bytes(8, "big"))
                entry(data, "ram", PAGES, bitmap, choices)
                entry(data, "rom", rom_pages, bitmap & (1 << rom_pages) - 1, choices)
                yield bytes([choices]) + fold(bytes(data) + EOS.to_bytes(8, "big"))
