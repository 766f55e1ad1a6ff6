"""The delta codec for compiled rooms."""

from libc.stdint cimport uint8_t

cdef extern from *:
    """
    #ifndef QEMUMIG_DELTA_FAULT
    #define QEMUMIG_DELTA_FAULT
    #include <stddef.h>
    struct DeltaFault { int rule; size_t at, position, count; };
    #endif
    """
    cdef struct DeltaFault:
        int rule                  # which check of the decoder failed
        size_t at                 # offset in the delta of the number at fault
        size_t position           # in the page, where that number applies
        size_t count              # the number, when it could be read

cdef enum:
    XBZRLE_UNCHANGED = 0          # no byte differs: there is nothing to send
    XBZRLE_TOO_BIG = -1           # the delta would be longer than the limit
    XBZRLE_MAX_LENGTH = 0x3FFF    # the longest page that numbers of two bytes can walk

# Bring *seen*, what the other side has, up to *page*; both have *length* bytes, at most XBZRLE_MAX_LENGTH.  Returns the
# length of the delta, which lies at *delta* (room for *limit* bytes), or XBZRLE_UNCHANGED or XBZRLE_TOO_BIG; *seen*
# equals *page* in each case.  Each byte of *page* is read once, so it may change meanwhile.
ctypedef int (*DeltaEncoder)(uint8_t *seen, const uint8_t *page, size_t length, uint8_t *delta, size_t limit) noexcept nogil

# Patch the *size* bytes at *page*.  Returns 0; or 1 with *fault* filled when the delta is malformed, and the page may be
# half patched then.
ctypedef int (*DeltaDecoder)(
    uint8_t *page, size_t size, const uint8_t *delta, size_t length, DeltaFault *fault
) noexcept nogil

cdef DeltaEncoder encode_delta
cdef DeltaDecoder apply_delta

cdef str fault_text(const DeltaFault *fault, size_t size, size_t length)
