"""The zero test for compiled rooms."""

# True when the *length* bytes at *page* are all zero; length is a positive multiple of 256.
ctypedef bint (*ZeroTest)(const unsigned char *page, size_t length) noexcept nogil

cdef ZeroTest is_zero

cdef enum:
    LOOK_AHEAD = 12               # pages: the time that memory needs to answer

cdef extern from *:
    """
    static inline void expect_look(const void *page)
    {
        __builtin_prefetch(page, 0, 1);
    }
    """
    # Let memory bring what the test looks at first: who goes through pages that are in no cache waits for each otherwise.
    void expect_look(const void *page) noexcept nogil
