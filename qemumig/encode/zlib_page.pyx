"""One page as one zlib stream of its own: the records of `compress`, of QEMU until 9.0 (compress.md).

In    a page               Out   78 01 …, deflate, Adler-32: at most 4110 bytes
In    such a stream        Out   the page, straight into guest memory

The library is the system's own, found by name when it is first wanted, and called without the GIL; nothing is built
against its headers.

Threads   any; no shared state but the library's two functions, which are looked up once under the GIL
Holds     (1) nothing is written past the page or the target, nothing read past the data
          (2) the guest may write to the page meanwhile: what is compressed is a copy
          (3) a stream that does not hold exactly a page, with the right checksum and nothing behind it, is refused
"""

from libc.stdint cimport uint8_t
from libc.string cimport memcpy

from ..errors import OptionError
from ..wire.format cimport TARGET_PAGE_SIZE
from .libraries import Library, functions_of

PAGES = Library("zlib", "libz.so.1", "zlib1g", ("compress2", "uncompress2"))

cdef enum:
    Z_OK = 0
    Z_BUF_ERROR = -5              # no room in the target, or the source is not whole

ctypedef int (*Uncompress)(uint8_t *, unsigned long *, const uint8_t *, unsigned long *) noexcept nogil
ctypedef int (*Compress)(uint8_t *, unsigned long *, const uint8_t *, unsigned long, int) noexcept nogil

cdef Uncompress uncompress2 = NULL
cdef Compress compress2 = NULL


def load_library():
    """Find the functions; OptionError when the system has none of them."""
    global uncompress2, compress2
    try:
        functions = functions_of(PAGES)
    except OptionError as error:
        text = f"compressed pages need {PAGES.soname}; on Debian: apt-get install {PAGES.package}"
        raise OptionError(text, name="compress") from error
    uncompress2 = <Uncompress> <size_t> functions["uncompress2"]
    compress2 = <Compress> <size_t> functions["compress2"]


cdef int inflate_page(uint8_t *page, const uint8_t *data, size_t length) noexcept nogil:
    """Make *page* what the *length* bytes at *data* hold: a PageStatus."""
    cdef unsigned long size = TARGET_PAGE_SIZE, used = length
    cdef int status
    if uncompress2 == NULL:
        return ZLIB_PAGE_NO_LIBRARY
    status = uncompress2(page, &size, data, &used)
    if status == Z_BUF_ERROR:
        return ZLIB_PAGE_TOO_LONG
    if status != Z_OK:
        return ZLIB_PAGE_BROKEN
    if size != TARGET_PAGE_SIZE:
        return ZLIB_PAGE_TOO_SHORT
    return ZLIB_PAGE_OK if used == length else ZLIB_PAGE_MORE_BEHIND


cdef size_t deflate_page(const uint8_t *page, uint8_t *target, int level) noexcept nogil:
    """Compress *page* into *target*, which has room for ZLIB_PAGE_MAX_LENGTH bytes; their number, 0 when it fails."""
    cdef uint8_t copy[TARGET_PAGE_SIZE]
    cdef unsigned long size = ZLIB_PAGE_MAX_LENGTH
    if compress2 == NULL:
        return 0
    memcpy(copy, page, TARGET_PAGE_SIZE)
    return size if compress2(target, &size, copy, TARGET_PAGE_SIZE, level) == Z_OK else 0


cdef dict FINDINGS = {
    ZLIB_PAGE_NO_LIBRARY: f"there is no {PAGES.soname} here",
    ZLIB_PAGE_BROKEN: "it is no whole zlib stream, or its checksum is wrong",
    ZLIB_PAGE_TOO_LONG: "it holds more than a page, or ends early",
    ZLIB_PAGE_TOO_SHORT: "it holds less than a page",
    ZLIB_PAGE_MORE_BEHIND: "bytes follow the end of its zlib stream",
}


def finding(int status) -> str:
    """What is wrong with a page's data, as a sentence; see zlib_page.pyi."""
    return FINDINGS[status]


def compress(const uint8_t[::1] page not None, int level=1) -> bytes:
    """The stream of *page*; see zlib_page.pyi."""
    cdef uint8_t target[ZLIB_PAGE_MAX_LENGTH]
    cdef size_t length
    if page.shape[0] != TARGET_PAGE_SIZE or not 0 <= level <= 9:
        raise ValueError(f"a page of {page.shape[0]} bytes at level {level}, expected {TARGET_PAGE_SIZE} and 0 to 9")
    load_library()
    with nogil:
        length = deflate_page(&page[0], target, level)
    return target[:length]


def decompress(const uint8_t[::1] data not None) -> bytes:
    """The page that *data* holds; see zlib_page.pyi."""
    cdef uint8_t page[TARGET_PAGE_SIZE]
    cdef int status = ZLIB_PAGE_BROKEN
    load_library()
    if data.shape[0]:
        with nogil:
            status = inflate_page(page, &data[0], data.shape[0])
    if status != ZLIB_PAGE_OK:
        raise ValueError(finding(status))
    return page[:TARGET_PAGE_SIZE]
