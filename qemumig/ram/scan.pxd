"""The scan of a recorded stream, for whoever reads the pages that it has found."""

from libc.stdint cimport uint8_t, uint64_t

from ..encode.xbzrle cimport DeltaFault

cdef enum PageKind:
    PAGE_ABSENT = 0               # no record came for it
    PAGE_ZERO = 1
    PAGE_PLAIN = 2
    PAGE_COMPRESSED = 3
    PAGE_PATCHED = 4
    KIND_BITS = 3
    KIND_MASK = 7

cdef enum ScanStatus:
    SCAN_OK = 0
    SCAN_EOS = 1                  # the section's body is over
    SCAN_LIST = 2                 # a block list begins: the caller's business
    SCAN_PAUSE = 3                # many records done, more to come
    SCAN_END = 4                  # the stream ends between two records
    SCAN_CUT = 5                  # the stream ends inside a record
    SCAN_FLAGS = 6                # unknown flags
    SCAN_NO_BLOCK = 7             # CONTINUE before any name
    SCAN_BAD_NAME = 8             # a block that the list does not have
    SCAN_BAD_OFFSET = 9           # past the block's end
    SCAN_BAD_FILL = 10            # a fill byte that is not zero
    SCAN_BAD_ENCODING = 11        # XBZRLE with another encoding than 1
    SCAN_BAD_LENGTH = 12          # a delta or a compressed page longer than any can be
    SCAN_BAD_DELTA = 13
    SCAN_INFLATE = 14             # a compressed page, to be tried by the door
    SCAN_INFLATE_BASE = 15        # a delta upon a compressed page, to be inflated by the door first
    SCAN_IO = 16                  # the scratch file failed; errno is in .error


cdef struct ScanBlock:
    const uint8_t *name
    size_t name_length
    uint64_t pages                # UNKNOWN_PAGES: no list has announced the block
    uint64_t zero
    uint64_t normal
    uint64_t xbzrle
    uint64_t compressed
    uint64_t end                  # one past the highest page that came
    uint64_t *entries             # NULL unless kept


cdef class RamScan:
    cdef const uint8_t[::1] data
    cdef const uint8_t *bytes
    cdef uint64_t size
    cdef readonly uint64_t page_size
    cdef readonly list names
    cdef bint keep_pages
    cdef bint closed_list             # no block may come that was not announced
    cdef ScanBlock *table
    cdef int block_count
    cdef int last_block               # of the previous record; −1: none yet
    cdef uint64_t head                # of the record at hand …
    cdef uint64_t head_offset         # … and where it stood
    cdef uint64_t at                  # where the walk is
    cdef uint64_t wanted              # bytes that were expected where the stream was cut
    cdef const uint8_t *name
    cdef size_t name_length
    cdef uint8_t *page                # room for one
    cdef DeltaFault fault             # of the delta at hand
    cdef int scratch_fd
    cdef uint64_t scratch_pages
    cdef int error
    cdef readonly uint64_t flushes

    cdef bint there(self, uint64_t length) noexcept nogil
    cdef int find_block(self) noexcept nogil
    cdef int take_block(self) noexcept nogil
    cdef void note(self, ScanBlock *block, uint64_t page, uint64_t entry) noexcept nogil
    cdef int take_zero(self, ScanBlock *block, uint64_t page) noexcept nogil
    cdef int take_plain(self, ScanBlock *block, uint64_t page) noexcept nogil
    cdef int take_compressed(self, ScanBlock *block, uint64_t page) noexcept nogil
    cdef int take_delta(self, ScanBlock *block, uint64_t page) noexcept nogil
    cdef int load_base(self, uint64_t entry) noexcept nogil
    cdef int keep_patched(self, ScanBlock *block, uint64_t page) noexcept nogil
    cdef int read_scratch(self, uint8_t *target, uint64_t slot) noexcept nogil
    cdef int walk_some(self, int limit) noexcept nogil
    cdef map_entries(self, ScanBlock *block, name)
    cdef take_inflated(self)
    cdef inflate_base(self)
    cdef int inflate(self, uint64_t place, uint8_t *target) except -1
    cdef scratch_failure(self)
    cdef refuse(self, finding)
    cdef refusal(self, int status)
    cdef ScanBlock *block_at(self, int index) except NULL
