"""PageCache for compiled rooms."""

from libc.stdint cimport uint8_t, uint64_t

cdef enum CacheVerdict:
    SEND_NOTHING = 0              # the destination has this very page
    SEND_DELTA = 1
    SEND_PAGE = 2

cdef struct Slot:
    uint64_t holds                # number of the page, plus one; 0: nothing yet
    uint64_t age                  # generation in which it was last sent or seen
    uint64_t filled               # a bit for each block of 64 bytes of the copy; 0: the block is zero

cdef struct Verdict:
    const uint8_t *page           # SEND_PAGE: the bytes to send
    size_t length                 # SEND_DELTA: of the delta …
    uint8_t delta[4096]           # … which lies here


cdef class PageCache:
    cdef readonly uint64_t size       # bytes
    cdef uint64_t slot_mask           # slots − 1
    cdef Slot *slots
    cdef uint8_t *pages               # one a slot; the first touch makes it exist
    cdef void *mapping
    cdef size_t mapping_length
    cdef readonly uint64_t hits
    cdef readonly uint64_t misses
    cdef readonly uint64_t overflows
    cdef readonly uint64_t sent_bytes
    cdef readonly double miss_rate
    cdef readonly double encoding_rate
    cdef uint64_t last_hits           # the counters as they were when the period began …
    cdef uint64_t last_misses
    cdef uint64_t last_bytes
    cdef uint64_t last_handled        # … and the pages handled until then

    cdef int settle(
        self, uint64_t page, const uint8_t *content, uint64_t generation, bint last_stage, Verdict *verdict
    ) noexcept nogil
    cdef void expect_settle(self, uint64_t index) noexcept nogil
    cdef bint insert_zero(self, uint64_t page, uint64_t generation) noexcept nogil
    cdef void count_delta(self, uint64_t record_bytes) noexcept nogil
    cdef int map_slots(self, uint64_t size) except -1
    cdef void unmap_slots(self) noexcept
    cdef int check_page(self, uint64_t page) except -1
