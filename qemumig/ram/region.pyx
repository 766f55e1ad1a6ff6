"""Region: the pages of one RAM block at their fixed places in a file (ram.md §10).

    file   … │ bitmap: a bit a page, set where it is in the file │ up to 1 MiB of nothing │ page 0 │ page 1 │ … │
                └ bitmap_offset                                                             └ pages_offset

Save   dirty pages of a range: zero ones lose their bit, runs of the others go to their places by one pwrite each
Load   runs of set bits come straight into guest memory by pread; a page whose bit is clear is zero

Threads   any number at once, each with a range of its own: a range begins at a multiple of 64 pages, so the words of all
          bitmaps belong to one thread.  No GIL inside.
Holds     (1) a page's dirty bit is cleared before its bytes are looked at
          (2) nothing outside of [pages_offset, pages_offset + pages) is read or written
          (3) after a load that was not into fresh memory, pages that are not in the file are zero
"""

import os

from libc.errno cimport EINTR, errno
from libc.stdint cimport uint8_t, uint64_t

from ..encode.zero cimport is_zero
from ..errors import ChannelError, StreamError
from ..wire.format cimport TARGET_PAGE_SIZE
from .bitmap cimport Bitmap, clear_bit, clear_run, find_next_set, set_bit, test_bit
from .block cimport RAMBlock
from .dirty cimport DirtyPages, PageBlock
from .landing cimport Landing, LoadBlock

cdef extern from "<unistd.h>" nogil:
    ssize_t pread(int fd, void *buffer, size_t length, long offset)
    ssize_t pwrite(int fd, const void *buffer, size_t length, long offset)

cdef struct Outcome:
    uint64_t zero_pages
    uint64_t normal_pages
    int error                     # errno of what failed, −1: the file ends too early; 0 while all is well


cdef class Region:
    """The pages of *block*; see region.pyi."""

    cdef readonly Bitmap bitmap
    cdef readonly uint64_t bitmap_offset
    cdef readonly uint64_t pages_offset
    cdef readonly str idstr

    def __cinit__(self, RAMBlock block not None, uint64_t bitmap_offset, uint64_t pages_offset):
        self.idstr = block.idstr
        self.bitmap = Bitmap(block.used_length // TARGET_PAGE_SIZE)
        self.bitmap_offset = bitmap_offset
        self.pages_offset = pages_offset

    # ---- save ----

    cdef int write_run(self, int fd, const uint8_t *host, uint64_t first, uint64_t end) noexcept nogil:
        """Write pages [first, end) to their places; an errno, 0 when they are there."""
        cdef uint64_t done = first * TARGET_PAGE_SIZE, limit = end * TARGET_PAGE_SIZE
        cdef ssize_t written
        while done < limit:
            written = pwrite(fd, host + done, limit - done, self.pages_offset + done)
            if written >= 0:
                done += written
            elif errno != EINTR:
                return errno
        return 0

    cdef void write_range(self, int fd, PageBlock *block, uint64_t first, uint64_t end, Outcome *outcome) noexcept nogil:
        cdef uint64_t page = first, run = first    # [run, page): dirty, not zero, and not written yet
        cdef bint dirty
        while outcome.error == 0:
            dirty = page < end and test_bit(block.dirty, page)
            if dirty:
                clear_bit(block.dirty, page)
                if test_bit(block.populated, page) and not is_zero(
                    block.host + page * TARGET_PAGE_SIZE, TARGET_PAGE_SIZE
                ):
                    set_bit(self.bitmap.words, page)
                    outcome.normal_pages += 1
                    page += 1
                    continue
                clear_bit(self.bitmap.words, page)
                outcome.zero_pages += 1
            if page > run:
                outcome.error = self.write_run(fd, block.host, run, page)
            if page >= end:
                return
            page = page + 1 if dirty else find_next_set(block.dirty, page, end)
            run = page

    def write(self, int fd, DirtyPages dirty not None, int block_index, uint64_t first, uint64_t count):
        """Write what is dirty of a range; see region.pyi."""
        cdef Outcome outcome = Outcome(0, 0, 0)
        cdef PageBlock *block
        if not 0 <= block_index < dirty.block_count:
            raise IndexError(f"block {block_index} of {dirty.block_count}")
        block = &dirty.table[block_index]
        self.check_range(first, count, block.pages)
        with nogil:
            self.write_range(fd, block, first, first + count, &outcome)
        dirty.remaining -= outcome.zero_pages + outcome.normal_pages
        if outcome.error:
            raise ChannelError(f"Unable to write to file: {os.strerror(outcome.error)}", errno=outcome.error)
        return outcome.zero_pages, outcome.normal_pages

    # ---- load ----

    cdef int read_run(self, int fd, uint8_t *host, uint64_t first, uint64_t end) noexcept nogil:
        cdef uint64_t done = first * TARGET_PAGE_SIZE, limit = end * TARGET_PAGE_SIZE
        cdef ssize_t received
        while done < limit:
            received = pread(fd, host + done, limit - done, self.pages_offset + done)
            if received > 0:
                done += received
            elif received == 0:
                return -1
            elif errno != EINTR:
                return errno
        return 0

    cdef void read_range(
        self, int fd, Landing landing, LoadBlock *block, uint64_t first, uint64_t end, Outcome *outcome
    ) noexcept nogil:
        cdef uint64_t page = first, limit
        while page < end and outcome.error == 0:
            limit = find_next_set(self.bitmap.words, page, end)
            if not block.fresh:
                while page < limit:
                    landing.clear_page(block, page)
                    page += 1
            page = limit
            while limit < end and test_bit(self.bitmap.words, limit):
                landing.note_received(block, limit)
                limit += 1
            if page < limit:
                outcome.error = self.read_run(fd, block.host, page, limit)
                outcome.normal_pages += limit - page
            page = limit

    def read(self, int fd, Landing landing not None, int block_index, uint64_t first, uint64_t count):
        """Read what the file has of a range; see region.pyi."""
        cdef Outcome outcome = Outcome(0, 0, 0)
        cdef LoadBlock *block
        if not 0 <= block_index < landing.block_count:
            raise IndexError(f"block {block_index} of {landing.block_count}")
        block = &landing.table[block_index]
        self.check_range(first, count, block.pages)
        with nogil:
            self.read_range(fd, landing, block, first, first + count, &outcome)
        if outcome.error == -1:
            place = self.pages_offset + first * TARGET_PAGE_SIZE
            raise StreamError(
                f"section 'ram' instance 0: the file ends within the pages of block '{self.idstr}' that begin at {place:#x}",
                offset=place,
                section="ram",
            )
        if outcome.error:
            raise ChannelError(f"Unable to read from file: {os.strerror(outcome.error)}", errno=outcome.error)
        return outcome.normal_pages

    def is_empty(self, uint64_t first, uint64_t count) -> bool:
        """True when the file has nothing of a range; see region.pyi."""
        self.check_range(first, count, self.bitmap.bits)
        return clear_run(self.bitmap.words, first, first + count) == count

    cdef int check_range(self, uint64_t first, uint64_t count, uint64_t pages) except -1:
        if pages != self.bitmap.bits or first > pages or count > pages - first or first % 64:
            raise ValueError(f"{count} pages from {first} on of block '{self.idstr}', which has {self.bitmap.bits}")
        return 0
