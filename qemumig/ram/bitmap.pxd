"""Bitmaps for compiled rooms: bit k of word w stands for page 64 w + k.

Shifts drop bits here, and mean to: the debug build does not take that for an overflow.
"""

cimport cython
from libc.stdint cimport uint64_t

cdef extern from *:
    int popcount "__builtin_popcountll"(unsigned long long word) noexcept nogil
    int trailing_zeros "__builtin_ctzll"(unsigned long long word) noexcept nogil
    uint64_t atomic_load "__atomic_load_n"(const uint64_t *word, int order) noexcept nogil
    void atomic_store "__atomic_store_n"(uint64_t *word, uint64_t value, int order) noexcept nogil
    uint64_t atomic_fetch_or "__atomic_fetch_or"(uint64_t *word, uint64_t value, int order) noexcept nogil
    uint64_t atomic_fetch_and "__atomic_fetch_and"(uint64_t *word, uint64_t value, int order) noexcept nogil
    uint64_t atomic_fetch_add "__atomic_fetch_add"(uint64_t *word, uint64_t value, int order) noexcept nogil
    enum: SEQ_CST "__ATOMIC_SEQ_CST"


cdef inline bint test_bit(const uint64_t *words, uint64_t bit) noexcept nogil:
    return (words[bit >> 6] >> (bit & 63)) & 1


@cython.overflowcheck(False)
cdef inline void set_bit(uint64_t *words, uint64_t bit) noexcept nogil:
    words[bit >> 6] |= (<uint64_t> 1) << (bit & 63)


@cython.overflowcheck(False)
cdef inline void clear_bit(uint64_t *words, uint64_t bit) noexcept nogil:
    words[bit >> 6] &= ~((<uint64_t> 1) << (bit & 63))


# The same for words that several threads change at once.

cdef inline bint test_bit_shared(const uint64_t *words, uint64_t bit) noexcept nogil:
    return (atomic_load(words + (bit >> 6), SEQ_CST) >> (bit & 63)) & 1


@cython.overflowcheck(False)
cdef inline bint set_bit_shared(uint64_t *words, uint64_t bit) noexcept nogil:
    """Set one bit; whether it was set before."""
    return (atomic_fetch_or(words + (bit >> 6), (<uint64_t> 1) << (bit & 63), SEQ_CST) >> (bit & 63)) & 1


@cython.overflowcheck(False)
cdef inline bint clear_bit_shared(uint64_t *words, uint64_t bit) noexcept nogil:
    """Clear one bit; whether it was set before."""
    return (atomic_fetch_and(words + (bit >> 6), ~((<uint64_t> 1) << (bit & 63)), SEQ_CST) >> (bit & 63)) & 1


cdef inline uint64_t word_count(uint64_t bits) noexcept nogil:
    return (bits + 63) >> 6


@cython.overflowcheck(False)
cdef inline uint64_t find_next_set(const uint64_t *words, uint64_t bit, uint64_t limit) noexcept nogil:
    """The first set bit at or after *bit*, or *limit* when there is none before it."""
    cdef uint64_t index, word, found
    if bit >= limit:
        return limit
    index = bit >> 6
    word = words[index] & (~(<uint64_t> 0) << (bit & 63))
    while word == 0:
        index += 1
        if index << 6 >= limit:
            return limit
        word = words[index]
    found = (index << 6) + trailing_zeros(word)
    return found if found < limit else limit


cdef inline uint64_t clear_run(const uint64_t *words, uint64_t bit, uint64_t limit) noexcept nogil:
    """How many bits from *bit* on are clear, counted no further than *limit*."""
    return find_next_set(words, bit, limit) - bit


cdef uint64_t count_set(const uint64_t *words, uint64_t bits) noexcept nogil
cdef uint64_t merge_bits(
    uint64_t *target, uint64_t first, const uint64_t *source, uint64_t bits
) noexcept nogil


cdef class Bitmap:
    cdef readonly uint64_t bits      # how many there are
    cdef uint64_t *words             # word_count(bits) of them; bits past the end are always clear
    cdef Py_ssize_t shape[1]         # for the buffer protocol
    cdef Py_ssize_t strides[1]

    cdef int check(self, uint64_t bit) except -1
