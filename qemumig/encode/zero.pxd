"""The zero test for compiled rooms."""

# True when the *length* bytes at *page* are all zero; length is a positive multiple of 256.
ctypedef bint (*ZeroTest)(const unsigned char *page, size_t length) noexcept nogil

cdef ZeroTest is_zero
