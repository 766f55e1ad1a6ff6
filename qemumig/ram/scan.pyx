"""RAM records of a recorded stream, walked where they lie (ram.md §2, xbzrle.md, compress.md).

In    the bytes of a whole stream (a mapped file), the names and lengths of its RAM blocks
Out   how many records of each kind came for each block; if wanted, where the newest content of every page lies

    entry of a page  =  place << 3 | kind        PLAIN        the page itself is in the stream, at that offset
                                                 COMPRESSED   be32 length and a zlib stream are there
                                                 PATCHED      a delta came: the result is in the scratch file
                                                 ZERO, ABSENT nothing to look at

No page is copied but those that deltas have changed, so the cost is one head a page, and 8 bytes of memory a page when
entries are kept.  The entries of pages that never come are never touched, hence never populated.

Threads   one thread at a time per scan; no GIL inside, but for zlib.
Holds     (1) no offset, length or name of the stream is used before it was checked against the stream's end
          (2) an entry other than ABSENT and ZERO always refers to bytes that exist
"""

import os
import zlib

from libc.errno cimport EINTR, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcmp, memcpy, memset

from ..encode.xbzrle cimport apply_delta, fault_text
from ..errors import StreamError
from ..wire.format cimport (
    ENCODING_FLAG_XBZRLE,
    RAM_SAVE_FLAG_COMPRESS_PAGE,
    RAM_SAVE_FLAG_CONTINUE,
    RAM_SAVE_FLAG_EOS,
    RAM_SAVE_FLAG_MEM_SIZE,
    RAM_SAVE_FLAG_MULTIFD_FLUSH,
    RAM_SAVE_FLAG_PAGE,
    RAM_SAVE_FLAG_XBZRLE,
    RAM_SAVE_FLAG_ZERO,
)
from ..wire.stream cimport get_be32, get_be64

cdef extern from "<sys/mman.h>" nogil:
    void *mmap(void *address, size_t length, int protection, int flags, int fd, ssize_t offset)
    int munmap(void *address, size_t length)
    int PROT_READ, PROT_WRITE, MAP_PRIVATE, MAP_ANONYMOUS, MAP_NORESERVE
    void *MAP_FAILED

cdef extern from "<unistd.h>" nogil:
    ssize_t pread(int fd, void *buffer, size_t count, ssize_t offset)
    ssize_t pwrite(int fd, const void *buffer, size_t count, ssize_t offset)

cdef enum:
    HEAD = 8
    RECORDS_AT_A_TIME = 8192      # then the caller looks round
    DELTA_HEAD = 3                # u8 encoding, be16 length
    ZLIB_OVERHEAD = 14            # bytes that a page of zlib may be longer than the page
    MAX_BLOCKS = 4096             # of one stream

cdef uint64_t UNKNOWN_PAGES = <uint64_t> -1


cdef class RamScan:
    """Counts the records of a stream, and knows where its pages are; see scan.pyi."""

    def __cinit__(self, data not None, uint64_t page_size, bint keep_pages=False, int scratch_fd=-1):
        if page_size < 1024 or page_size > 65536 or page_size & (page_size - 1):
            raise ValueError(f"page size {page_size}, expected a power of two from 1024 to 65536")
        self.data = data
        self.size = self.data.shape[0]
        self.bytes = &self.data[0] if self.size else NULL
        self.page_size = page_size
        self.keep_pages = keep_pages
        self.scratch_fd = scratch_fd
        self.names = []
        self.last_block = -1
        self.table = <ScanBlock *> malloc(MAX_BLOCKS * sizeof(ScanBlock))
        self.page = <uint8_t *> malloc(page_size)
        if self.table == NULL or self.page == NULL:
            raise MemoryError("no memory for the list of RAM blocks")

    def __dealloc__(self):
        cdef int index
        for index in range(self.block_count):
            if self.table[index].entries != NULL:
                munmap(self.table[index].entries, self.table[index].pages * 8)
        free(self.table)
        free(self.page)

    # ---- the engine ----

    cdef inline bint there(self, uint64_t length) noexcept nogil:
        """Whether that many bytes are left; else the walk stands where they were expected."""
        if length <= self.size - self.at:
            return True
        self.wanted = length
        return False

    cdef int find_block(self) noexcept nogil:
        cdef int index
        for index in range(self.block_count):
            if self.table[index].name_length == self.name_length and not memcmp(
                self.table[index].name, self.name, self.name_length
            ):
                return index
        return -1

    cdef int take_block(self) noexcept nogil:
        """Settle which block the record at hand means; the walk stands behind its head."""
        cdef int block
        if self.head & RAM_SAVE_FLAG_CONTINUE:
            return SCAN_OK if self.last_block >= 0 else SCAN_NO_BLOCK
        if not self.there(1):
            return SCAN_CUT
        self.name_length = self.bytes[self.at]
        if not self.there(1 + self.name_length):
            return SCAN_CUT
        self.name = self.bytes + self.at + 1
        block = self.find_block()
        if block < 0:
            return SCAN_BAD_NAME
        self.at += 1 + self.name_length
        self.last_block = block
        return SCAN_OK

    cdef inline void note(self, ScanBlock *block, uint64_t page, uint64_t entry) noexcept nogil:
        if page >= block.end:
            block.end = page + 1
        if block.entries != NULL:
            block.entries[page] = entry

    cdef int take_zero(self, ScanBlock *block, uint64_t page) noexcept nogil:
        if not self.there(1):
            return SCAN_CUT
        if self.bytes[self.at]:
            return SCAN_BAD_FILL
        self.note(block, page, PAGE_ZERO)
        self.at += 1
        block.zero += 1
        return SCAN_OK

    cdef int take_plain(self, ScanBlock *block, uint64_t page) noexcept nogil:
        if not self.there(self.page_size):
            return SCAN_CUT
        self.note(block, page, self.at << KIND_BITS | PAGE_PLAIN)
        self.at += self.page_size
        block.normal += 1
        return SCAN_OK

    cdef int take_compressed(self, ScanBlock *block, uint64_t page) noexcept nogil:
        cdef uint64_t length
        if not self.there(4):
            return SCAN_CUT
        length = get_be32(self.bytes + self.at)
        if length == 0 or length > self.page_size + ZLIB_OVERHEAD:
            return SCAN_BAD_LENGTH
        if not self.there(4 + length):
            return SCAN_CUT
        return SCAN_INFLATE

    cdef int take_delta(self, ScanBlock *block, uint64_t page) noexcept nogil:
        cdef uint64_t length, entry
        cdef int status
        if not self.there(DELTA_HEAD):
            return SCAN_CUT
        if self.bytes[self.at] != ENCODING_FLAG_XBZRLE:
            return SCAN_BAD_ENCODING
        length = (<uint64_t> self.bytes[self.at + 1] << 8) | self.bytes[self.at + 2]
        if length > self.page_size:
            return SCAN_BAD_LENGTH
        if not self.there(DELTA_HEAD + length):
            return SCAN_CUT
        entry = block.entries[page] if block.entries != NULL else PAGE_ZERO
        if entry & KIND_MASK == PAGE_COMPRESSED:
            return SCAN_INFLATE_BASE
        status = self.load_base(entry)
        if status != SCAN_OK:
            return status
        if apply_delta(self.page, self.page_size, self.bytes + self.at + DELTA_HEAD, length, &self.fault):
            return SCAN_BAD_DELTA
        if block.entries != NULL:
            status = self.keep_patched(block, page)
            if status != SCAN_OK:
                return status
        self.at += DELTA_HEAD + length
        block.xbzrle += 1
        return SCAN_OK

    cdef int load_base(self, uint64_t entry) noexcept nogil:
        """Copy what *entry* refers to into the room for a page."""
        cdef uint64_t kind = entry & KIND_MASK
        if kind == PAGE_PLAIN:
            memcpy(self.page, self.bytes + (entry >> KIND_BITS), self.page_size)
        elif kind == PAGE_PATCHED:
            return self.read_scratch(self.page, entry >> KIND_BITS)
        else:
            memset(self.page, 0, self.page_size)
        return SCAN_OK

    cdef int keep_patched(self, ScanBlock *block, uint64_t page) noexcept nogil:
        """Put the room for a page into the scratch file, where the page was before or at the end."""
        cdef uint64_t slot = self.scratch_pages
        if block.entries[page] & KIND_MASK == PAGE_PATCHED:
            slot = block.entries[page] >> KIND_BITS
        self.error = write_whole(self.scratch_fd, self.page, self.page_size, slot * self.page_size)
        if self.error:
            return SCAN_IO
        if slot == self.scratch_pages:
            self.scratch_pages += 1
        self.note(block, page, slot << KIND_BITS | PAGE_PATCHED)
        return SCAN_OK

    cdef int read_scratch(self, uint8_t *target, uint64_t slot) noexcept nogil:
        cdef size_t done = 0
        cdef ssize_t count
        while done < self.page_size:
            count = pread(self.scratch_fd, target + done, self.page_size - done, slot * self.page_size + done)
            if count <= 0:
                if count < 0 and errno == EINTR:
                    continue
                self.error = errno if count < 0 else 0
                return SCAN_IO
            done += count
        return SCAN_OK

    cdef int walk_some(self, int limit) noexcept nogil:
        cdef ScanBlock *block
        cdef uint64_t flags, page
        cdef int status
        while limit > 0:
            limit -= 1
            self.head_offset = self.at
            if self.at == self.size:
                return SCAN_END
            if not self.there(HEAD):
                return SCAN_CUT
            self.head = get_be64(self.bytes + self.at)
            self.at += HEAD
            if self.head == RAM_SAVE_FLAG_EOS:
                return SCAN_EOS
            if self.head == RAM_SAVE_FLAG_MULTIFD_FLUSH:
                self.flushes += 1
                continue
            flags = self.head & (self.page_size - 1)
            if flags == RAM_SAVE_FLAG_MEM_SIZE:
                return SCAN_LIST
            flags &= ~(<uint64_t> RAM_SAVE_FLAG_CONTINUE)
            if not (
                flags == RAM_SAVE_FLAG_PAGE
                or flags == RAM_SAVE_FLAG_ZERO
                or flags == RAM_SAVE_FLAG_XBZRLE
                or flags == RAM_SAVE_FLAG_COMPRESS_PAGE
            ):
                return SCAN_FLAGS
            status = self.take_block()
            if status != SCAN_OK:
                return status
            block = &self.table[self.last_block]
            page = self.head // self.page_size
            if page >= block.pages:
                return SCAN_BAD_OFFSET
            if flags == RAM_SAVE_FLAG_PAGE:
                status = self.take_plain(block, page)
            elif flags == RAM_SAVE_FLAG_ZERO:
                status = self.take_zero(block, page)
            elif flags == RAM_SAVE_FLAG_XBZRLE:
                status = self.take_delta(block, page)
            else:
                status = self.take_compressed(block, page)
            if status != SCAN_OK:
                return status
        return SCAN_PAUSE

    # ---- the door: walking ----

    @property
    def offset(self):
        """Where the walk stands."""
        return self.at

    def add_block(self, bytes name not None, pages=None):
        """Announce a block; see scan.pyi."""
        cdef ScanBlock *block
        if name in self.names:
            return self.names.index(name)
        if self.block_count == MAX_BLOCKS:
            raise StreamError(f"block {name!r} is one more than {MAX_BLOCKS} RAM blocks", section="ram")
        block = &self.table[self.block_count]
        memset(block, 0, sizeof(ScanBlock))
        block.pages = UNKNOWN_PAGES if pages is None else pages
        if self.keep_pages and pages:
            self.map_entries(block, name)
        self.names.append(name)
        block.name = name
        block.name_length = len(name)
        self.closed_list = self.closed_list or pages is not None
        self.block_count += 1
        return self.block_count - 1

    cdef map_entries(self, ScanBlock *block, name):
        """Room for the entries; only what is touched of it costs memory."""
        cdef void *room = MAP_FAILED
        if block.pages <= (<uint64_t> 1) << 44:
            room = mmap(
                NULL, block.pages * 8, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0
            )
        if room == MAP_FAILED:
            raise StreamError(
                f"block {name!r} has {block.pages:#x} pages, more than this host can keep account of", section="ram"
            )
        block.entries = <uint64_t *> room

    def walk_body(self, uint64_t offset, look_round=None):
        """Walk records; see scan.pyi."""
        cdef int status
        if offset > self.size:
            raise ValueError(f"offset {offset:#x} lies behind the end, {self.size:#x}")
        self.at = offset
        while True:
            with nogil:
                status = self.walk_some(RECORDS_AT_A_TIME)
            if status == SCAN_EOS:
                return "eos"
            if status == SCAN_LIST:
                return "list"
            if status == SCAN_END:
                return "end"
            if status == SCAN_PAUSE:
                if look_round is not None:
                    look_round(self.at)
            elif status == SCAN_INFLATE:
                self.take_inflated()
            elif status == SCAN_INFLATE_BASE:
                self.inflate_base()
            elif status == SCAN_BAD_NAME and not self.closed_list:
                self.add_block(self.name[:self.name_length])
                self.at = self.head_offset
            else:
                raise self.refusal(status)

    @property
    def list_total(self):
        """What the block list at hand says its lengths add up to, in bytes."""
        return self.head & ~(self.page_size - 1)

    cdef take_inflated(self):
        """A compressed page that lies whole in the stream, from its length on."""
        cdef ScanBlock *block = &self.table[self.last_block]
        cdef uint64_t place = self.at
        self.inflate(place, self.page)
        self.note(block, self.head // self.page_size, place << KIND_BITS | PAGE_COMPRESSED)
        self.at += 4 + get_be32(self.bytes + place)
        block.compressed += 1

    cdef inflate_base(self):
        """The page that the delta at hand is for becomes a patched one; then the walk takes the record again."""
        cdef ScanBlock *block = &self.table[self.last_block]
        cdef uint64_t page = self.head // self.page_size
        self.inflate(block.entries[page] >> KIND_BITS, self.page)
        if self.keep_patched(block, page) != SCAN_OK:
            raise self.scratch_failure()
        self.at = self.head_offset

    cdef int inflate(self, uint64_t place, uint8_t *target) except -1:
        cdef uint64_t length = get_be32(self.bytes + place)
        decompressor = zlib.decompressobj()
        try:
            page = decompressor.decompress(self.bytes[place + 4 : place + 4 + length], self.page_size + 1)
        except zlib.error as error:
            raise self.refuse(f"compressed page of {length} bytes: {error}, expected a zlib stream") from None
        if <uint64_t> len(page) != self.page_size or not decompressor.eof or decompressor.unused_data:
            raise self.refuse(
                f"{length} compressed bytes inflate to {len(page)} bytes, expected one whole page of {self.page_size}"
            )
        memcpy(target, <const uint8_t *> <bytes> page, self.page_size)
        return 0

    cdef scratch_failure(self):
        what = os.strerror(self.error) if self.error else "it is shorter than what was written to it"
        return OSError(self.error, f"the scratch file for patched pages failed: {what}")

    cdef refuse(self, finding):
        place = self.head_offset
        return StreamError(f"RAM record at {place:#x}: {finding}", offset=place, section="ram")

    cdef refusal(self, int status):
        flags = self.head & (self.page_size - 1)
        if status == SCAN_IO:
            return self.scratch_failure()
        if status == SCAN_CUT:
            return StreamError(
                f"stream ends inside the RAM record at {self.head_offset:#x}: {self.size - self.at} bytes left "
                f"at offset {self.at:#x}, {self.wanted} expected",
                offset=self.at,
                section="ram",
            )
        if status == SCAN_FLAGS:
            return self.refuse(
                f"head {self.head:#x} has flags {flags:#x}, expected one of ZERO (0x2), MEM_SIZE (0x4), PAGE (0x8), "
                f"EOS (0x10), XBZRLE (0x40), COMPRESS_PAGE (0x100), MULTIFD_FLUSH (0x200)"
            )
        if status == SCAN_NO_BLOCK:
            return self.refuse(f"head {self.head:#x} continues a block, expected a name: no page came before it")
        if status == SCAN_BAD_NAME:
            known = ", ".join(repr(name.decode("utf-8", "backslashreplace")) for name in self.names)
            name = self.name[:self.name_length].decode("utf-8", "backslashreplace")
            return self.refuse(f"block {name!r} is not on the stream's list of blocks, which has {known}")
        if status == SCAN_BAD_OFFSET:
            name = self.names[self.last_block].decode("utf-8", "backslashreplace")
            return self.refuse(
                f"offset {self.list_total:#x} in block {name!r}, "
                f"expected one below {self.table[self.last_block].pages * self.page_size:#x}"
            )
        if status == SCAN_BAD_FILL:
            return self.refuse(f"fill byte {self.bytes[self.at]:#x} of a zero page, expected 0")
        if status == SCAN_BAD_ENCODING:
            return self.refuse(f"XBZRLE with encoding {self.bytes[self.at]:#x}, expected {ENCODING_FLAG_XBZRLE:#x}")
        if status == SCAN_BAD_DELTA:
            length = self.bytes[self.at + 1] << 8 | self.bytes[self.at + 2]
            return self.refuse(f"malformed XBZRLE delta: {fault_text(&self.fault, self.page_size, length)}")
        delta = flags & RAM_SAVE_FLAG_XBZRLE
        length = (self.bytes[self.at + 1] << 8 | self.bytes[self.at + 2]) if delta else get_be32(self.bytes + self.at)
        limit = self.page_size if delta else self.page_size + ZLIB_OVERHEAD
        return self.refuse(f"{'delta' if delta else 'compressed page'} of {length} bytes, expected at most {limit}")

    def map_block(self, int index, uint64_t bitmap_offset, uint64_t pages_offset):
        """The pages of a mapped-ram file; see scan.pyi."""
        cdef ScanBlock *block = self.block_at(index)
        cdef uint64_t page, pages = block.pages
        cdef uint64_t bitmap_size = (pages + 63) // 64 * 8
        if pages == UNKNOWN_PAGES or bitmap_offset > self.size or bitmap_size > self.size - bitmap_offset:
            raise ValueError(f"bitmap at {bitmap_offset:#x} of {bitmap_size:#x} bytes reaches past the end")
        if pages_offset > self.size or pages > (self.size - pages_offset) // self.page_size:
            raise ValueError(f"{pages} pages at {pages_offset:#x} reach past the end")
        with nogil:
            for page in range(pages):
                if self.bytes[bitmap_offset + (page >> 3)] >> (page & 7) & 1:
                    self.note(block, page, (pages_offset + page * self.page_size) << KIND_BITS | PAGE_PLAIN)
                    block.normal += 1

    cdef ScanBlock *block_at(self, int index) except NULL:
        if not 0 <= index < self.block_count:
            raise IndexError(f"block {index} of {self.block_count}")
        return &self.table[index]

    def counts(self, int index):
        """How many records of each kind came; see scan.pyi."""
        cdef ScanBlock *block = self.block_at(index)
        return {"zero": block.zero, "normal": block.normal, "xbzrle": block.xbzrle, "compressed": block.compressed}

    def end(self, int index):
        """One past the highest page of which a record came; see scan.pyi."""
        return self.block_at(index).end


cdef int write_whole(int fd, const uint8_t *data, size_t size, uint64_t offset) noexcept nogil:
    """Write all of it; returns 0 or errno."""
    cdef size_t done = 0
    cdef ssize_t count
    while done < size:
        count = pwrite(fd, data + done, size - done, offset + done)
        if count < 0:
            if errno == EINTR:
                continue
            return errno
        done += count
    return 0
