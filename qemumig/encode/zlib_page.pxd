"""One page as one zlib stream, for compiled rooms."""

from libc.stdint cimport uint8_t

cdef enum:
    ZLIB_PAGE_MAX_LENGTH = 4110   # what a page can become at worst (compress.md §1)

cdef enum PageStatus:
    ZLIB_PAGE_OK = 0
    ZLIB_PAGE_NO_LIBRARY = 1
    ZLIB_PAGE_BROKEN = 2          # not a zlib stream, or it ends early, or its checksum is another
    ZLIB_PAGE_TOO_LONG = 3        # it holds more than a page
    ZLIB_PAGE_TOO_SHORT = 4       # it holds less
    ZLIB_PAGE_MORE_BEHIND = 5     # bytes follow its end

cdef int inflate_page(uint8_t *page, const uint8_t *data, size_t length) noexcept nogil
cdef size_t deflate_page(const uint8_t *page, uint8_t *target, int level) noexcept nogil
