"""One page after the other: from the dirty bitmap into the stream (ram.md §2, §6).

In    DirtyPages: what must be sent, in the order of the walk
Out   records on an OutputStream: ZERO (head, fill byte) or PAGE (head, then the page by reference)

    head = offset of the page in its block | flags        8 bytes, big-endian
           + name of the block (u8 length, bytes), unless CONTINUE says "same as before on this channel"

The engine stops and comes back to its caller when it has sent what it was allowed to, when it enters a chunk that has to
be visited before its first page may be read, and when no dirty page is left.

Threads   the migration thread; no GIL inside.
Holds     (1) a page's dirty bit is cleared before its bytes are looked at; they are read again when the list is
              flushed, so what leaves is never older than the bit
          (2) the block that CONTINUE refers to is the one of the last record on this stream
"""

from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memcpy

from ..encode.zero cimport is_zero
from ..wire.format cimport RAM_SAVE_FLAG_CONTINUE, RAM_SAVE_FLAG_PAGE, RAM_SAVE_FLAG_ZERO, TARGET_PAGE_SIZE
from ..wire.stream cimport STREAM_OK, OutputStream, put_be64
from .bitmap cimport clear_bit, test_bit
from .dirty cimport DirtyPages
from .search cimport Walk, next_dirty_page

cdef enum SaveStatus:
    SAVE_LIMIT = 0                # sent what was allowed
    SAVE_CLEAN = 1                # no dirty page is left
    SAVE_VISIT = 2                # the chunk at the walk's position must be visited first
    SAVE_FAILED = 3               # the stream has an error

cdef enum:
    FLUSH_BYTES = 0x100000        # 1 MiB of pages gathered by one writev: some 512 entries


cdef class PageSender:
    """Sends the pages of *dirty* to *out*; see save.pyi."""

    cdef readonly DirtyPages dirty
    cdef readonly OutputStream out
    cdef Walk walk
    cdef int last_block               # of the previous record on this stream; −1: none yet
    cdef list names                   # counted strings, kept alive for …
    cdef const uint8_t *name_table[256]
    cdef size_t name_length[256]
    cdef readonly uint64_t zero_pages
    cdef readonly uint64_t normal_pages
    cdef int stream_status

    def __cinit__(self, DirtyPages dirty not None, OutputStream out not None):
        cdef int index
        cdef bytes name
        if dirty.block_count > 256:
            raise ValueError(f"{dirty.block_count} RAM blocks, at most 256")
        self.dirty = dirty
        self.out = out
        self.last_block = -1
        self.names = [bytes([len(b.idstr.encode())]) + b.idstr.encode() for b in dirty.blocks]
        for index in range(dirty.block_count):
            name = self.names[index]
            self.name_table[index] = name
            self.name_length[index] = len(name)

    @property
    def rounds(self) -> int:
        """How often the walk has passed the last block."""
        return self.walk.rounds

    cdef size_t put_head(self, uint8_t *head, uint64_t flags) noexcept nogil:
        """Write the head of a record for the page at the walk's position; returns its length."""
        cdef int block = self.walk.block
        cdef uint64_t offset = self.walk.page * TARGET_PAGE_SIZE
        if block == self.last_block:
            put_be64(head, offset | flags | RAM_SAVE_FLAG_CONTINUE)
            return 8
        put_be64(head, offset | flags)
        memcpy(head + 8, self.name_table[block], self.name_length[block])
        self.last_block = block
        return 8 + self.name_length[block]

    cdef int send_page(self) noexcept nogil:
        """Send the page at the walk's position, whose dirty bit is clear already."""
        cdef uint8_t head[8 + 256 + 1]
        cdef size_t length
        cdef int status
        cdef const uint8_t *page = self.dirty.table[self.walk.block].host + self.walk.page * TARGET_PAGE_SIZE
        if not test_bit(self.dirty.table[self.walk.block].populated, self.walk.page) or is_zero(page, TARGET_PAGE_SIZE):
            length = self.put_head(head, RAM_SAVE_FLAG_ZERO)
            head[length] = 0
            self.zero_pages += 1
            return self.out.put(head, length + 1)
        length = self.put_head(head, RAM_SAVE_FLAG_PAGE)
        self.normal_pages += 1
        status = self.out.put(head, length)
        if status != STREAM_OK:
            return status
        return self.out.put_reference(page, TARGET_PAGE_SIZE)

    cdef int send_some(self, uint64_t byte_limit, uint64_t page_limit) noexcept nogil:
        cdef uint64_t last_offset = self.out.offset + byte_limit
        cdef uint64_t sent = 0
        while next_dirty_page(&self.walk, self.dirty):
            if self.out.offset >= last_offset or sent == page_limit:
                return SAVE_LIMIT
            block = &self.dirty.table[self.walk.block]
            if test_bit(block.unvisited, self.walk.page >> self.dirty.chunk_shift):
                return SAVE_VISIT
            clear_bit(block.dirty, self.walk.page)
            self.dirty.remaining -= 1
            self.stream_status = self.send_page()
            if self.stream_status == STREAM_OK and self.out.pending >= FLUSH_BYTES:
                self.stream_status = self.out.flush_pending()
            if self.stream_status != STREAM_OK:
                return SAVE_FAILED
            self.walk.page += 1
            sent += 1
        return SAVE_CLEAN

    def send(self, uint64_t byte_limit, uint64_t page_limit) -> bool:
        """Send dirty pages, about *byte_limit* bytes and at most *page_limit* pages; True when none is left."""
        cdef uint64_t last_offset = self.out.offset + byte_limit
        cdef uint64_t before = self.zero_pages + self.normal_pages
        cdef uint64_t sent
        cdef int status
        while True:
            sent = self.zero_pages + self.normal_pages - before
            if self.out.offset >= last_offset or sent >= page_limit:
                return self.dirty.remaining == 0
            with nogil:
                status = self.send_some(last_offset - self.out.offset, page_limit - sent)
            if status == SAVE_VISIT:
                self.dirty.visit_chunk(self.walk.block, self.walk.page)
            elif status == SAVE_FAILED:
                self.out.raise_on(self.stream_status)
            else:
                return status == SAVE_CLEAN
