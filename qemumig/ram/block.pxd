"""RAMBlock for compiled rooms: where a named piece of guest RAM lies and how long it is."""

from libc.stdint cimport uint64_t


cdef class RAMBlock:
    cdef readonly str idstr              # the block's name on the wire
    cdef readonly uint64_t host_address  # where it is mapped in this process
    cdef readonly uint64_t used_length   # bytes in use, a multiple of the target page
    cdef readonly uint64_t max_length    # bytes mapped; used_length may grow up to here
    cdef readonly uint64_t page_size     # bytes of one host page (4096, or a huge page's)
    cdef readonly uint64_t guest_address # guest-physical address of its first byte
    cdef readonly bint shared            # mapped shared: another process may see writes
    cdef readonly bint named             # of a file with a name, by which another process finds it
    cdef readonly bint anonymous         # private anonymous memory: what is not populated is zero
    cdef public bint fresh               # nobody has written to it since it was mapped
    cdef readonly object owner           # keeps the mapping alive
