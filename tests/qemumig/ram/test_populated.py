"""Which pages exist: by scan and entry by entry, and what it means for what is sent."""

from __future__ import annotations

import mmap
import random

import pytest

from qemumig.ram.block import RAMBlock
from qemumig.ram.dirty import DirtyPages
from qemumig.ram.populated import PageMap
from qemumig.ram.save import PageSender
from qemumig.wire.stream import OutputStream
from tests.support.memory import Memory, QuietLog, channel_pair

PAGE = 4096


@pytest.fixture(params=[True, False], ids=["scan", "entries"])
def page_map(request: pytest.FixtureRequest) -> object:
    page_map = PageMap(scan=request.param)
    yield page_map
    page_map.close()


def private(pages: int) -> Memory:
    memory = Memory("ram", pages * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.map.madvise(mmap.MADV_NOHUGEPAGE)
    return memory


def test_exactly_the_written_pages_are_populated(page_map: PageMap) -> None:
    memory = private(3000)
    written = set(random.Random(1).sample(range(3000), 700))
    for page in written:
        memory.write(page * PAGE, b"x")
    bitmap = page_map.populated(memory.block.host_address, 3000)
    assert {page for page in range(3000) if bitmap.test(page)} == written


def test_a_page_that_was_only_read_counts_as_zero_or_is_read(page_map: PageMap) -> None:
    memory = private(100)
    assert memory.read(50 * PAGE, 1) == b"\0"
    bitmap = page_map.populated(memory.block.host_address, 100)
    assert bitmap.count() <= 1


def test_no_page_map_means_that_every_page_counts() -> None:
    page_map = PageMap()
    page_map.close()
    assert page_map.populated(private(100).block.host_address, 100).count() == 100


class WritingLog(QuietLog):
    """A guest that writes in between: to page 200, just after the chunk's protection was asked for."""

    manual_clear = True

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.logged = False

    def clear(self, block: object, first_page: int, page_count: int) -> None:
        if first_page <= 200 < first_page + page_count and not self.logged:
            self.memory.write(200 * PAGE, b"written before the question")
        self.logged = True


def test_a_page_written_before_the_question_is_sent() -> None:
    memory = private(300)
    block = RAMBlock("ram", memory.block.host_address, 300 * PAGE, anonymous=True, owner=memory)
    with channel_pair() as (left, _right):
        dirty = DirtyPages([block], WritingLog(memory), chunk_shift=8)
        dirty.sync()
        sender = PageSender(dirty, OutputStream(left))
        assert sender.send(1 << 30, 1000)
        assert (sender.normal_pages, sender.zero_pages) == (1, 299)
        dirty.close()


def test_memory_that_never_was_written_is_not_populated_by_sending_it() -> None:
    memory = private(5000)
    memory.write(4000 * PAGE, b"x")
    block = RAMBlock("ram", memory.block.host_address, 5000 * PAGE, anonymous=True, owner=memory)
    with channel_pair() as (left, right):
        dirty = DirtyPages([block], QuietLog())
        dirty.sync()
        sender = PageSender(dirty, OutputStream(left))
        assert sender.send(1 << 30, 10000)
        assert (sender.normal_pages, sender.zero_pages) == (1, 4999)
        right.shutdown()
        entries = PageMap(scan=False)
        assert entries.populated(block.host_address, 5000).count() == 1
        entries.close()
        dirty.close()
