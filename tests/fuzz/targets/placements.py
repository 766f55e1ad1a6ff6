"""Pages of postcopy, placed whole where they are missing (postcopy.md §4).

    input    choices · piece · pages that are here already, a bit each · records, folded

What was taken must be what the plain reader makes of the same records, if the first version of a page counts.
"""

from __future__ import annotations

from collections.abc import Iterator

from qemumig.postcopy.blocktime import FaultTimes
from qemumig.postcopy.place import MissingMemory, PageReceiver
from qemumig.postcopy.uffd import Userfaultfd
from qemumig.ram.landing import Landing
from qemumig.wire.stream import InputStream
from tests.fuzz.delivery import ROOM, delivered, piece_length
from tests.fuzz.folding import fold, taken_apart
from tests.fuzz.oracle import PAGE, TAKEN, Fault, Guarded, outcome_of
from tests.fuzz.plain import PlainRecords, plain_block
from tests.support.fuzz_ram import EOS
from tests.support.plain_stream import PlainStreamError

PAGES = 16
RAM = Guarded(PAGES)
LARGE, URGENT = 1, 2  # bits of the choices: host pages of four target pages; a channel that has nothing else
LARGE_PAGE = 4 * PAGE


class FirstCounts(PlainRecords):
    """A page that is here is not written again."""

    def read_page(self, kind: int, offset: int, same_block: bool) -> None:
        block, place = self.stream.blocks["ram"], slice(offset, offset + PAGE)
        before = block.memory[place]
        super().read_page(kind, offset, same_block)
        if block.times_sent[offset // PAGE] > 1:
            block.memory[place] = before


def run(data: bytes) -> str:
    (choices, piece, *bits), wire = taken_apart(data, 4, ROOM)
    here = [page for page in range(PAGES) if bits[page // 8] >> page % 8 & 1]
    page_size = LARGE_PAGE if choices & LARGE else PAGE
    if choices & LARGE:  # they are here as a whole
        here = [page for page in range(PAGES) if page // 4 * 4 in here]
    block = RAM.block("ram", page_size=page_size)
    RAM.forget()
    landing = Landing([block])
    landing.listed.add(0)
    for page in here:
        landing.received[0].set(page)
    missing = MissingMemory(landing, Userfaultfd(), FaultTimes([]))
    missing.register()
    try:
        with delivered(wire, piece_length(piece)) as channel:
            receiver = PageReceiver(InputStream(channel), missing)
            outcome = outcome_of(receiver.load_channel if choices & URGENT else receiver.load_body)
    finally:
        missing.unregister()
        missing.uffd.close()
    RAM.check()
    if outcome == TAKEN and not choices & LARGE:  # half of a large page is not here yet
        compare(wire, here, may_end=bool(choices & URGENT))
    return outcome


def compare(wire: bytes, here: list[int], *, may_end: bool) -> None:
    """Fault when memory is not what the records say, or the plain reader refuses them.

    *may_end*: the connection may end between two records, without a mark.
    """
    block = plain_block("ram", RAM, PAGES)
    for page in here:
        block.times_sent[page] = 1
    reader = FirstCounts(wire, [block])
    try:
        while not (may_end and reader.at.offset == len(wire)) and reader.read_record():
            pass
    except PlainStreamError as error:
        raise Fault(f"taken, although {error}") from error
    RAM.compare(block.memory, "ram")


# ---- to begin with ----


def record(page: int, kind: int, data: bytes, name: bytes = b"ram") -> bytes:
    return (page * PAGE | kind).to_bytes(8, "big") + (b"" if kind & 0x20 else bytes([len(name)]) + name) + data


def seeds() -> Iterator[bytes]:
    end = EOS.to_bytes(8, "big")
    whole = [record(page, 0x28 if page else 0x8, bytes([page + 1]) * PAGE) for page in range(PAGES)]
    zero = [record(page, 0x22 if page else 0x2, b"\0") for page in range(PAGES)]
    mixed = [whole[0], *(one[page % 2] for page, one in enumerate(zip(whole, zero, strict=True)) if page)]
    for pages in (whole, zero, mixed):
        for choices in range(4):
            for piece in (0, 7, 8, 11):
                for bits in (0, 6):
                    said = b"".join(pages) + end
                    yield bytes([choices, piece, bits, 0]) + fold(said)
    yield bytes([URGENT, 0, 0, 0])
    yield bytes([URGENT, 0, 0, 0]) + fold(whole[0] + zero[1])
    yield bytes(4) + fold(record(3, 0x8, bytes(PAGE)) + record(3, 0x8, b"x" * PAGE) + end)
    yield bytes(4) + fold(record(3, 0x8, bytes(PAGE), b"rom") + end)
    for page in (PAGES - 1, PAGES, (1 << 52) - 1):
        for kind, body in ((0x8, b"x" * PAGE), (0x2, b"\0")):
            for choices in range(2):
                yield bytes([choices, 0, 0, 0]) + fold(record(page, kind, body) + end)
    yield bytes(4) + fold(record(3, 0x28, bytes(PAGE)) + end)
    yield bytes(4) + fold(record(3, 0x40, b"\1\0\3\0\1x") + end)
