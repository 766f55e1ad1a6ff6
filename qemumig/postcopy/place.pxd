"""MissingMemory for compiled rooms."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from ..ram.landing cimport Landing
from .blocktime cimport FaultTimes
from .uffd cimport Userfaultfd

cdef struct MissingBlock:
    uint8_t *host
    uint64_t pages                # target pages in use
    uint64_t host_page            # bytes of a host page
    uint64_t *received            # one bit a target page; shared
    uint64_t *requested           # one bit a target page, that of the first of a host page; shared
    uint64_t urgent_end           # the page behind the last one that came urgently; 0: none did
    bint comes                    # the source sends this block
    bint takes_zero               # the kernel places zero pages here
    size_t name_length
    const uint8_t *name


cdef class MissingMemory:
    cdef readonly Landing landing     # keeps alive what the table points to
    cdef readonly list blocks         # RAMBlock
    cdef readonly list received       # Bitmap of each
    cdef list requested               # Bitmap of each
    cdef readonly Userfaultfd uffd
    cdef readonly FaultTimes times
    cdef MissingBlock *table
    cdef readonly int block_count
    cdef uint64_t largest             # host page of all blocks
    cdef uint8_t *zeroes              # as many, where the kernel cannot place zero pages by itself
    cdef int error                    # errno of the last page that could not be placed …
    cdef int failed_block             # … and which one that was
    cdef uint64_t failed_page
    cdef uint64_t placed              # host pages; shared
    cdef uint64_t placings            # how often pages were placed, several at once counting as one; shared

    cdef int find_address(self, uint64_t address) noexcept nogil
    cdef int place(self, int index, uint64_t page, uint64_t count, const void *data) noexcept nogil
    cdef int put(self, MissingBlock *block, uint64_t offset, uint64_t length, const void *data, uint64_t *done) noexcept nogil
    cdef bint is_missing(self, int index, uint64_t page) noexcept nogil
    cdef uint64_t next_missing(self, int index, uint64_t page) noexcept nogil
    cdef bint waits_beside(self, int index) noexcept nogil
    cdef void note_placed(self, MissingBlock *block, uint64_t page, uint64_t end) noexcept nogil
