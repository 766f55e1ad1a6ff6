"""Landing for compiled rooms: where pages of every block go, and which have come."""

cimport cython
from libc.stdint cimport uint8_t, uint64_t

from .bitmap cimport set_bit, set_bit_shared

cdef struct LoadBlock:
    uint8_t *host                 # address of page 0
    uint64_t pages                # target pages in use
    uint64_t *received            # one bit a page: a record for it has come
    bint fresh                    # what was not received reads as zero
    size_t name_length
    const uint8_t *name


@cython.final
cdef class Landing:
    cdef readonly list blocks         # RAMBlock
    cdef readonly list received       # Bitmap of each block
    cdef readonly list names          # bytes; keeps alive what the table points to
    cdef readonly set listed          # indices of the blocks that the source has listed
    cdef LoadBlock *table
    cdef int block_count
    cdef public bint postcopy_advised # the list of blocks tells page sizes that are not the usual one
    cdef bint shared                  # several threads receive pages at once
    cdef readonly bint ignore_shared  # memory that the source's process has, too, is left out

    cdef int find_block(self, const uint8_t *name, size_t length) noexcept nogil
    cdef void clear_page(self, LoadBlock *block, uint64_t page) noexcept nogil

    cdef inline void note_received(self, LoadBlock *block, uint64_t page) noexcept nogil:
        if self.shared:
            set_bit_shared(block.received, page)
        else:
            set_bit(block.received, page)
