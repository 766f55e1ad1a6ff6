"""mapped-ram: guest pages at fixed places of a file, the stream around them (ram.md §10, channels.md §7).

    stream … │ block's entry │ header │ bitmap │ hole │ pages of the block │ next block's entry │ … │ EOS │ …
              name, length     28 bytes  a bit     up to      a place for        offsets are those of the file
                                         a page    1 MiB      every page

A page that is written again goes to the same place, so the file never grows with the rounds; a page of zeroes is a clear
bit and nothing else, so the file has holes where the guest has nothing.  The bitmaps are written last, in the END section.
Sections hold no page records: PART and END are nothing but EOS.

With capability `multifd` the file is opened once more for each channel, with O_DIRECT if `direct-io` asks for it, and each
channel's thread moves ranges of its own.  What the file looks like does not depend on that, nor does the number of channels
that load it.

Threads   the migration thread, and `mig/src/send_N` or `mig/dst/recv_N`, one a channel, which PageFiles owns
Holds     (1) all ranges of one call are done when it returns, so two versions of a page never fly at once
          (2) every number of a header was compared with what the file and the block have before it is used
"""

from __future__ import annotations

import itertools
import os
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from typing import NoReturn, TypeVar

from .. import trace
from ..channels.channel import Channel
from ..channels.file import FileChannel
from ..errors import ChannelError, StreamError
from ..machine import DirtyLog
from ..options import MigrationOptions
from ..threads import take_name
from ..wire.format import (
    MAPPED_RAM_FILE_OFFSET_ALIGNMENT,
    MAPPED_RAM_HDR_SIZE,
    MAPPED_RAM_HDR_VERSION,
    TARGET_PAGE_SIZE,
)
from ..wire.stream import InputStream, OutputStream
from .block import RAMBlock
from .dirty import DirtyPages
from .landing import Landing
from .live import RamSource, Sender
from .region import Ranges, Region

HEADER = struct.Struct(">IQQQ")  # version, page size, bitmap offset, pages offset: MAPPED_RAM_HDR_SIZE bytes
ALIGNMENT = MAPPED_RAM_FILE_OFFSET_ALIGNMENT
RANGE_PAGES = 1024  # 4 MiB, some huge pages: moved by one thread at a time
STRIDE_S = 0.05  # threads that wait for each other do so this often; so long takes a cancel, too
SHORTEST_STRIDE = 8 << 20
LONGEST_STRIDE = 256 << 20

Result = TypeVar("Result")


class PageFiles:
    """The descriptors through which pages of *channel*'s file move, and a thread for each when there are several.

    *role*: "src/send" or "dst/recv", for the names of the threads.
    """

    def __init__(self, channel: Channel, options: MigrationOptions, role: str) -> None:
        self.cached = not options.parameter("direct-io")  # what is written goes to the kernel's cache
        self._own: list[int] = []
        self._pool: ThreadPoolExecutor | None = None
        self._fd = channel.write_fd if channel.write_fd >= 0 else channel.read_fd
        if not options.capability("multifd"):
            return
        if not isinstance(channel, FileChannel):
            raise ChannelError(f"{channel.kind} '{channel.name}' cannot be opened again, as mapped-ram with multifd needs")
        count = options.parameter("multifd-channels")
        numbers = itertools.count()
        self._pool = ThreadPoolExecutor(count, initializer=lambda: take_name(f"mig/{role}_{next(numbers)}"))
        try:
            for _ in range(count):
                self._own.append(channel.open_again(0 if self.cached else os.O_DIRECT))
        except ChannelError:
            self.close()
            raise

    def run(self, job: Callable[[int], Result]) -> list[Result]:
        """What *job* returned in each thread, called with a descriptor; all have ended when this returns or raises."""
        if self._pool is None:
            return [job(self._fd)]
        futures = [self._pool.submit(job, fd) for fd in self._own]
        wait(futures)
        return [future.result() for future in futures]

    def close(self) -> None:
        """End the threads and close what was opened for them."""
        if self._pool is not None:
            self._pool.shutdown()
        while self._own:
            os.close(self._own.pop())


class Stride:
    """How many bytes of memory to go through before all threads wait for each other: what STRIDE_S is enough for."""

    def __init__(self) -> None:
        self.bytes = SHORTEST_STRIDE

    def learn(self, done: int, start_s: float) -> None:
        """To go through *done* bytes took from *start_s* (time.monotonic) until now."""
        allowed = int(done * STRIDE_S / max(time.monotonic() - start_s, 1e-6))
        self.bytes = max(SHORTEST_STRIDE, min(allowed, LONGEST_STRIDE)) // SHORTEST_STRIDE * SHORTEST_STRIDE


# ---- source ----


class MappedSender:
    """Writes the dirty pages of *dirty* to *files*, in the order of the walk.  Counts are in target pages."""

    def __init__(self, dirty: DirtyPages, regions: Sequence[Region], files: PageFiles) -> None:
        self._dirty = dirty
        self._regions = regions
        self._files = files
        self._block = self._page = 0  # where the walk stands
        self.zero_pages = self.normal_pages = 0
        self.last_stage = False

    @property
    def handled_pages(self) -> int:
        return self.zero_pages + self.normal_pages

    @property
    def written_bytes(self) -> int:
        """Bytes of pages that went to their places."""
        return self.normal_pages * TARGET_PAGE_SIZE

    def send(self, byte_limit: int, page_limit: int) -> bool:
        """Write dirty pages, about *byte_limit* bytes and at most some more than *page_limit*; True when none is left."""
        end = self.written_bytes + byte_limit
        last = self.handled_pages + page_limit
        while self._dirty.remaining and self.written_bytes < end and self.handled_pages < last:
            allowed = min(last - self.handled_pages, -(-(end - self.written_bytes) // TARGET_PAGE_SIZE))
            ranges = Ranges(self._next_ranges(allowed), in_turns=self._files.cached)
            region = self._regions[self._block]
            job = partial(region.write, dirty=self._dirty, block_index=self._block, ranges=ranges)
            for zero, normal in self._files.run(job):
                self.zero_pages += zero
                self.normal_pages += normal
        return not self._dirty.remaining

    def _next_ranges(self, allowed: int) -> list[tuple[int, int]]:
        """The next ranges with dirty pages, all of one block: *allowed* pages if all of them are dirty, in whole words.

        A range lies in one chunk, which is protected again first.
        """
        ranges = list(self._ranges_of_block(allowed))
        for _ in range(self._dirty.block_count):  # once round
            if ranges:
                break
            self._block = (self._block + 1) % self._dirty.block_count
            self._page = 0
            ranges = list(self._ranges_of_block(allowed))
        return ranges

    def _ranges_of_block(self, allowed: int) -> Iterator[tuple[int, int]]:
        bitmap = self._dirty.bitmaps[self._block]
        while allowed > 0 and (page := bitmap.next_set(self._page)) < bitmap.bits:
            first = page & ~63
            chunk_end = ((page >> self._dirty.chunk_shift) + 1) << self._dirty.chunk_shift
            count = min(RANGE_PAGES, -(-allowed // 64) * 64, chunk_end - first, bitmap.bits - first)
            self._dirty.visit_if_new(self._block, first)
            allowed -= count
            self._page = first + count
            yield first, count


class MappedRamSource(RamSource):
    """All of RAM on its way into a file, each page to its place."""

    def __init__(self, blocks: Sequence[RAMBlock], log: DirtyLog, out: OutputStream, options: MigrationOptions) -> None:
        self._files = PageFiles(out.channel, options, "src/send")
        self._regions: list[Region] = []
        self._stride = Stride()
        super().__init__(blocks, log, out, options)

    def _new_sender(self) -> Sender:
        return MappedSender(self.dirty, self._regions, self._files)

    def start_scout(self) -> None:
        """None: threads look for zeroes in ranges of their own."""

    @property
    def sent_bytes(self) -> int:
        return self._out.offset + self.sender.normal_pages * TARGET_PAGE_SIZE

    @property
    def step_bytes(self) -> int:
        return self._stride.bytes

    def _send_step(self, limit: int) -> bool:
        handled, start_s = self.sender.handled_pages, time.monotonic()
        is_clean = self.sender.send(limit, self.step_bytes // TARGET_PAGE_SIZE)
        self._stride.learn((self.sender.handled_pages - handled) * TARGET_PAGE_SIZE, start_s)
        return is_clean

    def write_entry(self, block: RAMBlock) -> None:
        """An entry of the block list, with the header behind it, and room for the bitmap and the pages behind that."""
        super().write_entry(block)
        bitmap_offset = self._out.file_position() + MAPPED_RAM_HDR_SIZE
        pages_offset = -(-(bitmap_offset + bitmap_size(block.pages)) // ALIGNMENT) * ALIGNMENT
        trace.mapped_ram_save_block(block.idstr, bitmap_offset, pages_offset)
        if block in self.blocks:  # what the destination has already gets a place, too, but nothing goes there
            self._regions.append(Region(block, bitmap_offset, pages_offset))
        self._out.write(HEADER.pack(MAPPED_RAM_HDR_VERSION, TARGET_PAGE_SIZE, bitmap_offset, pages_offset))
        self._out.go_to(pages_offset + block.used_length)

    def finish_pages(self) -> None:
        """The bitmaps: which pages are in the file is known now."""
        trace.mapped_ram_save_bitmaps(self.sender.normal_pages, self.sender.zero_pages)
        here = self._out.file_position()
        for region in self._regions:
            self._out.go_to(region.bitmap_offset)
            self._out.write(memoryview(region.bitmap).cast("B"))
        self._out.go_to(here)

    def close(self) -> None:
        self._files.close()
        super().close()


def bitmap_size(pages: int) -> int:
    """Bytes of a block's bitmap: whole words."""
    return -(-pages // 64) * 8


# ---- destination ----


class MappedLoader:
    """Loads the pages of blocks from the file behind *stream*, each when its entry in the block list is read.

    *look_round* is called now and then, and may raise.
    """

    def __init__(self, stream: InputStream, landing: Landing, files: PageFiles, look_round: Callable[[], None]) -> None:
        self._stream = stream
        self._landing = landing
        self._files = files
        self._look_round = look_round

    def load_block(self, index: int) -> int:
        """Read the header that the stream is at and what belongs to it; returns how many pages came."""
        block = self._landing.blocks[index]
        region = self._read_header(block)
        if self._landing.is_ignored(block):
            self._stream.go_to(region.pages_offset + block.used_length)
            return 0
        self._stream.fill(memoryview(region.bitmap).cast("B"), f"the bitmap of block '{block.idstr}'")
        loaded = 0
        first, stride = 0, Stride()
        while first < block.pages:
            end, start_s = min(first + stride.bytes // TARGET_PAGE_SIZE, block.pages), time.monotonic()
            ranges = Ranges((at, min(RANGE_PAGES, end - at)) for at in range(first, end, RANGE_PAGES))
            loaded += sum(self._files.run(partial(region.read, landing=self._landing, block_index=index, ranges=ranges)))
            stride.learn((end - first) * TARGET_PAGE_SIZE, start_s)
            first = end
            self._look_round()
        self._stream.go_to(region.pages_offset + block.used_length)
        trace.mapped_ram_load_block_end(block.idstr, loaded)
        return loaded

    def _read_header(self, block: RAMBlock) -> Region:
        """The header of *block*'s pages, compared with what the block and the file have."""
        place = self._stream.offset
        what = f"the mapped-ram header of block '{block.idstr}'"
        version, page_size, bitmap_offset, pages_offset = HEADER.unpack(self._stream.read(HEADER.size, what))
        here, end = self._stream.file_position(), os.fstat(self._stream.channel.read_fd).st_size
        bitmap_end = here + bitmap_size(block.pages)
        if version != MAPPED_RAM_HDR_VERSION:
            refuse(place, f"{what} has version {version}, expected {MAPPED_RAM_HDR_VERSION}")
        if page_size != TARGET_PAGE_SIZE:
            refuse(place, f"{what} says pages of {page_size} bytes, expected {TARGET_PAGE_SIZE}")
        if bitmap_offset != here:
            refuse(place, f"{what} puts the bitmap at {bitmap_offset:#x}, expected {here:#x}, behind it")
        if pages_offset < bitmap_end or pages_offset % TARGET_PAGE_SIZE:
            expected = f"expected a multiple of {TARGET_PAGE_SIZE} from {bitmap_end:#x} on, where the bitmap ends"
            refuse(place, f"{what} puts the pages at {pages_offset:#x}, {expected}")
        if pages_offset + block.used_length > end:
            pages_end = pages_offset + block.used_length
            refuse(place, f"{what} lets the pages end at {pages_end:#x}, the file has {end:#x} bytes")
        trace.mapped_ram_load_block(block.idstr, bitmap_offset, pages_offset)
        return Region(block, bitmap_offset, pages_offset)


def refuse(place: int, finding: str) -> NoReturn:
    raise StreamError(f"section 'ram' instance 0 at offset {place:#x}: {finding}", offset=place, section="ram")
