"""Bitmap sync: the hypervisor's dirty log into the migration bitmap, and what a chunk needs first (ram.md §5, §8).

    machine's log ──fetch──▶ dirty bitmap ──walk──▶ pages to send
                              chunk bits  ──first page of a chunk──▶ protect it again, ask which pages exist
                                          ──ahead, where a core is free──▶ the same, and which of those are zero

A sync copies the log and leaves the pages writable, where the hypervisor can do that; protecting a chunk again waits
until just before its first page is sent.  A page written in between is sent once instead of twice, and a large guest
is not stopped by one long walk over its page tables.  After that the kernel is asked which pages of the chunk exist:
the others are zero without a look at them, and if one comes to life later the log tells.

A scout may do both for the chunk that comes next, and then look for pages of zeroes from the chunk's end downwards, so
that sender and scout meet somewhere.  What the scout has not seen yet the sender looks at itself: nobody waits for that.

Threads   the migration thread; `look_ahead` may be called by one other.  `remaining` and the counters are for anyone.
Fields    under the lock: page_map, prepared, populated and looked_at as far as they are written; the log's fetch and clear
Holds     (1) `remaining` is the number of bits that are set
          (2) a chunk whose bit is set here is protected before a page of it is read, or said to be zero
          (3) nothing that was looked at before a sync is believed after it
"""

import threading

from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from ..encode.zero cimport is_zero
from .bitmap cimport (
    SEQ_CST,
    Bitmap,
    atomic_fetch_and,
    atomic_fetch_or,
    atomic_load,
    atomic_store,
    count_set,
    find_next_set,
    popcount,
    set_bit_shared,
    test_bit,
    test_bit_shared,
    trailing_zeros,
    word_count,
)
from .block cimport RAMBlock
from .populated cimport PageMap
from ..wire.format cimport TARGET_PAGE_SIZE

# Chunks of 64 MiB: small enough to be protected in well under a millisecond, large enough to be rare.
CHUNK_SHIFT = 14
CHUNK_SHIFT_MIN = 6
CHUNK_SHIFT_MAX = 31

cdef enum:
    SAMPLES = 64                  # pages of a chunk that are looked at to learn whether a look at all of them pays …
    WORTH_A_LOOK = 4              # … as it does when one in so many is zero


cdef class DirtyPages:
    """What still has to be sent of *blocks*: every page at first.

    *log* is the machine's DirtyLog.  *chunk_shift*: log2 of the target pages that are protected again at once,
    clamped to 6 … 31 as QEMU does with `x-clear-bitmap-shift`.
    """

    def __cinit__(self, blocks, log, int chunk_shift=CHUNK_SHIFT):
        cdef RAMBlock block
        cdef Bitmap bitmap, chunks
        cdef int index
        self.lock = threading.Lock()
        self.log = log
        self.blocks = list(blocks)
        self.chunk_shift = min(max(chunk_shift, CHUNK_SHIFT_MIN), CHUNK_SHIFT_MAX)
        self.block_count = len(self.blocks)
        self.bitmaps = []
        self.chunks = []
        self.further = []
        self.page_map = PageMap()
        self.table = <PageBlock *> calloc(max(self.block_count, 1), sizeof(PageBlock))
        if self.table == NULL:
            raise MemoryError("no memory for the list of RAM blocks")
        for index in range(self.block_count):
            block = self.blocks[index]
            bitmap = Bitmap(block.used_length // TARGET_PAGE_SIZE)
            bitmap.set_all()
            chunks = Bitmap((bitmap.bits >> self.chunk_shift) + 1)
            self.bitmaps.append(bitmap)
            self.chunks.append(chunks)
            self.table[index].host = <uint8_t *> block.host_address
            self.table[index].pages = bitmap.bits
            self.table[index].dirty = bitmap.words
            self.table[index].unvisited = chunks.words
            self.table[index].prepared = self.new_bits(chunks.bits)
            self.table[index].populated = self.new_bits(bitmap.bits)
            self.table[index].looked_at = self.new_bits(bitmap.bits)
            memset(self.table[index].populated, 0xFF, word_count(bitmap.bits) * sizeof(uint64_t))
            self.remaining += bitmap.bits

    def __dealloc__(self):
        free(self.table)

    cdef uint64_t *new_bits(self, uint64_t bits) except NULL:
        """Bits that nobody else refers to, all clear; they live as long as this."""
        cdef Bitmap bitmap = Bitmap(bits)
        self.further.append(bitmap)
        return bitmap.words

    def sync(self):
        """Fetch the machine's log into the bitmaps; returns the pages that are newly dirty."""
        self.interrupt_look()
        try:
            return self.fetch_log()
        finally:
            self.lock.release()

    cdef interrupt_look(self):
        """Take the lock; whoever looks for zeroes gives it up before the next 64 pages."""
        atomic_store(&self.is_awaited, 1, SEQ_CST)
        self.lock.acquire()
        atomic_store(&self.is_awaited, 0, SEQ_CST)

    cdef fetch_log(self):
        cdef uint64_t before = self.remaining, total = 0, added
        cdef Bitmap bitmap, chunks
        cdef int index
        for index in range(self.block_count):
            bitmap, chunks = self.bitmaps[index], self.chunks[index]
            self.log.fetch(self.blocks[index], memoryview(bitmap))
            chunks.set_all()
            memset(self.table[index].prepared, 0, word_count(chunks.bits) * sizeof(uint64_t))
            total += count_set(bitmap.words, bitmap.bits)
        self.remaining = total
        self.synced_pages = total
        added = total - before if total > before else 0
        self.new_pages += added
        self.sync_count += 1
        return added

    def visit_chunk(self, int block_index, uint64_t page):
        """Prepare the chunk around *page*, unless the scout has; see dirty.pyi."""
        cdef Bitmap chunks = self.chunks[block_index]
        cdef uint64_t chunk = page >> self.chunk_shift
        if not test_bit_shared(self.table[block_index].prepared, chunk):
            self.interrupt_look()
            try:
                self.prepare_chunk(block_index, chunk)
            finally:
                self.lock.release()
        chunks.clear(chunk)
        if self.scout is not None:
            self.scout.follow(block_index, page)

    def tell(self, scout):
        """Let *scout*, or nobody, know of each chunk that is visited; see dirty.pyi."""
        self.scout = scout

    def look_ahead(self, int block_index, uint64_t page):
        """Prepare the chunk around *page* and look for zeroes in it; see dirty.pyi."""
        cdef uint64_t chunk = page >> self.chunk_shift
        with self.lock:
            self.prepare_chunk(block_index, chunk)
            with nogil:
                self.find_zeroes(block_index, chunk)

    cdef prepare_chunk(self, int block_index, uint64_t chunk):
        """Protect it, then ask which of its pages exist; what the machine logged there is in the bitmap already."""
        cdef RAMBlock block = self.blocks[block_index]
        cdef PageBlock *entry = &self.table[block_index]
        cdef uint64_t first = chunk << self.chunk_shift
        cdef uint64_t count = min(<uint64_t> 1 << self.chunk_shift, entry.pages - first)
        if test_bit_shared(entry.prepared, chunk):
            return
        if self.log.manual_clear:
            self.log.clear(block, first, count)
        memset(entry.looked_at + (first >> 6), 0, word_count(count) * sizeof(uint64_t))
        if block.anonymous:
            with nogil:
                self.page_map.find_populated(
                    <uint64_t> entry.host + first * TARGET_PAGE_SIZE, count, entry.populated + (first >> 6)
                )
        else:
            memset(entry.populated + (first >> 6), 0xFF, word_count(count) * sizeof(uint64_t))
        set_bit_shared(entry.prepared, chunk)

    cdef void find_zeroes(self, int block_index, uint64_t chunk) noexcept nogil:
        """Look at the pages of a chunk that must be sent, 64 at a time from its end on, until somebody waits for the lock."""
        cdef PageBlock *block = &self.table[block_index]
        cdef uint64_t first = chunk << self.chunk_shift
        cdef uint64_t end = min(first + (<uint64_t> 1 << self.chunk_shift), block.pages)
        cdef uint64_t index = word_count(end)
        if not self.is_worth_a_look(block, first, end):
            return
        while index > first >> 6 and not atomic_load(&self.is_awaited, SEQ_CST):
            index -= 1
            look_at_word(block, index)

    cdef bint is_worth_a_look(self, PageBlock *block, uint64_t first, uint64_t end) noexcept nogil:
        """Whether enough of some pages that are spread over the chunk are zero."""
        cdef uint64_t page = first, step = max((end - first) // SAMPLES, 1), looked = 0, zero = 0
        while page < end:
            if test_bit(block.dirty, page) and test_bit_shared(block.populated, page):
                looked += 1
                zero += is_zero(block.host + page * TARGET_PAGE_SIZE, TARGET_PAGE_SIZE)
            page += step
        return looked > 0 and zero * WORTH_A_LOOK >= looked

    def visit_if_new(self, int block_index, uint64_t page):
        """Visit the chunk around *page* if that was not done since the last sync; see dirty.pyi."""
        if test_bit(self.table[block_index].unvisited, page >> self.chunk_shift):
            self.visit_chunk(block_index, page)

    def unknown_pages(self, int block_index, uint64_t page):
        """Pages of the chunk around *page* that somebody has to look at; see dirty.pyi."""
        cdef PageBlock *block = &self.table[block_index]
        cdef uint64_t first = page >> self.chunk_shift << self.chunk_shift
        cdef uint64_t end = min(first + (<uint64_t> 1 << self.chunk_shift), block.pages)
        cdef uint64_t index, count = 0
        for index in range(first >> 6, word_count(end)):
            count += popcount(unknown_of_word(block, index))
        return count

    def next_chunk(self, int block_index, uint64_t page):
        """The first dirty page behind the chunk around *page*, in the same block; see dirty.pyi."""
        cdef PageBlock *block = &self.table[block_index]
        cdef uint64_t found = find_next_set(block.dirty, (page >> self.chunk_shift) + 1 << self.chunk_shift, block.pages)
        return found if found < block.pages else None

    def close(self):
        """Give the page map back; nothing is sent any more."""
        self.page_map.close()


cdef inline uint64_t unknown_of_word(PageBlock *block, uint64_t index) noexcept nogil:
    """Which of 64 pages must be sent and exist, and were not looked at."""
    return block.dirty[index] & block.populated[index] & ~block.looked_at[index]


cdef void look_at_word(PageBlock *block, uint64_t index) noexcept nogil:
    """Find out which of 64 pages are zero, as far as somebody has to."""
    cdef uint64_t unknown = unknown_of_word(block, index)
    cdef uint64_t rest = unknown, zero = 0, page
    while rest:
        page = (index << 6) + trailing_zeros(rest)
        if is_zero(block.host + page * TARGET_PAGE_SIZE, TARGET_PAGE_SIZE):
            zero |= rest & -rest
        rest &= rest - 1
    atomic_fetch_and(block.populated + index, ~zero, SEQ_CST)
    atomic_fetch_or(block.looked_at + index, unknown, SEQ_CST)
