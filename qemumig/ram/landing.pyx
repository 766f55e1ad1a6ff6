"""Landing: where the pages of every block go at the destination, and which of them have come (ram.md §3, §9).

The main channel's loader and the receivers of multifd put pages in the same places; this is what they share.

Threads   any that load pages; no GIL inside.  With several at once `share` is called before the second one begins:
          they may then receive different pages of one block, whose bits lie in the same word.
Holds     (1) zeroes are not written to a page that reads as zero: memory that is untouched stays unpopulated
"""

from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcmp, memset

from ..encode.zero cimport is_zero
from ..wire.format cimport TARGET_PAGE_SIZE
from .bitmap cimport Bitmap, test_bit
from .block cimport RAMBlock


cdef class Landing:
    """What can be received of *blocks*; see landing.pyi."""

    def __cinit__(self, blocks, *, bint ignore_shared=False):
        cdef RAMBlock block
        cdef Bitmap bitmap
        cdef bytes name
        cdef int index
        self.ignore_shared = ignore_shared
        self.blocks = list(blocks)
        self.block_count = len(self.blocks)
        self.names = [block.idstr.encode() for block in self.blocks]
        self.received = []
        self.listed = set()
        self.table = <LoadBlock *> calloc(max(self.block_count, 1), sizeof(LoadBlock))
        if self.table == NULL:
            raise MemoryError("no memory for the list of RAM blocks")
        for index in range(self.block_count):
            block = self.blocks[index]
            name = self.names[index]
            bitmap = Bitmap(block.max_length // TARGET_PAGE_SIZE)
            self.received.append(bitmap)
            self.table[index].host = <uint8_t *> block.host_address
            self.table[index].pages = 0 if self.is_ignored(block) else block.used_length // TARGET_PAGE_SIZE
            self.table[index].received = bitmap.words
            self.table[index].fresh = block.fresh
            block.fresh = False  # once a load has begun, only a discard makes it so again
            self.table[index].name = name
            self.table[index].name_length = len(name)

    def __dealloc__(self):
        free(self.table)

    def is_ignored(self, RAMBlock block not None):
        """Whether no page of *block* may come; see landing.pyi."""
        return self.ignore_shared and block.is_at_both_ends

    def forgotten(self):
        """A block of which no page has come although one should have; see landing.pyi."""
        cdef int index
        for index in range(self.block_count if self.ignore_shared else 0):
            if self.blocks[index].shared and self.table[index].pages and not self.received[index].count():
                return self.blocks[index]
        return None

    def share(self):
        """Several threads load pages from now on; see landing.pyi."""
        self.shared = True

    cdef int find_block(self, const uint8_t *name, size_t length) noexcept nogil:
        """The index of the block with that name, or −1."""
        cdef int index
        for index in range(self.block_count):
            if self.table[index].name_length == length and not memcmp(self.table[index].name, name, length):
                return index
        return -1

    cdef void clear_page(self, LoadBlock *block, uint64_t page) noexcept nogil:
        """A page of zeroes has come."""
        cdef uint8_t *target = block.host + page * TARGET_PAGE_SIZE
        if not block.fresh or test_bit(block.received, page):
            if not is_zero(target, TARGET_PAGE_SIZE):
                memset(target, 0, TARGET_PAGE_SIZE)
        self.note_received(block, page)
