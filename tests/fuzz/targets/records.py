"""Records of a section `ram` on the main channel: zero, whole, delta, compressed, and lists of blocks (ram.md §2–§4).

    input    choices · piece · records, folded

What was taken must be what the plain reader makes of the same records.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator

from qemumig.ram.landing import Landing
from qemumig.ram.load import RamLoader
from qemumig.wire.stream import InputStream
from tests.fuzz.delivery import PIECES, ROOM, delivered, piece_length
from tests.fuzz.folding import fold, taken_apart
from tests.fuzz.oracle import PAGE, TAKEN, Fault, Guarded, outcome_of
from tests.fuzz.plain import PlainRecords, plain_block
from tests.support.fuzz_ram import EOS, random_record
from tests.support.plain_stream import PlainStreamError

FILLED, SHARED, IGNORE_SHARED, ADVISED = 1, 2, 4, 8  # bits of the first byte
PAGES, ROM_PAGES, ROM_ROOM = 16, 2, 4
RAM, ROM = Guarded(PAGES), Guarded(ROM_ROOM)
COMPRESSED = zlib.compress(b"x" * PAGE)


def run(data: bytes) -> str:
    (choices, piece), wire = taken_apart(data, 2, ROOM)
    filled = 0x5A if choices & FILLED else 0
    blocks = [
        RAM.block("ram", filled=filled),
        ROM.block("rom", filled=filled, used_length=ROM_PAGES * PAGE, max_length=ROM_ROOM * PAGE, page_size=2 << 20),
    ]
    landing = Landing(blocks, ignore_shared=bool(choices & IGNORE_SHARED))
    landing.postcopy_advised = bool(choices & ADVISED)
    if choices & SHARED:
        landing.share()
    with delivered(wire, piece_length(piece)) as channel:
        outcome = outcome_of(RamLoader(InputStream(channel), landing).load_body)
    RAM.check()
    ROM.check()
    if outcome == TAKEN:
        compare(wire, filled, choices)
    return outcome


def compare(wire: bytes, filled: int, choices: int) -> None:
    """Fault when memory is not what the records say, or the plain reader refuses them."""
    plain = [plain_block("ram", RAM, PAGES, filled), plain_block("rom", ROM, ROM_PAGES, filled)]
    reader = PlainRecords(
        wire,
        plain,
        address_size=8 if choices & IGNORE_SHARED else 0,
        page_sizes={"rom": 8} if choices & ADVISED else None,
    )
    try:
        while reader.read_record():
            pass
    except PlainStreamError as error:
        raise Fault(f"taken, although {error}") from error
    for block, memory in zip(plain, (RAM, ROM), strict=True):
        memory.compare(block.memory, block.name)


def block_list(*, choices: int = 0, rom_pages: int = ROM_PAGES) -> bytes:
    address = bytes(8) if choices & IGNORE_SHARED else b""
    total = (PAGES + rom_pages) * PAGE | 0x4
    data = total.to_bytes(8, "big") + b"\3ram" + (PAGES * PAGE).to_bytes(8, "big") + address
    data += b"\3rom" + (rom_pages * PAGE).to_bytes(8, "big") + address
    return data + ((2 << 20).to_bytes(8, "big") if choices & ADVISED else b"")


def seeds() -> Iterator[bytes]:
    end = EOS.to_bytes(8, "big")
    for choices in range(16):
        yield bytes([choices, 0]) + fold(block_list(choices=choices) + end)
    yield b"\0\0" + fold(block_list(rom_pages=ROM_ROOM) + end)
    for name, pages in ((b"\3ram", PAGES), (b"\3rom", ROM_PAGES)):  # the last page, the first that is none, one far behind
        for page in (pages - 1, pages, ROM_ROOM, (1 << 52) - 1):
            for kind, body in (
                (0x2, b"\0"),
                (0x8, b"x" * PAGE),
                (0x40, b"\1\0\3\0\1x"),
                (0x100, len(COMPRESSED).to_bytes(4, "big") + COMPRESSED),
            ):
                yield b"\0\0" + fold(block_list() + (page * PAGE | kind).to_bytes(8, "big") + name + body + end)
    run_of_pages = b"".join(
        (page * PAGE | (0x28 if page else 0x8)).to_bytes(8, "big") + (b"" if page else b"\3ram") + bytes([page + 1]) * PAGE
        for page in range(PAGES)
    )
    for piece in range(len(PIECES)):
        yield bytes([0, piece]) + fold(block_list() + run_of_pages + end)
        zero = (PAGE | 0x22).to_bytes(8, "big") + b"\0"
        yield bytes([0, piece]) + fold(block_list() + run_of_pages[: 3 * (PAGE + 8) + 4] + zero + end)
    for seed in range(60):
        chance = random.Random(seed)
        records = b"".join(random_record(chance) for _ in range(chance.randrange(1, 4)))
        yield bytes([seed % 16, seed % len(PIECES)]) + fold(block_list(choices=seed % 16) + records + end)
