"""One page after the other: from the dirty bitmap into the stream (ram.md §2, §6).

In    DirtyPages: what must be sent, in the order of the walk; a PageCache, when deltas are wanted
Out   records on an OutputStream: ZERO (head, fill byte), PAGE (head, then the page by reference), XBZRLE (head, a byte
      that says what follows, the length of the delta, the delta) or COMPRESS_PAGE (head, length, a zlib stream)

    head = offset of the page in its block | flags        8 bytes, big-endian
           + name of the block (u8 length, bytes), unless CONTINUE says "same as before on this channel"

The engine stops and comes back to its caller when it has sent what it was allowed to, when it enters a chunk that has to
be visited before its first page may be read, and when no dirty page is left.

Deltas begin with the second round (xbzrle.md §5): the first one sends every page, and a page that is sent once needs no
copy.  From then on each page passes through the cache, so that the cache knows what the destination has; the copies that
the stream refers to must have left before the next sync lets the cache replace them.

Threads   the migration thread; no GIL inside.
Holds     (1) a page is protected before its bytes are looked at, by its chunk's visit; they are read again when the list
              is flushed, so what leaves is never older than that
          (2) the block that CONTINUE refers to is the one of the last record on this stream
          (3) no page goes past the cache once the first round is over
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

from ..encode.zero cimport is_zero
from ..encode.zlib_page cimport ZLIB_PAGE_MAX_LENGTH, deflate_page
from ..encode.zlib_page import load_library
from ..wire.format cimport (
    ENCODING_FLAG_XBZRLE,
    RAM_SAVE_FLAG_COMPRESS_PAGE,
    RAM_SAVE_FLAG_CONTINUE,
    RAM_SAVE_FLAG_PAGE,
    RAM_SAVE_FLAG_XBZRLE,
    RAM_SAVE_FLAG_ZERO,
    TARGET_PAGE_SIZE,
)
from ..wire.stream cimport STREAM_OK, OutputStream, put_be16, put_be32, put_be64
from .bitmap cimport clear_bit, test_bit, test_bit_shared
from .cache cimport SEND_DELTA, SEND_NOTHING, PageCache, Verdict
from .dirty cimport DirtyPages, PageBlock
from .search cimport next_dirty_page

cdef enum SaveStatus:
    SAVE_LIMIT = 0                # sent what was allowed
    SAVE_CLEAN = 1                # no dirty page is left
    SAVE_VISIT = 2                # the chunk at the walk's position must be visited first
    SAVE_FAILED = 3               # the stream has an error

cdef enum:
    FLUSH_BYTES = 0x100000        # 1 MiB of pages gathered by one writev: some 512 entries
    LONGEST_HEAD = 264            # of a record: the head proper, and the name of a block with its length
    DATA_HEAD = 4                 # what follows the head of a COMPRESS_PAGE record: length
    DELTA_HEAD = 3                # what follows the head of an XBZRLE record: encoding, length
    ZERO_RECORD = 9               # head without a name, fill byte
    ZEROES_AT_ONCE = 256          # records of zero pages, put in one piece


cdef class PageSender:
    """Sends the pages of *dirty* to *out*; see save.pyi."""

    def __cinit__(self, DirtyPages dirty not None, OutputStream out not None, *args, **more):
        cdef int index
        cdef bytes name
        cdef uint64_t pages = 0
        if dirty.block_count > 256:
            raise ValueError(f"{dirty.block_count} RAM blocks, at most 256")
        self.dirty = dirty
        self.out = out
        self.last_block = self.compress_level = -1
        self.names = [bytes([len(b.idstr.encode())]) + b.idstr.encode() for b in dirty.blocks]
        for index in range(dirty.block_count):
            name = self.names[index]
            self.name_table[index] = name
            self.name_length[index] = len(name)
            self.first_page[index] = pages
            pages += dirty.table[index].pages

    @property
    def rounds(self) -> int:
        """How often the walk has passed the last block."""
        return self.walk.rounds

    def encode_with(self, PageCache cache):
        """From the second round on send deltas by *cache*; None: pages go out whole from now on; see save.pyi."""
        self.cache = cache

    def compress_at(self, int level):
        """Send pages as zlib streams of their own; see save.pyi."""
        if not 0 <= level <= 9:
            raise ValueError(f"compression level {level}, expected 0 to 9")
        load_library()
        self.compress_level = level

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

    cdef uint64_t sent_bytes(self) noexcept nogil:
        """What the byte limit of `send` is about."""
        return self.out.offset

    cdef bint encodes(self) noexcept nogil:
        """Whether pages go through the cache now."""
        return self.cache is not None and self.walk.rounds > 0

    cdef uint64_t page_number(self) noexcept nogil:
        """The number of the page at the walk's position among those of all blocks."""
        return self.first_page[self.walk.block] + self.walk.page

    cdef int send_page(self) noexcept nogil:
        """Send the page at the walk's position, whose dirty bit is clear already."""
        cdef const uint8_t *page = self.dirty.table[self.walk.block].host + self.walk.page * TARGET_PAGE_SIZE
        if self.is_zero_page(self.walk.page):
            return self.send_zero()
        if self.encodes():
            return self.send_encoded(page)
        # the first page of a block carries its name, and QEMU never compresses that one
        if self.compress_level >= 0 and self.walk.block == self.last_block:
            return self.send_compressed(page)
        return self.send_whole(page)

    cdef bint is_zero_page(self, uint64_t page) noexcept nogil:
        """Whether that page of the block at hand is zero; it is looked at unless that was done."""
        cdef PageBlock *block = &self.dirty.table[self.walk.block]
        if not test_bit_shared(block.populated, page):
            return True
        if test_bit_shared(block.looked_at, page):
            return False
        return is_zero(block.host + page * TARGET_PAGE_SIZE, TARGET_PAGE_SIZE)

    cdef int send_zero(self) noexcept nogil:
        cdef uint8_t head[LONGEST_HEAD + 1]
        cdef size_t length = self.put_head(head, RAM_SAVE_FLAG_ZERO)
        if self.encodes() and not self.last_stage:
            self.cache.insert_zero(self.page_number(), self.dirty.sync_count)
        head[length] = 0
        self.zero_pages += 1
        return self.out.put(head, length + 1)

    cdef uint64_t send_zeroes(self, uint64_t limit) noexcept nogil:
        """Send the run of zero pages at the walk's position, at most *limit*; how many, 0 where there is none.

        Their records go in one piece: much of a guest is memory that nobody has touched.
        """
        cdef uint8_t records[ZEROES_AT_ONCE * ZERO_RECORD]
        cdef PageBlock *block = &self.dirty.table[self.walk.block]
        cdef uint64_t chunk_end = (self.walk.page >> self.dirty.chunk_shift) + 1 << self.dirty.chunk_shift
        cdef uint64_t page = self.walk.page, end = min(page + min(limit, ZEROES_AT_ONCE), min(chunk_end, block.pages))
        cdef size_t length = 0
        if self.walk.block != self.last_block or self.encodes():
            return 0
        while page < end and test_bit(block.dirty, page) and self.is_zero_page(page):
            clear_bit(block.dirty, page)
            put_be64(records + length, page * TARGET_PAGE_SIZE | RAM_SAVE_FLAG_ZERO | RAM_SAVE_FLAG_CONTINUE)
            records[length + 8] = 0
            length += ZERO_RECORD
            page += 1
        if length:
            self.zero_pages += page - self.walk.page
            self.stream_status = self.out.put(records, length)
        return page - self.walk.page

    cdef int send_whole(self, const uint8_t *page) noexcept nogil:
        cdef uint8_t head[LONGEST_HEAD]
        cdef size_t length = self.put_head(head, RAM_SAVE_FLAG_PAGE)
        cdef int status
        self.normal_pages += 1
        status = self.out.put(head, length)
        if status != STREAM_OK:
            return status
        return self.out.put_reference(page, TARGET_PAGE_SIZE)

    cdef int send_compressed(self, const uint8_t *page) noexcept nogil:
        """Send *page* as a zlib stream, or whole when that is no shorter (compress.md §1)."""
        cdef uint8_t record[8 + DATA_HEAD + ZLIB_PAGE_MAX_LENGTH]
        cdef size_t length = deflate_page(page, record + 8 + DATA_HEAD, self.compress_level)
        if not 0 < length < TARGET_PAGE_SIZE:
            return self.send_whole(page)
        self.put_head(record, RAM_SAVE_FLAG_COMPRESS_PAGE)
        put_be32(record + 8, <uint32_t> length)
        self.compressed_pages += 1
        return self.out.put(record, 8 + DATA_HEAD + length)

    cdef int send_encoded(self, const uint8_t *page) noexcept nogil:
        """Send what the destination lacks of *page*: all of it, a delta, or nothing."""
        cdef Verdict verdict
        cdef uint8_t head[LONGEST_HEAD + DELTA_HEAD]
        cdef size_t length
        cdef int status
        cdef int word = self.cache.settle(self.page_number(), page, self.dirty.sync_count, self.last_stage, &verdict)
        if word == SEND_NOTHING:
            return STREAM_OK
        if word != SEND_DELTA:
            return self.send_whole(verdict.page)
        length = self.put_head(head, RAM_SAVE_FLAG_XBZRLE)
        head[length] = ENCODING_FLAG_XBZRLE
        put_be16(head + length + 1, <uint16_t> verdict.length)
        length += DELTA_HEAD
        self.cache.count_delta(length + verdict.length)
        status = self.out.put(head, length)
        if status != STREAM_OK:
            return status
        return self.out.put(verdict.delta, verdict.length)

    cdef int send_some(self, uint64_t byte_limit, uint64_t page_limit) noexcept nogil:
        cdef uint64_t last_offset = self.sent_bytes() + byte_limit
        cdef uint64_t sent = 0, count
        while next_dirty_page(&self.walk, self.dirty):
            if self.sent_bytes() >= last_offset or sent == page_limit:
                return SAVE_LIMIT
            block = &self.dirty.table[self.walk.block]
            if test_bit(block.unvisited, self.walk.page >> self.dirty.chunk_shift):
                return SAVE_VISIT
            count = self.send_zeroes(page_limit - sent)
            if count == 0:
                count = 1
                clear_bit(block.dirty, self.walk.page)
                self.stream_status = self.send_page()
            self.dirty.remaining -= count
            if self.stream_status == STREAM_OK and self.out.pending >= FLUSH_BYTES:
                self.stream_status = self.out.flush_pending()
            if self.stream_status != STREAM_OK:
                return SAVE_FAILED
            self.walk.page += count
            self.handled_pages += count
            sent += count
        return SAVE_CLEAN

    def send(self, uint64_t byte_limit, uint64_t page_limit) -> bool:
        """Send dirty pages, about *byte_limit* bytes and at most *page_limit* pages; True when none is left."""
        cdef uint64_t last_offset = self.sent_bytes() + byte_limit
        cdef uint64_t before = self.handled_pages
        cdef uint64_t sent
        cdef int status
        while True:
            sent = self.handled_pages - before
            if self.sent_bytes() >= last_offset or sent >= page_limit:
                return self.dirty.remaining == 0
            with nogil:
                status = self.send_some(last_offset - self.sent_bytes(), page_limit - sent)
            if status == SAVE_VISIT:
                self.dirty.visit_chunk(self.walk.block, self.walk.page)
            elif status == SAVE_FAILED:
                self.raise_failure()
            else:
                return status == SAVE_CLEAN

    def raise_failure(self):
        """Raise why the last page could not be sent."""
        self.out.raise_on(self.stream_status)
