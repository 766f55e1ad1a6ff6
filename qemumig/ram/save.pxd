"""PageSender for compiled rooms: multifd sends pages in the same order by another way."""

from libc.stdint cimport uint8_t, uint64_t

from ..wire.stream cimport OutputStream
from .cache cimport PageCache
from .dirty cimport DirtyPages
from .search cimport Walk


cdef class PageSender:
    cdef readonly DirtyPages dirty
    cdef readonly OutputStream out
    cdef Walk walk
    cdef int last_block               # of the previous record on this stream; −1: none yet
    cdef list names                   # counted strings, kept alive for …
    cdef const uint8_t *name_table[256]
    cdef size_t name_length[256]
    cdef uint64_t first_page[256]     # of the block, when the pages of all blocks are numbered through
    cdef PageCache cache              # None: pages go out whole
    cdef int compress_level           # −1: pages are not compressed
    cdef public bint last_stage       # the guest is stopped: nothing enters the cache any more
    cdef readonly uint64_t zero_pages
    cdef readonly uint64_t normal_pages
    cdef readonly uint64_t compressed_pages
    cdef readonly uint64_t handled_pages
    cdef int stream_status

    cdef size_t put_head(self, uint8_t *head, uint64_t flags) noexcept nogil
    cdef bint encodes(self) noexcept nogil
    cdef uint64_t page_number(self) noexcept nogil
    cdef int send_page(self) noexcept nogil
    cdef bint is_zero_page(self, uint64_t page) noexcept nogil
    cdef int send_zero(self) noexcept nogil
    cdef uint64_t send_zeroes(self, uint64_t limit) noexcept nogil
    cdef int send_whole(self, const uint8_t *page) noexcept nogil
    cdef int send_compressed(self, const uint8_t *page) noexcept nogil
    cdef int send_encoded(self, const uint8_t *page) noexcept nogil
    cdef int send_some(self, uint64_t byte_limit, uint64_t page_limit) noexcept nogil
    cdef uint64_t sent_bytes(self) noexcept nogil
