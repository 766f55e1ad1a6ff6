"""Who goes ahead of the sender: what is found is believed, once, and nothing that the guest writes meanwhile is lost."""

from __future__ import annotations

import mmap
import random
import threading

import pytest

from qemumig.errors import MachineError
from qemumig.ram import scout as scout_module
from qemumig.ram.block import RAMBlock
from qemumig.ram.dirty import DirtyPages
from qemumig.ram.landing import Landing
from qemumig.ram.load import RamLoader
from qemumig.ram.save import PageSender
from qemumig.ram.scout import Scout
from qemumig.wire.stream import InputStream, OutputStream
from tests.qemumig.ram.test_save_load import EOS, load_in_thread
from tests.support.memory import Memory, QuietLog, channel_pair

PAGE = 4096
CHUNK_SHIFT = 6
CHUNK = 1 << CHUNK_SHIFT


class GuestLog(QuietLog):
    """A guest whose writes go through `write`: a page that is protected is logged before it changes."""

    manual_clear = True

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._lock = threading.Lock()
        self._logged: set[int] = set()
        self._reported: set[int] = set()
        self.cleared: list[int] = []

    def write(self, page: int, content: bytes) -> None:
        with self._lock:
            self._logged.add(page)
            self._memory.write(page * PAGE, content)

    def fetch(self, block: RAMBlock, words: memoryview) -> None:
        with self._lock:
            self._reported = set(self._logged)
        for page in self._reported:
            words[page // 64] |= 1 << page % 64

    def clear(self, block: RAMBlock, first_page: int, page_count: int) -> None:
        within = {page for page in self._reported if first_page <= page < first_page + page_count}
        with self._lock:
            self._logged -= within
        self._reported -= within
        self.cleared.append(first_page)


def touched(pages: int) -> Memory:
    """Memory that exists and is zero."""
    memory = Memory("ram", pages * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, anonymous=True)
    memory.write(0, bytes(pages * PAGE))
    return memory


def pages_of(memory: Memory, log: QuietLog) -> DirtyPages:
    dirty = DirtyPages([memory.block], log, CHUNK_SHIFT)
    dirty.sync()
    return dirty


def sent_zero(dirty: DirtyPages) -> tuple[int, int]:
    """Send all that is left: how many pages went as zeroes, and how many whole."""
    with channel_pair() as (left, right):
        sender = PageSender(dirty, OutputStream(left))
        assert sender.send(1 << 30, 1 << 20)
        right.shutdown()
    return sender.zero_pages, sender.normal_pages


def test_a_chunk_is_prepared_once_whoever_comes_first() -> None:
    memory = touched(2 * CHUNK)
    log = GuestLog(memory)
    dirty = pages_of(memory, log)
    dirty.look_ahead(0, CHUNK)
    dirty.look_ahead(0, CHUNK + 3)
    assert log.cleared == [CHUNK]
    sent_zero(dirty)
    assert log.cleared == [CHUNK, 0]
    dirty.look_ahead(0, 0)
    assert log.cleared == [CHUNK, 0]
    dirty.sync()
    dirty.visit_chunk(0, CHUNK)
    dirty.look_ahead(0, CHUNK)
    assert log.cleared == [CHUNK, 0, CHUNK]


def test_what_was_found_ahead_is_not_looked_at_again() -> None:
    """A write that no log tells of shows who has looked."""
    memory = touched(2 * CHUNK)
    dirty = pages_of(memory, QuietLog())
    dirty.look_ahead(0, 0)
    memory.write(5 * PAGE, b"x")
    memory.write((CHUNK + 5) * PAGE, b"x")
    assert sent_zero(dirty) == (2 * CHUNK - 1, 1)


def test_a_page_that_was_seen_to_hold_something_is_not_looked_at_again() -> None:
    memory = touched(CHUNK)
    memory.write(5 * PAGE, b"x")
    dirty = pages_of(memory, QuietLog())
    dirty.look_ahead(0, 0)
    memory.write(5 * PAGE, bytes(1))
    assert sent_zero(dirty) == (CHUNK - 1, 1)


def test_where_hardly_a_page_is_zero_nobody_looks_ahead() -> None:
    memory = touched(CHUNK)
    for page in range(CHUNK):
        memory.write(page * PAGE, bytes([page % 5 > 0]))
    dirty = pages_of(memory, QuietLog())
    dirty.look_ahead(0, 0)
    memory.write(5 * PAGE, b"x")
    assert sent_zero(dirty) == (-(-CHUNK // 5) - 1, CHUNK - -(-CHUNK // 5) + 1)


@pytest.mark.parametrize("anonymous", [True, False])
def test_what_was_found_before_a_sync_is_not_believed_after_it(anonymous: bool) -> None:
    memory = touched(2 * CHUNK)
    block = RAMBlock("ram", memory.block.host_address, 2 * CHUNK * PAGE, anonymous=anonymous, owner=memory)
    log = GuestLog(memory)
    dirty = DirtyPages([block], log, CHUNK_SHIFT)
    dirty.sync()
    dirty.look_ahead(0, 0)
    log.write(7, b"x")
    dirty.sync()
    assert sent_zero(dirty) == (2 * CHUNK - 1, 1)


def test_pages_are_unknown_until_somebody_has_looked_or_they_are_sent() -> None:
    memory = touched(2 * CHUNK)
    dirty = pages_of(memory, QuietLog())
    dirty.bitmaps[0].clear(CHUNK + 9)
    assert [dirty.unknown_pages(0, page) for page in (0, CHUNK)] == [CHUNK, CHUNK - 1]
    dirty.look_ahead(0, 0)
    assert [dirty.unknown_pages(0, page) for page in (0, CHUNK)] == [0, CHUNK - 1]
    sent_zero(dirty)
    assert dirty.unknown_pages(0, CHUNK) == 0


def test_the_next_chunk_is_that_of_the_next_dirty_page() -> None:
    dirty = pages_of(touched(4 * CHUNK), QuietLog())
    assert dirty.next_chunk(0, 3) == CHUNK
    for page in range(CHUNK, 3 * CHUNK + 5):
        dirty.bitmaps[0].clear(page)
    assert dirty.next_chunk(0, 3) == 3 * CHUNK + 5
    assert dirty.next_chunk(0, 3 * CHUNK) is None


@pytest.mark.usefixtures("no_leaks")
def test_a_log_that_fails_fails_the_sender_and_ends_the_scout(monkeypatch: pytest.MonkeyPatch) -> None:
    class BrokenLog(QuietLog):
        manual_clear = True

        def clear(self, block: RAMBlock, first_page: int, page_count: int) -> None:
            if first_page:
                raise MachineError("no log any more")

    monkeypatch.setattr(scout_module, "LEAST_PAGES", 0)
    dirty = pages_of(touched(2 * CHUNK), BrokenLog())
    scout = Scout(dirty)
    with channel_pair() as (left, _right):
        sender = PageSender(dirty, OutputStream(left))
        dirty.tell(scout)
        with pytest.raises(MachineError, match="no log any more"):
            sender.send(1 << 30, 1 << 20)
    scout.close()
    dirty.close()


@pytest.mark.usefixtures("no_leaks")
@pytest.mark.parametrize("seed", range(6))
def test_nothing_that_a_guest_writes_meanwhile_is_lost(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scout_module, "LEAST_PAGES", 0)
    rng, amounts = random.Random(seed), random.Random(seed)
    pages = 20 * CHUNK
    source, target = touched(pages), Memory("ram", pages * PAGE)
    log = GuestLog(source)
    is_over = threading.Event()

    def run_guest() -> None:
        while not is_over.is_set():
            page = rng.randrange(pages)
            log.write(page, bytes(PAGE) if rng.random() < 0.7 else rng.randbytes(8) * (PAGE // 8))

    guest = threading.Thread(target=run_guest)
    with channel_pair() as (left, right):
        out, loader = OutputStream(left), RamLoader(InputStream(right), Landing([target.block]))
        thread, errors = load_in_thread(loader)
        dirty = DirtyPages([source.block], log, CHUNK_SHIFT)
        scout, sender = Scout(dirty), PageSender(dirty, out)
        dirty.tell(scout)
        guest.start()
        for _ in range(60):
            dirty.sync()
            sender.send(1 << 20, amounts.randrange(1, 4 * CHUNK))
        is_over.set()
        guest.join()
        dirty.sync()
        while not sender.send(1 << 20, 1000):
            pass
        scout.close()
        out.write(EOS)
        out.flush()
        thread.join()
        dirty.close()
    assert errors == []
    assert target.contents() == source.contents()
