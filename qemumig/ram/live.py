"""The live section `ram` of the source: START, PART, END (ram.md §1, §3, §7).

START   the list of blocks, before any page
PART    pages, for 50 ms or as long as the rate limit allows
END     the guest is stopped: the last sync, then everything that is left

The options decide how pages go out; what they decide is settled here once, before the first page.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

from ..errors import OptionError
from ..machine import DirtyLog
from ..options import MigrationOptions
from ..wire.format import RAM_SECTION_VERSION, TARGET_PAGE_SIZE, RamSaveFlag
from ..wire.stream import OutputStream
from .block import RAMBlock
from .cache import PageCache
from .dirty import DirtyPages
from .save import PageSender
from .scout import Scout

IDSTR = "ram"
INSTANCE_ID = 0
VERSION_ID = RAM_SECTION_VERSION

PART_DURATION_S = 0.05
STEP_BYTES = 8 << 20  # at a time, before the clock is looked at
STEP_PAGES = 1 << 15
UNLIMITED = 1 << 62
CACHE_SIZE = "xbzrle-cache-size"


class Sender(Protocol):
    """What moves dirty pages; counts are in target pages."""

    zero_pages: int
    normal_pages: int
    last_stage: bool

    @property
    def handled_pages(self) -> int:
        """All that were dealt with."""

    def send(self, byte_limit: int, page_limit: int) -> bool:
        """Send about *byte_limit* bytes of dirty pages, about *page_limit* pages at most; True when none is left."""


class RamSource:
    """All of RAM on its way into one stream.  Sizes in bytes.

    With `x-ignore-shared`, memory that the destination has already is listed, but neither sent nor counted (ram.md §9).
    """

    def __init__(self, blocks: Sequence[RAMBlock], log: DirtyLog, out: OutputStream, options: MigrationOptions) -> None:
        # by descending length, as QEMU lists and walks them
        self._listed = sorted(blocks, key=lambda block: -block.used_length)
        self._ignore_shared = options.capability("x-ignore-shared")
        self.blocks = [block for block in self._listed if not (self._ignore_shared and block.is_at_both_ends)]
        self._out = out
        self._options = options
        self.cache = new_cache(options.parameter(CACHE_SIZE)) if options.capability("xbzrle") else None
        self.dirty = DirtyPages(self.blocks, log, options.migration_property("x-clear-bitmap-shift"))
        self.sender: Sender = self._new_sender()
        self._scout: Scout | None = None
        self._refused_size = 0  # of a cache for which there was no memory
        self.total = sum(block.used_length for block in self.blocks)

    def _new_sender(self) -> Sender:
        sender = PageSender(self.dirty, self._out)
        sender.encode_with(self.cache)
        if self._options.migration_property("x-compress"):
            sender.compress_at(self._options.migration_property("x-compress-level"))
        return sender

    @property
    def step_bytes(self) -> int:
        """How much to send before the clock is looked at."""
        return STEP_BYTES

    @property
    def remaining(self) -> int:
        """Bytes of dirty pages."""
        return self.dirty.remaining * TARGET_PAGE_SIZE

    @property
    def sent_bytes(self) -> int:
        """Bytes sent so far in whatever way, all of the stream included."""
        return self._out.offset

    @property
    def zero_pages(self) -> int:
        """Sent as such."""
        return self.sender.zero_pages

    @property
    def normal_pages(self) -> int:
        """Sent in full, also compressed."""
        return self.sender.normal_pages

    @property
    def multifd_bytes(self) -> int:
        """Of `sent_bytes`, those on further channels."""
        return 0

    @property
    def missed_zero_copy(self) -> int:
        """Sync points before which the kernel had copied what it was asked not to copy."""
        return 0

    @property
    def sent_pages(self) -> int:
        """Pages dealt with: sent in one form or another, or found to be at the destination already."""
        return self.sender.handled_pages

    @property
    def data_pages(self) -> int:
        """Of those, the ones that were not zero."""
        return self.sent_pages - self.zero_pages

    def write_block_list(self) -> None:
        """START's body."""
        total = sum(block.used_length for block in self._listed)
        self._out.write_be64(total | RamSaveFlag.RAM_SAVE_FLAG_MEM_SIZE)
        for block in self._listed:
            self.write_entry(block)
        self._end_body()

    def write_entry(self, block: RAMBlock) -> None:
        """One entry of the block list."""
        name = block.idstr.encode()
        self._out.write(bytes([len(name)]) + name + block.used_length.to_bytes(8, "big"))
        if self._options.capability("postcopy-ram") and block.page_size != TARGET_PAGE_SIZE:
            self._out.write_be64(block.page_size)
        if self._ignore_shared:
            self._out.write_be64(block.guest_address)

    def write_part(self, allowance: int) -> None:
        """PART's body: dirty pages, about *allowance* bytes of them, for no longer than 50 ms."""
        self._follow_cache_size()
        deadline = time.monotonic() + PART_DURATION_S
        end = self.sent_bytes + allowance
        while (left := end - self.sent_bytes) > 0 and not self._send_step(min(self.step_bytes, left)):
            if time.monotonic() > deadline:
                break
        self._end_body()

    def _send_step(self, limit: int) -> bool:
        """Send about *limit* bytes; True when nothing is left."""
        return self.sender.send(limit, STEP_PAGES)

    def _end_body(self) -> None:
        """End the body of a section."""
        self._out.write_be64(RamSaveFlag.RAM_SAVE_FLAG_EOS)

    def finish_pages(self) -> None:
        """Every page has been sent, and none will be again."""

    def end_period(self) -> None:
        """A period of the dirty rate is over: settle the rates that cover it."""
        if self.cache is not None:
            self.cache.end_period(self.sent_pages)

    def _follow_cache_size(self) -> None:
        """Give the cache the size that somebody has set meanwhile; it keeps its size where there is no memory for that.

        Between two sections nothing on the stream refers to its copies.
        """
        size = self._options.parameter(CACHE_SIZE)
        if self.cache is None or size in (self.cache.size, self._refused_size):
            return
        try:
            self.cache.resize(size)
        except MemoryError:
            self._refused_size = size

    def start_scout(self) -> None:
        """Let a thread go ahead of the one that sends: there is a core for it."""
        self._scout = Scout(self.dirty)
        self.dirty.tell(self._scout)

    def end_scout(self) -> None:
        """Nobody goes ahead any more, if anybody did."""
        if self._scout is not None:
            self.dirty.tell(None)
            self._scout.close()
            self._scout = None

    def close(self) -> None:
        """Give the descriptors back; the figures stay."""
        self.dirty.close()

    def write_rest(self) -> None:
        """END's body: the guest is stopped and the last sync done; everything that is left."""
        self.sender.last_stage = True
        while not self.sender.send(UNLIMITED, STEP_PAGES):
            pass
        self.finish_pages()
        self._end_body()


def new_cache(size: int) -> PageCache:
    """A page cache of *size* bytes; OptionError when there is no memory for it."""
    try:
        return PageCache(size)
    except MemoryError as error:
        raise OptionError(f"{CACHE_SIZE} {size}: {error}", name=CACHE_SIZE, value=size) from error
