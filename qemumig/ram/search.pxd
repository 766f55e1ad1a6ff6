"""Which page next: the walk over the dirty bitmaps (ram.md §6).

One walk goes from the position through the rest of its block, the following blocks, wraps to the first block and ends
when it comes back to where it started without having found a set bit.  A round ends when it passes the last block.
"""

from libc.stdint cimport uint64_t

from .bitmap cimport find_next_set
from .dirty cimport DirtyPages

cdef struct Walk:
    int block                     # index of the block of the next page to look at
    uint64_t page                 # that page
    uint64_t rounds               # how often the last block was passed


cdef inline bint next_dirty_page(Walk *walk, DirtyPages dirty) noexcept nogil:
    """Move *walk* to the next dirty page; False when none is left anywhere."""
    cdef int passed
    cdef uint64_t pages
    for passed in range(dirty.block_count + 1):
        pages = dirty.table[walk.block].pages
        walk.page = find_next_set(dirty.table[walk.block].dirty, walk.page, pages)
        if walk.page < pages:
            return True
        walk.page = 0
        walk.block += 1
        if walk.block == dirty.block_count:
            walk.block = 0
            walk.rounds += 1
    return False
