"""Region: the pages of one RAM block at their fixed places in a file (ram.md §10).

    file   … │ bitmap: a bit a page, set where it is in the file │ up to 1 MiB of nothing │ page 0 │ page 1 │ … │
                └ bitmap_offset                                                             └ pages_offset

Save   dirty pages of a range: zero ones lose their bit, runs of the others go to their places by one pwrite each.  Into
       its cache the kernel lets one thread of a file write at a time, and the others spin: here they sleep, and it costs
       half as much
Load   runs of set bits come straight into guest memory by pread; a page whose bit is clear is zero

Threads   any number at once; each takes a range, and the next one when it is done with that: so none waits for another
          that the disk is slower to serve.  A range begins at a multiple of 64 pages, so the words of all bitmaps belong
          to one thread.  No GIL inside.
Holds     (1) a page's dirty bit is cleared before its bytes are looked at
          (2) nothing outside of [pages_offset, pages_offset + pages) is read or written
          (3) after a load that was not into fresh memory, pages that are not in the file are zero
"""

import os

from libc.errno cimport EINTR, errno
from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport free, malloc

from ..encode.zero cimport is_zero
from ..errors import ChannelError, StreamError
from ..multifd.locks cimport (
    pthread_mutex_destroy,
    pthread_mutex_init,
    pthread_mutex_lock,
    pthread_mutex_t,
    pthread_mutex_unlock,
)
from ..wire.format cimport TARGET_PAGE_SIZE
from .bitmap cimport SEQ_CST, Bitmap, atomic_fetch_add, clear_bit, find_next_set, set_bit, test_bit
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


cdef struct Range:                # of a block's pages
    uint64_t first
    uint64_t count


cdef class Ranges:
    """Ranges of one block, each for one thread; see region.pyi."""

    cdef Range *table
    cdef uint64_t length
    cdef uint64_t taken           # atomic; beyond the length once all are
    cdef bint in_turns            # one thread at a time writes …
    cdef pthread_mutex_t turn     # … the one that has this

    def __cinit__(self, ranges, *, bint in_turns=False):
        pairs = list(ranges)
        pthread_mutex_init(&self.turn, NULL)
        self.in_turns = in_turns
        self.table = <Range *> malloc(max(len(pairs), 1) * sizeof(Range))
        if self.table == NULL:
            raise MemoryError("no memory for a list of ranges")
        for first, count in pairs:
            self.table[self.length] = Range(first, count)
            self.length += 1

    def __dealloc__(self):
        free(self.table)
        pthread_mutex_destroy(&self.turn)

    cdef Range *take(self) noexcept nogil:
        """The next range; NULL when there is none left."""
        cdef uint64_t index = atomic_fetch_add(&self.taken, 1, SEQ_CST)
        return &self.table[index] if index < self.length else NULL

    cdef void give_up(self) noexcept nogil:
        """Let nobody take a range any more."""
        atomic_fetch_add(&self.taken, self.length, SEQ_CST)


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

    cdef int write_run(self, int fd, const uint8_t *host, uint64_t first, uint64_t end, Ranges ranges) noexcept nogil:
        """Write pages [first, end) to their places; an errno, 0 when they are there."""
        cdef int error
        if not ranges.in_turns:
            return self.write_pages(fd, host, first, end)
        pthread_mutex_lock(&ranges.turn)
        error = self.write_pages(fd, host, first, end)
        pthread_mutex_unlock(&ranges.turn)
        return error

    cdef int write_pages(self, int fd, const uint8_t *host, uint64_t first, uint64_t end) noexcept nogil:
        cdef uint64_t done = first * TARGET_PAGE_SIZE, limit = end * TARGET_PAGE_SIZE
        cdef ssize_t written
        while done < limit:
            written = pwrite(fd, host + done, limit - done, self.pages_offset + done)
            if written >= 0:
                done += written
            elif errno != EINTR:
                return errno
        return 0

    cdef void write_range(
        self, int fd, PageBlock *block, uint64_t first, uint64_t end, Ranges ranges, Outcome *outcome
    ) noexcept nogil:
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
                outcome.error = self.write_run(fd, block.host, run, page, ranges)
            if page >= end:
                return
            page = page + 1 if dirty else find_next_set(block.dirty, page, end)
            run = page

    def write(self, int fd, DirtyPages dirty not None, int block_index, Ranges ranges not None):
        """Write what is dirty of *ranges*; see region.pyi."""
        cdef Outcome outcome = Outcome(0, 0, 0)
        cdef PageBlock *block
        cdef Range *part
        if not 0 <= block_index < dirty.block_count:
            raise IndexError(f"block {block_index} of {dirty.block_count}")
        block = &dirty.table[block_index]
        self.check(ranges, block.pages)
        with nogil:
            while outcome.error == 0:
                part = ranges.take()
                if part == NULL:
                    break
                self.write_range(fd, block, part.first, part.first + part.count, ranges, &outcome)
        dirty.remaining -= outcome.zero_pages + outcome.normal_pages
        if outcome.error:
            ranges.give_up()
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

    def read(self, int fd, Landing landing not None, int block_index, Ranges ranges not None):
        """Read what the file has of *ranges*; see region.pyi."""
        cdef Outcome outcome = Outcome(0, 0, 0)
        cdef LoadBlock *block
        cdef Range *part = NULL
        if not 0 <= block_index < landing.block_count:
            raise IndexError(f"block {block_index} of {landing.block_count}")
        block = &landing.table[block_index]
        self.check(ranges, block.pages)
        with nogil:
            while outcome.error == 0:
                part = ranges.take()
                if part == NULL:
                    break
                self.read_range(fd, landing, block, part.first, part.first + part.count, &outcome)
        if outcome.error:
            ranges.give_up()
        if outcome.error == -1:
            place = self.pages_offset + part.first * TARGET_PAGE_SIZE
            raise StreamError(
                f"section 'ram' instance 0: the file ends within the pages of block '{self.idstr}' that begin at {place:#x}",
                offset=place,
                section="ram",
            )
        if outcome.error:
            raise ChannelError(f"Unable to read from file: {os.strerror(outcome.error)}", errno=outcome.error)
        return outcome.normal_pages

    cdef int check(self, Ranges ranges, uint64_t pages) except -1:
        """ValueError unless all of *ranges* lie in the block, which has that many *pages*, and begin a word of its bitmaps."""
        cdef uint64_t index
        cdef Range *part
        for index in range(ranges.length):
            part = &ranges.table[index]
            if pages != self.bitmap.bits or part.first > pages or part.count > pages - part.first or part.first % 64:
                raise ValueError(
                    f"{part.count} pages from {part.first} on of block '{self.idstr}', which has {self.bitmap.bits}"
                )
        return 0
