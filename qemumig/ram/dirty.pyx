"""Bitmap sync: the hypervisor's dirty log into the migration bitmap, and what a chunk needs first (ram.md §5, §8).

    machine's log ──fetch──▶ dirty bitmap ──walk──▶ pages to send
                              chunk bits  ──first page of a chunk──▶ protect it again, ask which pages exist

A sync copies the log and leaves the pages writable, where the hypervisor can do that; protecting a chunk again waits
until just before its first page is sent.  A page written in between is sent once instead of twice, and a large guest
is not stopped by one long walk over its page tables.  After that the kernel is asked which pages of the chunk exist:
the others are zero without a look at them, and if one comes to life later the log tells.

Threads   the migration thread only; `remaining` and the counters may be read by anyone.
Holds     (1) `remaining` is the number of bits that are set
          (2) a chunk whose bit is set here is protected before a page of it is read, or said to be zero
"""

from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport calloc, free

from .bitmap cimport Bitmap, count_set, test_bit
from .block cimport RAMBlock
from .populated cimport PageMap
from ..wire.format cimport TARGET_PAGE_SIZE

# Chunks of 64 MiB: small enough to be protected in well under a millisecond, large enough to be rare.
CHUNK_SHIFT = 14
CHUNK_SHIFT_MIN = 6
CHUNK_SHIFT_MAX = 31


cdef class DirtyPages:
    """What still has to be sent of *blocks*: every page at first.

    *log* is the machine's DirtyLog.  *chunk_shift*: log2 of the target pages that are protected again at once,
    clamped to 6 … 31 as QEMU does with `x-clear-bitmap-shift`.
    """

    def __cinit__(self, blocks, log, int chunk_shift=CHUNK_SHIFT):
        cdef RAMBlock block
        cdef Bitmap bitmap, chunks, populated
        cdef int index
        self.log = log
        self.blocks = list(blocks)
        self.chunk_shift = min(max(chunk_shift, CHUNK_SHIFT_MIN), CHUNK_SHIFT_MAX)
        self.block_count = len(self.blocks)
        self.bitmaps = []
        self.chunks = []
        self.populated = []
        self.page_map = PageMap()
        self.table = <PageBlock *> calloc(max(self.block_count, 1), sizeof(PageBlock))
        if self.table == NULL:
            raise MemoryError("no memory for the list of RAM blocks")
        for index in range(self.block_count):
            block = self.blocks[index]
            bitmap = Bitmap(block.used_length // TARGET_PAGE_SIZE)
            bitmap.set_all()
            chunks = Bitmap((bitmap.bits >> self.chunk_shift) + 1)
            populated = Bitmap(bitmap.bits)
            populated.set_all()
            self.populated.append(populated)
            self.bitmaps.append(bitmap)
            self.chunks.append(chunks)
            self.table[index].host = <uint8_t *> block.host_address
            self.table[index].pages = bitmap.bits
            self.table[index].dirty = bitmap.words
            self.table[index].unvisited = chunks.words
            self.table[index].populated = populated.words
            self.remaining += bitmap.bits

    def __dealloc__(self):
        free(self.table)

    def sync(self):
        """Fetch the machine's log into the bitmaps; returns the pages that are newly dirty."""
        cdef uint64_t before = self.remaining, total = 0, added
        cdef Bitmap bitmap, chunks
        for block, bitmap, chunks in zip(self.blocks, self.bitmaps, self.chunks):
            self.log.fetch(block, memoryview(bitmap))
            chunks.set_all()
            total += count_set(bitmap.words, bitmap.bits)
        self.remaining = total
        self.synced_pages = total
        added = total - before if total > before else 0
        self.new_pages += added
        self.sync_count += 1
        return added

    def visit_chunk(self, int block_index, uint64_t page):
        """Prepare the chunk around *page*: what the machine logged there is in the bitmap already.

        It is protected again first; which of its pages exist is asked afterwards.
        """
        cdef Bitmap chunks = self.chunks[block_index]
        cdef RAMBlock block = self.blocks[block_index]
        cdef PageBlock *entry = &self.table[block_index]
        cdef uint64_t chunk = page >> self.chunk_shift
        cdef uint64_t first = chunk << self.chunk_shift
        cdef uint64_t count = min(<uint64_t> 1 << self.chunk_shift, entry.pages - first)
        chunks.clear(chunk)
        if self.log.manual_clear:
            self.log.clear(block, first, count)
        if block.anonymous:
            with nogil:
                self.page_map.find_populated(
                    <uint64_t> entry.host + first * TARGET_PAGE_SIZE, count, entry.populated + (first >> 6)
                )

    def visit_if_new(self, int block_index, uint64_t page):
        """Visit the chunk around *page* if that was not done since the last sync; see dirty.pyi."""
        if test_bit(self.table[block_index].unvisited, page >> self.chunk_shift):
            self.visit_chunk(block_index, page)

    def close(self):
        """Give the page map back; nothing is sent any more."""
        self.page_map.close()
