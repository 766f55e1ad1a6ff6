"""Is this page all zeroes?

In    a page, or any buffer that is a positive multiple of 256 bytes long
Out   yes or no

Three twins of one function: plain C, AVX2 and AVX-512; the widest that the processor has is chosen when the module
is loaded.  Each looks at a few words spread over the page first: a page that is not zero mostly shows it there, and
the test then costs one cache line or two instead of sixty-four.

Holds  (1) the twins agree on every input (tests/qemumig/encode/test_zero.py)
       (2) none reads past the buffer, none writes
"""

cdef extern from *:
    """
    #include <immintrin.h>
    #include <stddef.h>
    #include <stdint.h>
    #include <string.h>

    static inline uint64_t word_at(const unsigned char *page, size_t offset)
    {
        uint64_t word;
        memcpy(&word, page + offset, sizeof word);
        return word;
    }

    static inline int spread_is_zero(const unsigned char *page, size_t length)
    {
        return word_at(page, 0) == 0 && (word_at(page, length - 8) | word_at(page, length / 2)) == 0;
    }

    static int zero_plain(const unsigned char *page, size_t length)
    {
        if (!spread_is_zero(page, length))
            return 0;
        for (size_t i = 0; i < length; i += 64) {
            uint64_t any = 0;
            for (size_t k = 0; k < 64; k += 8)
                any |= word_at(page, i + k);
            if (any)
                return 0;
        }
        return 1;
    }

    __attribute__((target("avx2")))
    static int zero_avx2(const unsigned char *page, size_t length)
    {
        if (!spread_is_zero(page, length))
            return 0;
        for (size_t i = 0; i < length; i += 256) {
            const __m256i *v = (const __m256i *)(page + i);
            __m256i a = _mm256_or_si256(_mm256_loadu_si256(v), _mm256_loadu_si256(v + 1));
            __m256i b = _mm256_or_si256(_mm256_loadu_si256(v + 2), _mm256_loadu_si256(v + 3));
            __m256i c = _mm256_or_si256(_mm256_loadu_si256(v + 4), _mm256_loadu_si256(v + 5));
            __m256i d = _mm256_or_si256(_mm256_loadu_si256(v + 6), _mm256_loadu_si256(v + 7));
            a = _mm256_or_si256(_mm256_or_si256(a, b), _mm256_or_si256(c, d));
            if (!_mm256_testz_si256(a, a))
                return 0;
        }
        return 1;
    }

    __attribute__((target("avx512f")))
    static int zero_avx512(const unsigned char *page, size_t length)
    {
        if (!spread_is_zero(page, length))
            return 0;
        for (size_t i = 0; i < length; i += 256) {
            __m512i a = _mm512_or_si512(_mm512_loadu_si512(page + i), _mm512_loadu_si512(page + i + 64));
            __m512i b = _mm512_or_si512(_mm512_loadu_si512(page + i + 128), _mm512_loadu_si512(page + i + 192));
            if (_mm512_test_epi64_mask(_mm512_or_si512(a, b), _mm512_or_si512(a, b)))
                return 0;
        }
        return 1;
    }

    static int has_avx2(void) { __builtin_cpu_init(); return __builtin_cpu_supports("avx2"); }
    static int has_avx512(void) { __builtin_cpu_init(); return __builtin_cpu_supports("avx512f"); }
    """
    bint zero_plain(const unsigned char *page, size_t length) noexcept nogil
    bint zero_avx2(const unsigned char *page, size_t length) noexcept nogil
    bint zero_avx512(const unsigned char *page, size_t length) noexcept nogil
    bint has_avx2() noexcept nogil
    bint has_avx512() noexcept nogil


cdef dict found = {"plain": <size_t> &zero_plain}
if has_avx2():
    found["avx2"] = <size_t> &zero_avx2
if has_avx512():
    found["avx512"] = <size_t> &zero_avx512

IMPLEMENTATIONS = tuple(found)
IMPLEMENTATION = IMPLEMENTATIONS[len(IMPLEMENTATIONS) - 1]

cdef ZeroTest is_zero = <ZeroTest> <size_t> found[IMPLEMENTATION]


def buffer_is_zero(const unsigned char[::1] page not None, str implementation=None) -> bool:
    """True when *page* holds only zeroes; see zero.pyi."""
    cdef size_t length = page.shape[0]
    cdef ZeroTest test = is_zero
    cdef bint result
    if length == 0 or length % 256:
        raise ValueError(f"page length {length} is not a positive multiple of 256")
    if implementation is not None:
        if implementation not in found:
            raise ValueError(f"no zero test {implementation!r} on this processor, there is {', '.join(found)}")
        test = <ZeroTest> <size_t> found[implementation]
    with nogil:
        result = test(&page[0], length)
    return result
