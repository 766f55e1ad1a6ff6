"""DirtyPages for compiled rooms: what of every block still has to be sent."""

from libc.stdint cimport uint8_t, uint64_t

from .populated cimport PageMap

cdef struct PageBlock:
    uint8_t *host                 # address of page 0
    uint64_t pages                # target pages in use
    uint64_t *dirty               # one bit a page: must be sent
    uint64_t *unvisited           # one bit a chunk: the log was read, and nothing of the chunk was since
    uint64_t *prepared            # one bit a chunk: protected since the log was read, and what follows is of that time
    uint64_t *populated           # one bit a page: it may hold something else than zeroes …
    uint64_t *looked_at           # … and does: somebody has looked


cdef class DirtyPages:
    cdef readonly list blocks         # RAMBlock, in the order of the walk
    cdef readonly list bitmaps        # Bitmap of each block
    cdef list chunks                  # Bitmap of each block's unvisited chunks
    cdef list further                 # Bitmaps that only the table refers to
    cdef object scout                 # who goes ahead, or None
    cdef object lock
    cdef uint64_t is_awaited          # the lock, by the thread that sends
    cdef PageMap page_map
    cdef readonly object log          # the machine's DirtyLog
    cdef PageBlock *table             # the same for engines
    cdef readonly int block_count
    cdef readonly int chunk_shift     # log2 of the pages in a chunk
    cdef readonly uint64_t remaining  # bits that are set, all blocks together
    cdef readonly uint64_t sync_count
    cdef readonly uint64_t synced_pages    # dirty after the last sync
    cdef readonly uint64_t new_pages       # found dirty by syncs that were clean before, since the beginning

    cdef uint64_t *new_bits(self, uint64_t bits) except NULL
    cdef interrupt_look(self)
    cdef fetch_log(self)
    cdef prepare_chunk(self, int block_index, uint64_t chunk)
    cdef void find_zeroes(self, int block_index, uint64_t chunk) noexcept nogil
    cdef bint is_worth_a_look(self, PageBlock *block, uint64_t first, uint64_t end) noexcept nogil
