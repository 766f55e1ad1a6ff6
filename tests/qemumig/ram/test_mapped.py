"""mapped-ram: pages at their places in a file, written in rounds, read back by any number of descriptors (ram.md §10)."""

from __future__ import annotations

import os
import random
import resource
import struct
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import zstandard

from qemumig.channels.address import FileAddress
from qemumig.channels.channel import Channel, QuitEvent
from qemumig.channels.file import open_incoming_file, open_outgoing_file
from qemumig.errors import ChannelError, MigrationCancelled, StreamError
from qemumig.options import MigrationOptions
from qemumig.ram.dirty import DirtyPages
from qemumig.ram.landing import Landing
from qemumig.ram.load import RamLoader
from qemumig.ram.mapped import (
    HEADER,
    LONGEST_STRIDE,
    SHORTEST_STRIDE,
    MappedLoader,
    MappedRamSource,
    PageFiles,
    Stride,
)
from qemumig.ram.region import Ranges, Region
from qemumig.wire.format import MAPPED_RAM_HDR_SIZE
from qemumig.wire.stream import InputStream, OutputStream
from tests.support.memory import Memory, QuietLog, channel_pair
from tests.support.traces import recorded

PAGE = 4096
MIB = 1 << 20
RECORDED = Path(__file__).parents[2] / "streams" / "ram"


class Options(MigrationOptions):
    """*channels* of multifd, or none."""

    def __init__(self, channels: int = 0, direct_io: bool = False) -> None:
        super().__init__()
        self.chosen = {"multifd": channels > 0, "multifd-channels": channels, "direct-io": direct_io}

    def capability(self, name: str) -> bool:
        return bool(self.chosen[name]) if name == "multifd" else super().capability(name)

    def parameter(self, name: str) -> object:
        return self.chosen.get(name) or super().parameter(name)


@contextmanager
def channel_to(path: Path, offset: int = 0) -> Iterator[Channel]:
    event = QuitEvent()
    with closing(event), closing(open_outgoing_file(FileAddress(str(path), offset), event.fd)) as channel:
        yield channel


@contextmanager
def channel_from(path: Path, offset: int = 0) -> Iterator[Channel]:
    event = QuitEvent()
    with closing(event), closing(open_incoming_file(FileAddress(str(path), offset), event.fd)) as channel:
        yield channel


def memories(*, fresh: bool = True) -> list[Memory]:
    return [Memory("big", 3000 * PAGE, fresh=fresh), Memory("small", 37 * PAGE, fresh=fresh)]


def scribble(memory: Memory, chance: random.Random, pages: int) -> list[int]:
    """Write some pages, in runs, a third of them with zeroes; which ones."""
    written = []
    while len(written) < pages:
        first = chance.randrange(len(memory.map) // PAGE)
        content = bytes(PAGE) if chance.random() < 0.3 else chance.randbytes(PAGE)
        for page in range(first, min(first + chance.randrange(1, 9), len(memory.map) // PAGE)):
            memory.write(page * PAGE, content)
            written.append(page)
    return written


def save(path: Path, sources: list[Memory], chance: random.Random, *, channels: int = 0, offset: int = 0) -> list[int]:
    """Save in four rounds, between which pages are written; what each block's pages begin at."""
    with channel_to(path, offset) as channel:
        out = OutputStream(channel)
        ram = MappedRamSource([m.block for m in sources], QuietLog(), out, Options(channels))
        with closing(ram):
            out.write(b"before")
            ram.write_block_list()
            for number in range(4):
                ram.dirty.sync()  # counts what was set by hand
                if number == 3:
                    ram.write_rest()
                else:
                    ram.write_part(chance.choice([1, 100_000, 1 << 40]))
                for memory, bitmap in zip(sources, ram.dirty.bitmaps, strict=True):
                    for page in scribble(memory, chance, 200) if number < 3 else []:
                        bitmap.set(page)
            out.write(b"behind")
            out.flush()
            assert ram.remaining == 0
            assert ram.sent_bytes == out.offset + ram.sender.normal_pages * PAGE
            assert ram.sent_pages == ram.sender.zero_pages + ram.sender.normal_pages >= 3037
            return [region.pages_offset for region in ram._regions]


def load(path: Path, targets: list[Memory], *, channels: int = 0, offset: int = 0, direct_io: bool = False) -> RamLoader:
    """Load what `save` wrote: START's list, and the EOS of three sections more."""
    with channel_from(path, offset) as channel:
        stream = InputStream(channel)
        landing = Landing([m.block for m in targets])
        with closing(PageFiles(channel, Options(channels, direct_io), "dst/recv")) as files:
            loader = RamLoader(stream, landing)
            loader.load_pages = MappedLoader(stream, landing, files, lambda: None).load_block
            assert stream.read(6) == b"before"
            for _ in range(5):
                loader.load_body()
            assert stream.read(6) == b"behind"
            assert stream.offset + offset == stream.file_position() == path.stat().st_size
    return loader


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize(("writers", "readers"), [(0, 0), (3, 0), (0, 2), (1, 5)])
def test_memory_goes_through_a_file_whoever_writes_and_reads(
    directory: Path, writers: int, readers: int, fresh: bool
) -> None:
    chance = random.Random(writers * 10 + readers)
    sources, targets = memories(), memories(fresh=fresh)
    for memory in sources if fresh else [*sources, *targets]:
        scribble(memory, chance, 1000)
    path = directory / "file"
    path.write_bytes(b"x" * 5000)
    offset = 5000 if fresh else 0
    save(path, sources, chance, channels=writers, offset=offset)
    assert path.read_bytes()[:offset] == b"x" * offset
    loader = load(path, targets, channels=readers, offset=offset)
    assert [m.contents() for m in targets] == [m.contents() for m in sources]
    there = sum(any(m.read(at, PAGE)) for m in sources for at in range(0, len(m.map), PAGE))
    assert loader.normal_pages == there
    if fresh:
        assert sum(bitmap.count() for bitmap in loader.landing.received) == there


def test_the_trace_says_where_blocks_lie_and_how_much_came(directory: Path) -> None:
    sources, targets, chance = memories(), memories(), random.Random(3)
    scribble(sources[1], chance, 20)
    with recorded(directory, "mapped_ram_*") as lines:
        places = save(directory / "file", sources, chance)
        load(directory / "file", targets)
    saved = [line.split(" ", 1)[1] for line in lines if line.startswith("mapped_ram_save_block")]
    assert saved == [line.split(" ", 1)[1] for line in lines if line.startswith("mapped_ram_load_block ")]
    assert [line.rpartition(" ")[2] for line in saved] == [hex(place) for place in places]
    there = {m.block.idstr: sum(any(m.read(at, PAGE)) for at in range(0, len(m.map), PAGE)) for m in sources}
    assert lines[-1] == f"mapped_ram_load_block_end small: pages {there['small']}"
    assert sum(line.startswith("mapped_ram_save_bitmaps normal pages ") for line in lines) == 1


def test_pages_lie_where_the_format_puts_them_and_zeroes_are_holes(directory: Path) -> None:
    sources = memories()
    sources[0].write(5 * PAGE, b"a" * PAGE)
    sources[0].write(2999 * PAGE, b"z" * PAGE)
    path = directory / "file"
    big, small = save(path, sources, random.Random(1))
    data = path.read_bytes()
    entry = data.index(b"\3big")
    bitmap = entry + 12 + MAPPED_RAM_HDR_SIZE
    assert struct.unpack(">IQQQ", data[entry + 12 : bitmap]) == (1, PAGE, bitmap, MIB)
    assert big == MIB
    assert data[big + 3000 * PAGE :].startswith(b"\5small")
    assert small == 13 * MIB  # the next multiple behind the entry
    words = data[bitmap : bitmap + 47 * 8]
    for page in range(3000):
        content = sources[0].read(page * PAGE, PAGE)
        assert bool(words[page >> 3] >> (page & 7) & 1) == any(content)
        if any(content):
            assert data[big + page * PAGE :][:PAGE] == content
    assert data.endswith((0x10).to_bytes(8, "big") + b"behind")


def test_restoring_reads_only_what_is_there(directory: Path) -> None:
    sources, targets = memories(), memories()
    path = directory / "file"
    with channel_to(path) as channel:
        out = OutputStream(channel)
        with closing(MappedRamSource([m.block for m in sources], QuietLog(), out, Options())) as ram:
            sources[0].write(1000 * PAGE, b"x" * 10 * PAGE)
            out.write(b"before")
            ram.write_block_list()
            for _ in range(3):
                out.write_be64(0x10)
            ram.write_rest()
            out.write(b"behind")
            out.flush()
    before = bytes_read()
    load(path, targets)
    assert bytes_read() - before < MIB
    assert targets[0].contents() == sources[0].contents()
    assert path.stat().st_blocks * 512 < MIB


def bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def test_pages_go_by_direct_io_where_the_file_system_has_it(directory: Path) -> None:
    path = directory / "file"
    chance = random.Random(3)
    sources, targets = memories(), memories()
    scribble(sources[0], chance, 1000)
    save(path, sources, chance)
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        with pytest.raises(ChannelError, match=r"Could not open .*: Invalid argument"):
            load(path, targets, channels=2, direct_io=True)
        return
    load(path, targets, channels=2, direct_io=True)
    assert [m.contents() for m in targets] == [m.contents() for m in sources]


def test_the_recording_of_a_real_qemu_comes_out_as_its_memory(directory: Path) -> None:
    def unpacked(name: str) -> bytes:
        return zstandard.ZstdDecompressor().decompressobj().decompress((RECORDED / name).read_bytes())

    path = directory / "file"
    data = unpacked("q100-mapped-ram-live.mig.zst")
    path.write_bytes(data)
    targets = [Memory("pc.ram", 16 * MIB), Memory("pc.rom", 128 << 10), Memory("pc.bios", 64 << 10)]
    with channel_from(path) as channel:
        stream, landing = InputStream(channel), Landing([m.block for m in targets])
        stream.go_to(data.index(b"\3ram\0\0\0\0\0\0\0\4") + 12)
        with closing(PageFiles(channel, Options(2), "dst/recv")) as files:
            loader = RamLoader(stream, landing)
            loader.load_pages = MappedLoader(stream, landing, files, lambda: None).load_block
            loader.load_body()
            assert stream.read_u8() == 0x7E
    memory, hole = unpacked("q100-mapped-ram-live.mem.zst"), slice(0xA0000, 0x100000)
    ours = bytearray(targets[0].contents())
    ours[hole] = memory[hole]
    assert ours == memory


# ---- lies ----

LENGTH = 64 * PAGE


def file_with(
    version: int = 1, page_size: int = PAGE, bitmap: int = 0, pages: int = MIB, *, size: int = MIB + LENGTH + 8
) -> bytes:
    """One block "ram", whose header says what is told; *bitmap* is off by so much."""
    entry = struct.pack(">Q", LENGTH | 4) + b"\3ram" + struct.pack(">Q", LENGTH)
    here = len(entry) + HEADER.size
    data = entry + HEADER.pack(version, page_size, here + bitmap, pages) + b"\xff" * 8
    return data + bytes(size - len(data))


LIES = {
    "version": (file_with(version=2), "'ram' has version 2, expected 1"),
    "no version": (file_with(version=0), "'ram' has version 0, expected 1"),
    "page size": (file_with(page_size=1), "says pages of 1 bytes, expected 4096"),
    "huge pages": (file_with(page_size=1 << 63), "says pages of 9223372036854775808 bytes, expected 4096"),
    "bitmap elsewhere": (file_with(bitmap=8), "puts the bitmap at 0x38, expected 0x30, behind it"),
    "pages over the bitmap": (file_with(pages=0), "puts the pages at 0x0, expected a multiple of 4096 from 0x38 on"),
    "pages askew": (file_with(pages=MIB + 512), "puts the pages at 0x100200, expected a multiple of 4096"),
    "pages behind the file": (file_with(pages=MIB + PAGE), "lets the pages end at 0x141000, the file has 0x140008 bytes"),
    "pages far out": (file_with(pages=(1 << 64) - PAGE), "lets the pages end at 0x1000000000003f000, the file has"),
    "pages at the last position": (file_with(pages=(1 << 63) - PAGE), "lets the pages end at 0x800000000003f000"),
    "a page record": (file_with()[: MIB + LENGTH] + struct.pack(">Q", 8) + b"\3ram", "with mapped-ram pages are no"),
    "a zero record": (file_with()[: MIB + LENGTH] + struct.pack(">Q", 2) + b"\3ram", "head 0x2 has flags 0x2"),
    "a delta": (file_with()[: MIB + LENGTH] + struct.pack(">Q", 0x40), "head 0x40 has flags 0x40 .*XBZRLE"),
    "a flush": (file_with()[: MIB + LENGTH] + struct.pack(">Q", 0x200), "head 0x200 has flags 0x200"),
    "a hook": (file_with()[: MIB + LENGTH] + struct.pack(">Q", 0x80), "head 0x80 has flags 0x80"),
    "too short a header": (file_with()[:30], "stream ends inside the mapped-ram header of block 'ram' at offset 0x1e"),
    "too short a bitmap": (file_with()[:50], "lets the pages end at 0x140000, the file has 0x32 bytes"),
}  # fmt: skip


def load_lie(path: Path, look_round: object = lambda: None) -> Memory:
    target = Memory("ram", LENGTH)
    with channel_from(path) as channel:
        stream, landing = InputStream(channel), Landing([target.block])
        with closing(PageFiles(channel, Options(), "dst/recv")) as files:
            loader = RamLoader(stream, landing)
            loader.load_pages = MappedLoader(stream, landing, files, look_round).load_block  # type: ignore[arg-type]
            loader.load_body()
    return target


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused_with_its_place(directory: Path, lie: str) -> None:
    data, finding = LIES[lie]
    (directory / "file").write_bytes(data)
    with pytest.raises(StreamError, match=finding) as caught:
        load_lie(directory / "file")
    assert caught.value.offset is not None


def test_a_file_cut_while_it_is_read_is_refused(directory: Path) -> None:
    path = directory / "file"
    path.write_bytes(file_with()[: MIB + LENGTH] + (0x10).to_bytes(8, "big"))
    load_lie(path)
    target = Memory("ram", LENGTH)
    with channel_from(path) as channel:
        stream, landing = InputStream(channel), Landing([target.block])
        with closing(PageFiles(channel, Options(), "dst/recv")) as files:
            loader = MappedLoader(stream, landing, files, lambda: None)
            stream.go_to(20)
            region = loader._read_header(target.block)
            region.bitmap.set_all()
            os.truncate(path, MIB + 40 * PAGE)
            with pytest.raises(StreamError, match="the file ends within the pages of block 'ram' that begin at 0x100000"):
                region.read(channel.read_fd, landing, 0, Ranges([(0, 64)]))


def test_a_load_that_is_to_end_ends_between_two_batches(directory: Path) -> None:
    (directory / "file").write_bytes(file_with())

    def quit_now() -> None:
        raise MigrationCancelled("enough")

    with pytest.raises(MigrationCancelled, match="enough"):
        load_lie(directory / "file", quit_now)


def test_what_is_no_file_is_refused() -> None:
    with channel_pair() as (left, right):
        with pytest.raises(ChannelError, match=r"socket 'left' has no position .* expected a file"):
            OutputStream(left).file_position()
        with pytest.raises(ChannelError, match="expected a file"):
            InputStream(right).go_to(5)
        with pytest.raises(ChannelError, match="cannot be opened again, as mapped-ram with multifd needs"):
            PageFiles(left, Options(2), "src/send")


def test_a_file_that_takes_no_more_is_named_by_its_error(directory: Path) -> None:
    """As on a full disk; here by the limit that a process may have for its files."""
    sources = memories()
    sources[0].write(0, b"x" * PAGE * 100)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with channel_to(directory / "file") as channel:
        out = OutputStream(channel)
        with closing(MappedRamSource([m.block for m in sources], QuietLog(), out, Options(2))) as ram:
            ram.write_block_list()
            resource.setrlimit(resource.RLIMIT_FSIZE, (MIB + 10 * PAGE, limits[1]))
            try:
                with pytest.raises(ChannelError, match="Unable to write to file: File too large"):
                    ram.write_rest()
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_ranges_go_to_one_thread_each_and_to_none_after_an_error(directory: Path) -> None:
    source = Memory("ram", 640 * PAGE)
    source.write(0, b"x" * 640 * PAGE)
    region = Region(source.block, 0, 0)
    with channel_to(directory / "file") as channel:
        for in_turns in (False, True):
            dirty = DirtyPages([source.block], QuietLog())
            ranges = Ranges([(0, 64), (128, 256), (512, 64)], in_turns=in_turns)
            with ThreadPoolExecutor(4) as pool:
                done = list(pool.map(lambda _: region.write(channel.write_fd, dirty, 0, ranges), range(4)))  # noqa: B023
            assert sum(normal for _, normal in done) == 384 == 640 - dirty.remaining
        for beyond in ((640, 1), (576, 65), (1, 1), ((1 << 64) - 64, 64)):
            with pytest.raises(ValueError, match="of block 'ram', which has 640"):
                region.write(channel.write_fd, dirty, 0, Ranges([beyond]))
        ranges = Ranges([(64, 64), (384, 128)])
        with pytest.raises(ChannelError, match="Unable to write to file: Bad file descriptor"):
            region.write(-1, dirty, 0, ranges)
        assert region.write(channel.write_fd, dirty, 0, ranges) == (0, 0)


def test_strides_follow_the_speed() -> None:
    stride = Stride()
    assert stride.bytes == SHORTEST_STRIDE
    stride.learn(100 << 20, time.monotonic() - 0.05)
    assert 80 << 20 <= stride.bytes <= 100 << 20 and stride.bytes % SHORTEST_STRIDE == 0
    stride.learn(1 << 40, time.monotonic())
    assert stride.bytes == LONGEST_STRIDE
    stride.learn(0, time.monotonic() - 1)
    assert stride.bytes == SHORTEST_STRIDE
