"""Pages out of one memory, over a socket, into another: every kind of page, in every order."""

from __future__ import annotations

import mmap
import random
import threading
import zlib

import pytest

from qemumig.errors import ChannelError, MigrationCancelled, StreamError
from qemumig.ram.cache import PageCache
from qemumig.ram.dirty import DirtyPages
from qemumig.ram.landing import Landing
from qemumig.ram.load import RamLoader
from qemumig.ram.save import PageSender
from qemumig.wire.stream import InputStream, OutputStream
from tests.qemumig.postcopy.test_serve import drain
from tests.support.memory import Memory, QuietLog, channel_pair

PAGE = 4096
EOS = (0x10).to_bytes(8, "big")


def fill(memory: Memory, seed: int, zero_share: float) -> None:
    """Random pages and zero pages in runs of random length."""
    source = random.Random(seed)
    page = 0
    while page * PAGE < len(memory.map):
        run = source.randrange(1, 40)
        zero = source.random() < zero_share
        for _ in range(run):
            if page * PAGE < len(memory.map) and not zero:
                memory.write(page * PAGE, source.randbytes(PAGE))
            page += 1


def send_all(dirty: DirtyPages, out: OutputStream) -> PageSender:
    sender = PageSender(dirty, out)
    while not sender.send(1 << 20, 1000):
        pass
    out.write(EOS)
    out.flush()
    return sender


def load_in_thread(loader: RamLoader) -> tuple[threading.Thread, list[BaseException]]:
    errors: list[BaseException] = []

    def run() -> None:
        try:
            loader.load_body()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, errors


@pytest.mark.parametrize("zero_share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("fresh", [True, False])
def test_memory_arrives_as_it_was(zero_share: float, seed: int, fresh: bool) -> None:
    sources = [Memory("big", 3000 * PAGE), Memory("small", 37 * PAGE)]
    targets = [Memory("small", 37 * PAGE, fresh=fresh), Memory("big", 3000 * PAGE, fresh=fresh)]
    for source in sources:
        fill(source, seed, zero_share)
    if not fresh:
        for target in targets:
            fill(target, seed + 100, 0.3)  # what was there before must not shine through
    with channel_pair() as (left, right):
        loader = RamLoader(InputStream(right), Landing([target.block for target in targets]))
        thread, errors = load_in_thread(loader)
        sender = send_all(DirtyPages([s.block for s in sources], QuietLog()), OutputStream(left))
        thread.join()
    assert errors == []
    assert targets[1].contents() == sources[0].contents()
    assert targets[0].contents() == sources[1].contents()
    assert (sender.zero_pages, sender.normal_pages) == (loader.zero_pages, loader.normal_pages)
    assert sender.zero_pages + sender.normal_pages == 3037
    assert [bitmap.count() for bitmap in loader.landing.received] == [37, 3000]


@pytest.mark.parametrize("seed", range(20))
def test_a_wrong_guess_is_mended(seed: int) -> None:
    """Later rounds send scattered pages among pages that must keep what they hold."""
    source, target = Memory("ram", 2000 * PAGE), Memory("ram", 2000 * PAGE)
    chance = random.Random(seed)
    fill(source, seed, 0.2)
    with channel_pair() as (left, right):
        out = OutputStream(left)
        loader = RamLoader(InputStream(right), Landing([target.block]))
        dirty = DirtyPages([source.block], QuietLog())
        sender = PageSender(dirty, out)
        bitmap = dirty.bitmaps[0]
        for round_number in range(4):
            thread, errors = load_in_thread(loader)
            if round_number == 0:  # the first round leaves pages out, in runs: those are guessed at, and must stay zero
                skipped = [page for page in range(2000) if chance.random() < 0.3]
                for page in skipped:
                    bitmap.clear(page)
            else:
                for _ in range(300):
                    page = chance.randrange(2000)
                    source.write(page * PAGE, bytes(PAGE) if chance.random() < 0.3 else chance.randbytes(PAGE))
                    bitmap.set(page)
                for page in skipped[:: round_number + 1]:
                    bitmap.set(page)
            dirty.sync()  # counts what was set by hand
            while not sender.send(chance.randrange(1, 300000), 1000):
                pass
            out.write(EOS)
            out.flush()
            thread.join()
            assert errors == []
            received = loader.landing.received[0]
            for page in range(2000):
                expected = source.read(page * PAGE, PAGE) if received.test(page) else bytes(PAGE)
                assert target.read(page * PAGE, PAGE) == expected, f"page {page} after round {round_number}"
    assert loader.wrong_guesses > 0


def test_zero_pages_leave_fresh_memory_unpopulated() -> None:
    source, target = Memory("ram", 4096 * PAGE), Memory("ram", 4096 * PAGE)
    with channel_pair() as (left, right):
        loader = RamLoader(InputStream(right), Landing([target.block]))
        thread, errors = load_in_thread(loader)
        send_all(DirtyPages([source.block], QuietLog()), OutputStream(left))
        thread.join()
    assert errors == []
    assert resident_pages(target) == 0


def resident_pages(memory: Memory) -> int:
    with open("/proc/self/pagemap", "rb") as pagemap:
        pagemap.seek(memory.block.host_address // PAGE * 8)
        entries = pagemap.read(len(memory.map) // PAGE * 8)
    return sum(entries[i + 7] >> 7 for i in range(0, len(entries), 8))


def write_randomly(memory: Memory, page: int, chance: random.Random) -> None:
    """Leave *page* as it is, zero it, rewrite it, or change some of its bytes."""
    kind = chance.random()
    if kind < 0.1:
        memory.write(page * PAGE, bytes(PAGE))
    elif kind < 0.2:
        memory.write(page * PAGE, chance.randbytes(PAGE))
    elif kind < 0.8:
        for _ in range(chance.randrange(1, 30)):
            memory.write(page * PAGE + chance.randrange(PAGE - 8), chance.randbytes(chance.randrange(1, 8)))


@pytest.mark.parametrize("seed", range(8))
def test_deltas_keep_the_destination_equal_through_every_round(seed: int) -> None:
    """The cache is smaller than the memory that is written, and is resized on the way."""
    sources = [Memory("big", 600 * PAGE), Memory("small", 37 * PAGE)]
    targets = [Memory("big", 600 * PAGE), Memory("small", 37 * PAGE)]
    chance = random.Random(seed)
    for memory in sources:
        fill(memory, seed, 0.2)
    with channel_pair() as (left, right):
        out, cache = OutputStream(left), PageCache(256 * PAGE)
        loader = RamLoader(InputStream(right), Landing([target.block for target in targets]))
        dirty = DirtyPages([source.block for source in sources], QuietLog())
        sender = PageSender(dirty, out)
        sender.encode_with(cache)
        for round_number in range(1, 9):
            sender.last_stage = round_number == 8
            dirty.sync()  # counts what was set by hand, and begins a generation of the cache
            thread, errors = load_in_thread(loader)
            while not sender.send(chance.randrange(1, 100000), chance.randrange(1, 300)):
                pass
            out.write(EOS)
            out.flush()
            thread.join()
            assert errors == []
            assert [m.contents() for m in targets] == [m.contents() for m in sources], f"after round {round_number}"
            if round_number == 1:
                assert cache.hits == cache.misses == 0
            cache.resize(chance.choice([128, 256, 512]) * PAGE)
            for _ in range(400):
                memory, bitmap = chance.choice(list(zip(sources, dirty.bitmaps, strict=True)))
                page = chance.randrange(len(memory.map) // PAGE)
                write_randomly(memory, page, chance)
                bitmap.set(page)
    assert cache.hits > cache.overflows > 0 and cache.misses > 0
    assert loader.encoded_pages > 100
    assert loader.normal_pages == sender.normal_pages and loader.zero_pages == sender.zero_pages
    unchanged = sender.handled_pages - sender.normal_pages - sender.zero_pages - loader.encoded_pages
    assert unchanged == cache.hits - cache.overflows - loader.encoded_pages > 0


@pytest.mark.parametrize("with_cache", [False, True])
def test_compressed_pages_arrive_and_give_way_to_deltas(with_cache: bool) -> None:
    source, target = Memory("ram", 600 * PAGE), Memory("ram", 600 * PAGE)
    chance = random.Random(5)
    for page in range(600):
        source.write(page * PAGE, chance.choice([bytes(PAGE), chance.randbytes(PAGE), chance.randbytes(64) * 64]))
    with channel_pair() as (left, right):
        out = OutputStream(left)
        loader = RamLoader(InputStream(right), Landing([target.block]))
        dirty = DirtyPages([source.block], QuietLog())
        sender = PageSender(dirty, out)
        sender.encode_with(PageCache(1024 * PAGE) if with_cache else None)
        sender.compress_at(1)
        for _ in range(4):
            thread, errors = load_in_thread(loader)
            dirty.sync()
            while not sender.send(1 << 20, 1000):
                pass
            out.write(EOS)
            out.flush()
            thread.join()
            assert errors == []
            assert target.contents() == source.contents()
            for page in range(0, 600, 3):
                source.write(page * PAGE + 100, chance.randbytes(8))
                dirty.bitmaps[0].set(page)
    assert loader.compressed_pages == sender.compressed_pages > 100
    assert loader.normal_pages == sender.normal_pages > 100  # what does not shrink goes out whole
    assert (loader.encoded_pages > 0) == with_cache


def test_a_whole_page_leaves_as_the_cache_has_it_even_if_the_guest_writes_meanwhile() -> None:
    source, target = Memory("ram", 8 * PAGE), Memory("ram", 8 * PAGE)
    fill(source, 1, 0.0)
    with channel_pair() as (left, right):
        out, cache = OutputStream(left), PageCache(8 * PAGE)
        loader = RamLoader(InputStream(right), Landing([target.block]))
        dirty = DirtyPages([source.block], QuietLog())
        sender = PageSender(dirty, out)
        sender.encode_with(cache)
        for round_number in range(4):
            thread, errors = load_in_thread(loader)
            dirty.bitmaps[0].set(3)
            dirty.sync()
            source.write(3 * PAGE, bytes([round_number + 1]) * PAGE)
            assert sender.send(1 << 20, 100)
            if round_number:
                source.write(3 * PAGE + 50, b"written after the page was listed, and before it left")
            out.write(EOS)
            out.flush()
            thread.join()
            assert errors == []
            if round_number:
                assert cache.held(3) == target.read(3 * PAGE, PAGE) == bytes([round_number + 1]) * PAGE


class ClearingLog(QuietLog):
    """Remembers which chunks were protected again, and insists that it happens before their pages leave."""

    manual_clear = True

    def __init__(self) -> None:
        self.cleared: list[tuple[int, int]] = []

    def clear(self, block: object, first_page: int, page_count: int) -> None:
        self.cleared.append((first_page, page_count))


def test_each_chunk_is_protected_once_after_a_sync_and_just_before_its_first_page() -> None:
    source = Memory("ram", 300 * PAGE)
    log = ClearingLog()
    with channel_pair() as (left, right):
        dirty = DirtyPages([source.block], log, chunk_shift=6)
        dirty.sync()
        sender = PageSender(dirty, OutputStream(left))
        assert not sender.send(1 << 30, 65)
        assert log.cleared == [(0, 64), (64, 64)]
        assert sender.send(1 << 30, 1000)
        assert log.cleared == [(0, 64), (64, 64), (128, 64), (192, 64), (256, 44)]
        right.shutdown()


@pytest.mark.parametrize("at_once", [1, 7, 5000])
def test_memory_that_nobody_has_touched_is_told_page_by_page_whatever_the_limit(at_once: int) -> None:
    """Pages go in runs where they do not exist: what leaves is what a walk of single pages would say."""
    source = Memory("ram", 3000 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, anonymous=True)
    touched = {0, 300, 511, 512, 1999, 2999}
    for page in touched:
        source.write(page * PAGE, bytes([page % 255 + 1]) * PAGE)
    clean = {5, *range(700, 760), 2048}
    with channel_pair() as (left, right):
        dirty = DirtyPages([source.block], QuietLog())
        for page in clean:
            dirty.bitmaps[0].clear(page)
        dirty.sync()
        out = OutputStream(left)
        sender = PageSender(dirty, out)
        done, data = False, b""
        while not done:
            before = sender.handled_pages
            done = sender.send(1 << 30, at_once)
            assert sender.handled_pages - before <= at_once
            out.flush()
            data += drain(right)
    expected = [head(0, FULL_PAGE, b"ram") + source.read(0, PAGE)]
    for page in (page for page in range(1, 3000) if page not in clean):
        kind, contents = (FULL_PAGE, source.read(page * PAGE, PAGE)) if page in touched else (ZERO, b"\0")
        expected.append(head(page * PAGE, kind | CONTINUE) + contents)
    assert data == b"".join(expected)
    assert (sender.zero_pages, sender.normal_pages) == (3000 - len(clean) - 6, 6) and dirty.remaining == 0


def head(offset: int, flags: int, name: bytes | None = None) -> bytes:
    counted = b"" if name is None else bytes([len(name)]) + name
    return (offset | flags).to_bytes(8, "big") + counted


def load(data: bytes, *, size: int = 64 * PAGE) -> tuple[RamLoader, Memory]:
    target = Memory("ram", size)
    with channel_pair() as (left, right):
        loader = RamLoader(InputStream(right), Landing([target.block]))
        out = OutputStream(left)
        thread, errors = load_in_thread(loader)
        try:
            out.write(data)
            out.flush()
        except ChannelError:
            pass
        left.shutdown()
        thread.join()
    if errors:
        raise errors[0]
    return loader, target


def block_list(total: int, name: bytes, length: int) -> bytes:
    return head(total, MEM_SIZE) + bytes([len(name)]) + name + length.to_bytes(8, "big")


ZERO, MEM_SIZE, FULL_PAGE, CONTINUE, DELTA = 0x2, 0x4, 0x8, 0x20, 0x40


def compressed(data: bytes, behind: bytes = b"", cut: int = 0) -> bytes:
    stream = zlib.compress(data, 1)
    stream = stream[: len(stream) - cut] + behind
    return head(0, 0x100, b"ram") + len(stream).to_bytes(4, "big") + stream


def zero_run(count: int) -> bytes:
    """The first *count* pages are zero."""
    rest = (head(page * PAGE, ZERO | CONTINUE) + b"\0" for page in range(1, count))
    return head(0, ZERO, b"ram") + b"\0" + b"".join(rest)


LENGTH = 64 * PAGE
LIES = [
    ("continue first", head(0, ZERO | CONTINUE) + b"\0", "continues a block, expected a name"),
    ("unknown block", head(0, ZERO, b"rom\xff") + b"\0", r"block 'rom\\\\xff' does not exist here, this machine has 'ram'"),
    ("empty name", head(0, ZERO, b"") + b"\0", "block '' does not exist here"),
    ("offset at the end", head(LENGTH, ZERO, b"ram") + b"\0", "offset 0x40000 in block 'ram', expected one below 0x40000"),
    ("offset far out", head((1 << 64) - PAGE, FULL_PAGE, b"ram") + bytes(PAGE), "offset 0xfffffffffffff000"),
    ("fill byte", head(0, ZERO, b"ram") + b"\x55", "fill byte 0x55 of a zero page, expected 0"),
    ("fill byte in a run", zero_run(9)[:-1] + b"\x55", "record at offset 0x1058: fill byte 0x55"),
    ("run past the end", zero_run(65), "offset 0x40000 in block 'ram', expected one below 0x40000"),
    ("two kinds at once", head(0, ZERO | FULL_PAGE, b"ram"), "has flags 0xa"),
    ("no flag", head(PAGE, 0), "has flags 0x0"),
    ("obsolete", head(0, 1), "has flags 0x1"),
    ("unknown flag", head(0, 0x400), "has flags 0x400"),
    ("EOS with an offset", head(PAGE, 0x10), "has flags 0x10"),
    ("not a delta", head(0, DELTA, b"ram") + b"\2\0\3\0\1A", "encoding 0x2, expected that of a delta, 0x1"),
    ("long delta", head(0, DELTA, b"ram") + b"\1\x10\1" + bytes(PAGE + 1), "a delta of 4097 bytes, expected at most 4096"),
    ("delta past the page", head(0, DELTA, b"ram") + b"\1\0\5\xff\x1f\2wx", "delta changes 2 bytes from 4095 on"),
    ("delta past its end", head(0, DELTA, b"ram") + b"\1\0\3\5\x10w", "changes 16 bytes, and fewer follow"),
    ("no compressed data", head(0, 0x100, b"ram") + bytes(4), "compressed data of 0 bytes, expected 1 to 4110"),
    ("long compressed data", head(0, 0x100, b"ram") + b"\0\0\x10\x0f" + bytes(4111), "of 4111 bytes, expected 1 to 4110"),
    ("negative length", head(0, 0x100, b"ram") + b"\xff" * 4 + bytes(9), "of 4294967295 bytes, expected 1 to 4110"),
    ("no zlib stream", head(0, 0x100, b"ram") + b"\0\0\0\4abcd", "data of 4 bytes: it is no whole zlib stream"),
    ("two pages in one", compressed(bytes(2 * PAGE)), "it holds more than a page, or ends early"),
    ("half a page", compressed(bytes(PAGE // 2)), "it holds less than a page"),
    ("a page and more", compressed(bytes(PAGE), b"x"), "bytes follow the end of its zlib stream"),
    ("half a stream", compressed(bytes(PAGE), cut=3), "it holds more than a page, or ends early|no whole zlib stream"),
    ("hook", head(0, 0x80), "has flags 0x80"),
    ("list of an unknown block", block_list(PAGE, b"rom", PAGE), "block 'rom' does not exist"),
    ("list, another length", block_list(PAGE, b"ram", PAGE), "has 0x40000 bytes here, the stream says 0x1000"),
    ("list past its total", block_list(PAGE, b"ram", LENGTH), "only 0x1000 are left"),
]  # fmt: skip


@pytest.mark.parametrize(("data", "finding"), [lie[1:] for lie in LIES], ids=[lie[0] for lie in LIES])
def test_a_record_that_lies_is_refused_with_its_place(data: bytes, finding: str) -> None:
    good = head(PAGE, FULL_PAGE, b"ram") + b"x" * PAGE if "continue" not in finding else b""
    with pytest.raises(StreamError, match=finding) as caught:
        load(good + data + EOS)
    assert "0x" in str(caught.value)
    assert caught.value.offset is not None and caught.value.offset >= len(good)


def test_a_body_that_ends_early_is_refused_at_every_byte() -> None:
    body = (
        head(64 * PAGE, MEM_SIZE) + b"\3ram" + (64 * PAGE).to_bytes(8, "big")
        + head(0, FULL_PAGE, b"ram") + b"a" * PAGE
        + head(PAGE, FULL_PAGE | CONTINUE) + b"b" * PAGE
        + head(5 * PAGE, ZERO | CONTINUE) + b"\0"
        + head(PAGE, DELTA | CONTINUE) + b"\1\0\3\5\1c"
        + compressed(b"c" * PAGE)
        + EOS
    )  # fmt: skip
    _, target = load(body)
    assert target.read(0, 2 * PAGE) == b"c" * PAGE + b"bbbbbc" + b"b" * (PAGE - 6)
    steps = [*range(0, 60), *range(60, len(body), 97), *range(len(body) - 20, len(body))]
    for length in steps:
        with pytest.raises(StreamError, match="stream ends inside"):
            load(body[:length])


def test_a_flush_mark_without_multifd_is_nothing() -> None:
    loader, _ = load(head(0, 0x200) + EOS)
    assert loader.normal_pages == loader.zero_pages == 0


def test_a_broken_channel_and_a_cancel_are_told_apart() -> None:
    source = Memory("ram", 4096 * PAGE)
    fill(source, 1, 0.0)
    with channel_pair() as (left, right):
        sender = PageSender(DirtyPages([source.block], QuietLog()), OutputStream(left))
        right.shutdown()
        with pytest.raises(ChannelError, match="Unable to write to socket: Broken pipe"):
            sender.send(1 << 40, 1 << 40)
    with channel_pair() as (left, right):
        import os

        sender = PageSender(DirtyPages([source.block], QuietLog()), OutputStream(left))
        timer = threading.Timer(0.05, lambda: os.eventfd_write(left.quit_fd, 1))
        timer.start()
        with pytest.raises(MigrationCancelled):
            sender.send(1 << 40, 1 << 40)  # the peer does not read: the buffers fill, and the cancel wakes us
        timer.join()
