"""The delta codec for compiled rooms."""

from libc.stdint cimport uint8_t, uint64_t

cdef extern from *:
    """
    #ifndef QEMUMIG_DELTA_FAULT
    #define QEMUMIG_DELTA_FAULT
    #include <stddef.h>
    #include <stdint.h>
    #define XBZRLE_BLOCK 64                          /* bytes of a page for which `filled` has a bit */
    #define MOST_SCATTERED 32                        /* a copy with more blocks than this is foreseen by the processor */

    struct DeltaFault { int rule; size_t at, position, count; };

    static inline void expect_encoding(const uint8_t *seen, uint64_t filled)
    {
        if (__builtin_popcountll(filled) > MOST_SCATTERED)
            return;
        for (; filled; filled &= filled - 1)
            __builtin_prefetch(seen + XBZRLE_BLOCK * __builtin_ctzll(filled));
    }
    #endif
    """
    cdef struct DeltaFault:
        int rule                  # which check of the decoder failed
        size_t at                 # offset in the delta of the number at fault
        size_t position           # in the page, where that number applies
        size_t count              # the number, when it could be read

    # Let memory bring those blocks of the copy of a page to come that the encoder will read: where they lie scattered it
    # would wait for each.
    void expect_encoding(const uint8_t *seen, uint64_t filled) noexcept nogil

cdef enum:
    XBZRLE_UNCHANGED = 0          # no byte differs: there is nothing to send
    XBZRLE_TOO_BIG = -1           # the delta would be longer than the limit
    XBZRLE_MAX_LENGTH = 0x3FFF    # the longest page that numbers of two bytes can walk
    XBZRLE_FILLED_WORDS = 4       # of bits, one for every 64 bytes of the longest page

# Bring *seen*, what the other side has, up to *page*; both have *length* bytes, at most XBZRLE_MAX_LENGTH.  Returns the
# length of the delta, which lies at *delta* (room for *limit* bytes), or XBZRLE_UNCHANGED or XBZRLE_TOO_BIG; *seen*
# equals *page* in each case.  Each byte of *page* is read once, so it may change meanwhile.
# *filled*: a bit for each 64 bytes of *seen*, 0 only if these are zero; brought up to date as well.
ctypedef int (*DeltaEncoder)(
    uint8_t *seen, uint64_t *filled, const uint8_t *page, size_t length, uint8_t *delta, size_t limit
) noexcept nogil

# Patch the *size* bytes at *page*.  Returns 0; or 1 with *fault* filled when the delta is malformed, and the page may be
# half patched then.
ctypedef int (*DeltaDecoder)(
    uint8_t *page, size_t size, const uint8_t *delta, size_t length, DeltaFault *fault
) noexcept nogil

cdef DeltaEncoder encode_delta
cdef DeltaDecoder apply_delta

# Make *seen*, and *filled* with it, what *page* is, whatever they were.
cdef void insert_page(uint8_t *seen, uint64_t *filled, const uint8_t *page, size_t length) noexcept nogil

cdef str fault_text(const DeltaFault *fault, size_t size, size_t length)
