"""Bitmaps of pages: words of 64 bits, worked on a word at a time without the GIL.

    bit k of word w  =  page 64 w + k

Holds  (1) bits past the last page are clear in every Bitmap, so that counting needs no mask
       (2) merge_bits only ever sets bits, and returns how many of them were clear before
"""

cimport cython
from cpython.buffer cimport PyBUF_FORMAT, PyBUF_ND, PyBUF_STRIDES
from libc.stdint cimport uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset


cdef char *WORD_FORMAT = "Q"


@cython.overflowcheck(False)
cdef uint64_t count_set(const uint64_t *words, uint64_t bits) noexcept nogil:
    cdef uint64_t index, total = 0
    for index in range(bits >> 6):
        total += popcount(words[index])
    if bits & 63:
        total += popcount(words[bits >> 6] & (((<uint64_t> 1) << (bits & 63)) - 1))
    return total


cdef inline uint64_t or_word(uint64_t *word, uint64_t value) noexcept nogil:
    cdef uint64_t added = value & ~word[0]
    if added == 0:
        return 0
    word[0] |= added
    return popcount(added)


@cython.overflowcheck(False)
cdef uint64_t merge_bits(
    uint64_t *target, uint64_t first, const uint64_t *source, uint64_t bits
) noexcept nogil:
    """OR *bits* bits of *source* into *target* from bit *first* on; returns how many are newly set."""
    cdef uint64_t index, word, added = 0
    cdef uint64_t shift = first & 63
    cdef uint64_t *out = target + (first >> 6)
    for index in range(word_count(bits)):
        word = source[index]
        if index == bits >> 6:
            word &= ((<uint64_t> 1) << (bits & 63)) - 1
        if word == 0:
            continue
        added += or_word(out + index, word << shift)
        if shift and word >> (64 - shift):
            added += or_word(out + index + 1, word >> (64 - shift))
    return added


cdef class Bitmap:
    """*bits* bits, all clear at first; a writable buffer of uint64 (format "Q")."""

    def __cinit__(self, uint64_t bits):
        self.bits = bits
        self.words = <uint64_t *> calloc(max(word_count(bits), 1), 8)
        if self.words == NULL:
            raise MemoryError(f"no memory for a bitmap of {bits} bits")

    def __dealloc__(self):
        free(self.words)

    def __len__(self):
        return self.bits

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        self.shape[0] = word_count(self.bits)
        self.strides[0] = 8
        buffer.buf = self.words
        buffer.obj = self
        buffer.len = self.shape[0] * 8
        buffer.readonly = 0
        buffer.itemsize = 8
        buffer.format = WORD_FORMAT if flags & PyBUF_FORMAT else NULL
        buffer.ndim = 1
        buffer.shape = self.shape if flags & PyBUF_ND else NULL
        buffer.strides = self.strides if flags & PyBUF_STRIDES == PyBUF_STRIDES else NULL
        buffer.suboffsets = NULL
        buffer.internal = NULL

    cdef int check(self, uint64_t bit) except -1:
        if bit >= self.bits:
            raise IndexError(f"bit {bit} of a bitmap of {self.bits} bits")
        return 0

    def set_all(self):
        """Set every bit."""
        cdef uint64_t full = self.bits >> 6
        memset(self.words, 0xFF, full * 8)
        if self.bits & 63:
            self.words[full] = ((<uint64_t> 1) << (self.bits & 63)) - 1

    def clear_all(self):
        """Clear every bit."""
        memset(self.words, 0, word_count(self.bits) * 8)

    def set(self, uint64_t bit):
        """Set one bit."""
        self.check(bit)
        set_bit(self.words, bit)

    def clear(self, uint64_t bit):
        """Clear one bit."""
        self.check(bit)
        clear_bit(self.words, bit)

    def clear_range(self, uint64_t first, uint64_t count):
        """Clear *count* bits from *first* on."""
        cdef uint64_t bit, end = first + count
        if first > self.bits or count > self.bits - first:
            raise IndexError(f"bits {first} to {end} of a bitmap of {self.bits} bits")
        with nogil:
            bit = first
            while bit < end:
                if bit & 63 == 0 and end - bit >= 64:
                    self.words[bit >> 6] = 0
                    bit += 64
                else:
                    clear_bit(self.words, bit)
                    bit += 1

    def test(self, uint64_t bit) -> bool:
        """True when the bit is set."""
        self.check(bit)
        return test_bit(self.words, bit)

    def count(self) -> int:
        """How many bits are set."""
        cdef uint64_t total
        with nogil:
            total = count_set(self.words, self.bits)
        return total

    def next_set(self, uint64_t bit=0) -> int:
        """The first set bit at or after *bit*; len(self) when there is none."""
        return find_next_set(self.words, bit, self.bits)


def merge(
    uint64_t[::1] target not None, uint64_t first, const uint64_t[::1] source not None, uint64_t bits
) -> int:
    """OR bits 0 … *bits* − 1 of *source* into *target* from bit *first* on; returns how many are newly set.

    Both are buffers of uint64 (format "Q").  Raises ValueError when either is too short.
    """
    cdef uint64_t added = 0
    cdef uint64_t capacity = <uint64_t> target.shape[0] * 64
    if bits > <uint64_t> source.shape[0] * 64:
        raise ValueError(f"{bits} bits asked for, the source has {source.shape[0] * 64}")
    if first > capacity or bits > capacity - first:
        raise ValueError(f"{bits} bits from {first} on do not fit a target of {capacity}")
    if bits:
        with nogil:
            added = merge_bits(&target[0], first, &source[0], bits)
    return added
