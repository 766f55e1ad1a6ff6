"""Populated pages, for compiled rooms."""

from libc.stdint cimport uint64_t

cdef class PageMap:
    cdef int fd                   # of /proc/self/pagemap, or −1
    cdef bint can_scan            # the kernel has PAGEMAP_SCAN

    cdef bint find_populated(self, uint64_t address, uint64_t pages, uint64_t *words) noexcept nogil
    cdef bint scan(self, uint64_t address, uint64_t pages, uint64_t *words) noexcept nogil
    cdef bint read_entries(self, uint64_t address, uint64_t pages, uint64_t *words) noexcept nogil
