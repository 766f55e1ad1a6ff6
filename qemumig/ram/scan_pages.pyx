"""The pages that a scan has found in a recorded stream: read, written to a file, compared (ram.md §2).

In    a RamScan that has kept where the newest content of every page lies
Out   content, from where it lies where that is possible

Threads   one at a time per scan; no GIL inside, but for zlib.
"""

import os

from libc.errno cimport EINTR, errno
from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcmp, memcpy

from ..encode.zero cimport is_zero
from ..wire.stream cimport iovec
from .scan cimport (
    KIND_BITS,
    KIND_MASK,
    PAGE_ABSENT,
    PAGE_COMPRESSED,
    PAGE_PATCHED,
    PAGE_PLAIN,
    PAGE_ZERO,
    SCAN_OK,
    RamScan,
    ScanBlock,
)

cdef extern from "<sys/uio.h>" nogil:
    ssize_t pwritev(int fd, const iovec *iov, int count, ssize_t offset)

cdef enum:
    RUN_LIMIT = 256               # pages of one write


cdef class ScannedPages:
    """The pages of *scan*; see scan_pages.pyi."""

    cdef RamScan scan
    cdef readonly uint64_t page_size
    cdef uint8_t *room            # for one page …
    cdef uint8_t *other_room      # … and for a second one, when pages of one scan are compared
    cdef uint8_t *zeroes          # a page of them

    def __cinit__(self, RamScan scan not None):
        self.scan = scan
        self.page_size = scan.page_size
        self.room = <uint8_t *> calloc(3, self.page_size)
        if self.room == NULL:
            raise MemoryError("no memory for three pages")
        self.other_room = self.room + self.page_size
        self.zeroes = self.room + 2 * self.page_size

    def __dealloc__(self):
        free(self.room)

    # ---- the engine ----

    cdef const uint8_t *content(self, uint64_t entry, uint8_t *room) except NULL nogil:
        """The page that *entry* refers to, in place or in *room*."""
        cdef uint64_t kind = entry & KIND_MASK
        if kind == PAGE_PLAIN:
            return self.scan.bytes + (entry >> KIND_BITS)
        if kind == PAGE_PATCHED:
            if self.scan.read_scratch(room, entry >> KIND_BITS) != SCAN_OK:
                with gil:
                    raise self.scan.scratch_failure()
            return room
        if kind == PAGE_COMPRESSED:
            with gil:
                self.scan.inflate(entry >> KIND_BITS, room)
            return room
        return self.zeroes

    cdef uint8_t *nonzero_content(self, uint64_t entry) except? NULL nogil:
        """The page, or NULL when it is all zeroes."""
        cdef const uint8_t *page
        if entry & KIND_MASK <= PAGE_ZERO:
            return NULL
        page = self.content(entry, self.room)
        return NULL if is_zero(page, self.page_size) else <uint8_t *> page

    cdef ScanBlock *kept_block(self, int index) except NULL:
        cdef ScanBlock *block = self.scan.block_at(index)
        if block.entries == NULL and block.end:
            raise ValueError("the scan was made without keeping pages, or the length of the block is not known")
        return block

    cdef int differs(self, ScanBlock *mine, ScannedPages other, ScanBlock *theirs, uint64_t page) except -1 nogil:
        cdef uint64_t here = mine.entries[page] if page < mine.end else PAGE_ABSENT
        cdef uint64_t there = theirs.entries[page] if page < theirs.end else PAGE_ABSENT
        if here <= PAGE_ZERO and there <= PAGE_ZERO:
            return 0
        return memcmp(self.content(here, self.room), other.content(there, other.other_room), self.page_size) != 0

    # ---- the door ----

    def read(self, int index, uint64_t first, uint64_t count):
        """The content of pages; see scan_pages.pyi."""
        cdef ScanBlock *block = self.kept_block(index)
        cdef uint64_t page
        result = bytearray(count * self.page_size)
        cdef uint8_t *target = result
        for page in range(first, min(first + count, block.end)):
            memcpy(
                target + (page - first) * self.page_size, self.content(block.entries[page], self.room), self.page_size
            )
        return result

    def export(self, int index, int fd, uint64_t first, uint64_t count):
        """Write pages that are not zero to a file; see scan_pages.pyi."""
        cdef ScanBlock *block = self.kept_block(index)
        cdef uint64_t page, written = 0
        cdef uint64_t begin = first       # of the run at hand
        cdef uint8_t *content
        cdef iovec iov[RUN_LIMIT]
        cdef int length = 0
        cdef int error = 0
        with nogil:
            for page in range(first, min(first + count, block.end)):
                content = self.nonzero_content(block.entries[page])
                if content != NULL:
                    if length == 0:
                        begin = page
                    iov[length].iov_base = content
                    iov[length].iov_len = self.page_size
                    length += 1
                    written += 1
                    if content != self.room and length < RUN_LIMIT:
                        continue
                error = write_run(fd, iov, length, begin * self.page_size)
                length = 0
                if error:
                    break
            if not error:
                error = write_run(fd, iov, length, begin * self.page_size)
        if error:
            raise OSError(error, os.strerror(error))
        return written

    def next_difference(
        self, int index, ScannedPages other not None, int other_index, uint64_t first, uint64_t limit
    ):
        """The next run of pages that differ; see scan_pages.pyi."""
        cdef ScanBlock *mine = self.kept_block(index)
        cdef ScanBlock *theirs = other.kept_block(other_index)
        cdef uint64_t page, begin = limit, end = limit
        if self.page_size != other.page_size:
            raise ValueError(f"page sizes {self.page_size} and {other.page_size} differ")
        with nogil:
            for page in range(first, limit):
                if self.differs(mine, other, theirs, page):
                    begin = page
                    break
            for page in range(begin, limit):
                if not self.differs(mine, other, theirs, page):
                    end = page
                    break
        return begin, end


cdef int write_run(int fd, iovec *iov, int count, uint64_t offset) noexcept nogil:
    """Write *count* pages that follow each other in the file; returns 0 or errno."""
    cdef int at = 0
    cdef ssize_t written
    while at < count:
        written = pwritev(fd, iov + at, count - at, offset)
        if written < 0:
            if errno == EINTR:
                continue
            return errno
        offset += written
        while at < count and <size_t> written >= iov[at].iov_len:
            written -= iov[at].iov_len
            at += 1
        if written:
            iov[at].iov_base = <uint8_t *> iov[at].iov_base + written
            iov[at].iov_len -= written
    return 0
