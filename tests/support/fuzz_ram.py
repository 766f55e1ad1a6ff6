"""Damaged RAM sections for the loader: records with deltas and compressed pages, and files of mapped-ram.

    python -m tests.support.fuzz_ram SECONDS [FIRST_SEED]      as many seeds as fit, and what came of them

A seed makes one input, which is well-formed but for some damage, and loads it.  The loader may take it or refuse it with a
StreamError that has a place in the input; every other outcome is a fault: another error, a write past the block, a hang.
"""

from __future__ import annotations

import random
import struct
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter
from contextlib import closing
from pathlib import Path

from qemumig.channels.address import FileAddress
from qemumig.channels.channel import QuitEvent
from qemumig.channels.file import open_incoming_file
from qemumig.errors import ChannelError, StreamError
from qemumig.options import MigrationOptions
from qemumig.ram.block import RAMBlock
from qemumig.ram.landing import Landing
from qemumig.ram.load import RamLoader
from qemumig.ram.mapped import HEADER, MappedLoader, PageFiles
from qemumig.wire.stream import InputStream, OutputStream
from tests.support.deltas import number, plain_delta
from tests.support.memory import Memory, channel_pair

PAGE = 4096
PAGES = 16
GUARD = b"\xa5" * PAGE  # behind the block: nobody may write there
ZERO, MEM_SIZE, WHOLE, EOS, CONTINUE, DELTA, COMPRESSED = 0x2, 0x4, 0x8, 0x10, 0x20, 0x40, 0x100
TEMPTING = (0, 1, 2, 3, 0x20, 0x40, 0x7F, 0x80, 0xFF)


class Fault(Exception):
    """The loader did what it must not."""


def damage(data: bytearray, chance: random.Random) -> bytearray:
    """Change, drop, double or cut some bytes; most often few."""
    for _ in range(chance.choice((0, 1, 1, 1, 2, 3, 8))):
        if not data:
            break
        at, kind = chance.randrange(len(data)), chance.random()
        if kind < 0.5:
            data[at] = chance.choice((*TEMPTING, chance.randrange(256)))
        elif kind < 0.65:
            data[at] ^= 1 << chance.randrange(8)
        elif kind < 0.8:
            del data[at : at + chance.choice((1, 2, 8, 100))]
        elif kind < 0.95:
            data[at:at] = data[at : at + chance.choice((1, 2, 8, 100))]
        else:
            del data[at:]
    return data


def random_delta(chance: random.Random) -> bytes:
    """A delta of a real page, or pairs of numbers that may be anything."""
    if chance.random() < 0.8:
        old = chance.randbytes(PAGE)
        new = bytearray(old)
        for _ in range(chance.randrange(1, 40)):
            new[chance.randrange(PAGE)] ^= 0xFF
        return plain_delta(old, bytes(new)) or b""
    delta = b""
    for _ in range(chance.randrange(1, 6)):
        changed = chance.choice((0, 1, 2, 127, 128, 4095, 4096, 0x3FFF))
        delta += number(chance.choice((0, 1, 127, 128, 2000, 4095, 4096, 0x3FFF))) + number(changed)
        delta += chance.randbytes(min(changed, chance.choice((changed, 3))))
    return delta


def random_record(chance: random.Random) -> bytes:
    kind = chance.choice((ZERO, WHOLE, DELTA, DELTA, DELTA, COMPRESSED, COMPRESSED))
    named = b"\3ram" if chance.random() < 0.9 else b""
    flags = kind if named else kind | CONTINUE
    page = chance.randrange(PAGES + (chance.random() < 0.02))
    head = struct.pack(">Q", page * PAGE | flags) + named
    if kind == ZERO:
        return head + b"\0"
    if kind == WHOLE:
        return head + chance.randbytes(PAGE)
    if kind == DELTA:
        delta = random_delta(chance)[:0xFFFF]
        return head + b"\1" + struct.pack(">H", len(delta)) + delta
    data = zlib.compress(chance.randbytes(chance.choice((64, 4000))).ljust(PAGE, b"\0"), 1)
    return head + struct.pack(">I", len(data)) + data


def block_list() -> bytes:
    return struct.pack(">Q", PAGES * PAGE | MEM_SIZE) + b"\3ram" + struct.pack(">Q", PAGES * PAGE)


class Target(Memory):
    """A block with a page behind it that must stay as it is."""

    def __init__(self) -> None:
        super().__init__("ram", (PAGES + 1) * PAGE)
        self.write(PAGES * PAGE, GUARD)
        self.block = RAMBlock("ram", self.block.host_address, PAGES * PAGE, fresh=True, owner=self.map)

    def check(self) -> None:
        if self.read(PAGES * PAGE, PAGE) != GUARD:
            raise Fault("the page behind the block was written to")


def outcome_of(load: object, target: Target) -> str:
    try:
        load()  # type: ignore[operator]
    except StreamError as error:
        if error.offset is None:
            raise Fault(f"a refusal without a place: {error}") from error
        return "refused"
    finally:
        target.check()
    return "taken"


def fuzz_records(seed: int) -> str:
    """One section of damaged records, over a socket."""
    chance = random.Random(seed)
    records = block_list() + b"".join(random_record(chance) for _ in range(chance.randrange(1, 9)))
    data = bytearray(records + struct.pack(">Q", EOS))
    if chance.random() < 0.6:
        damage(data, chance)
    target = Target()
    with channel_pair() as (left, right):
        loader = RamLoader(InputStream(right), Landing([target.block]))

        def write() -> None:
            out = OutputStream(left)
            try:
                out.write(data)
                out.flush()
            except ChannelError:
                pass  # it has seen enough
            left.finish()

        writer = threading.Thread(target=write)
        writer.start()
        try:
            return outcome_of(loader.load_body, target)
        finally:
            right.shutdown()
            writer.join()


def fuzz_mapped(seed: int, path: Path) -> str:
    """One damaged file of mapped-ram, read through one descriptor or three."""
    chance = random.Random(seed)
    entry = block_list()
    here = len(entry) + HEADER.size
    pages_offset = chance.choice((PAGE, PAGE, 2 * PAGE, 0x100000))
    data = bytearray(entry + HEADER.pack(1, PAGE, here, pages_offset) + chance.randbytes(8))
    if chance.random() < 0.3:
        damage(data, chance)
    field = chance.choice((None, None, None, None, (0, 4), (4, 8), (12, 8), (20, 8)))
    if field is not None and len(data) >= len(entry) + HEADER.size:
        value = chance.choice((0, 1, PAGE, 1 << 31, 1 << 63, (1 << 64) - PAGE, (1 << 64) - 1, chance.getrandbits(64)))
        at = len(entry) + field[0]
        data[at : at + field[1]] = (value % (1 << 8 * field[1])).to_bytes(field[1], "big")
    data = data.ljust(pages_offset, b"\0") + chance.randbytes(PAGES * PAGE)
    data += struct.pack(">Q", chance.choice((EOS, EOS, EOS, WHOLE, DELTA, MEM_SIZE)))
    if chance.random() < 0.2:
        del data[chance.randrange(len(data)) :]
    path.write_bytes(data)
    target, event, options = Target(), QuitEvent(), MigrationOptions()
    if chance.random() < 0.3:
        options.set_capabilities([("mapped-ram", True), ("multifd", True)])
        options.set_parameters({"multifd-channels": 3})
    with closing(event), closing(open_incoming_file(FileAddress(str(path)), event.fd)) as channel:
        stream, landing = InputStream(channel), Landing([target.block])
        with closing(PageFiles(channel, options, "dst/recv")) as files:
            loader = RamLoader(stream, landing)
            loader.load_pages = MappedLoader(stream, landing, files, lambda: None).load_block
            return outcome_of(loader.load_body, target)


def main() -> None:
    seconds, seed = float(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    first, end, results = seed, time.monotonic() + seconds, Counter[str]()
    with tempfile.TemporaryDirectory() as directory:
        while time.monotonic() < end:
            try:
                results[f"records {fuzz_records(seed)}"] += 1
                results[f"mapped {fuzz_mapped(seed, Path(directory) / 'file')}"] += 1
            except BaseException:
                print(f"seed {seed}", flush=True)
                raise
            seed += 1
    print(f"seeds {first} to {seed - 1}: {dict(sorted(results.items()))}")


if __name__ == "__main__":
    main()
