"""XBZRLE: what changed in a page since the other side last saw it (xbzrle.md §2).

In    the page as the other side has it, the page as it is now
Out   a delta; or UNCHANGED; or TOO_BIG: then the page goes out whole

    delta  = { equal changed byte×changed }   equal: bytes to keep, changed: bytes to overwrite; each a number of one or
             an equal run at the end is        two bytes, seven bits a byte, the low ones first, bit 7: one more follows
             not written

    marks  a bit for each byte that differs, found 64 bytes at a time:      …00011100…0111111│11100000…
           runs are then runs of bits, one instruction each, whatever        equal  3  equal  6 + 3 (across two words)
           their length; a word without a bit costs one test

The encoder brings its own copy of the page up to date while it looks for differences: a block goes from guest memory
into a register, is compared, and only if it differs written to the copy, whence the delta takes its bytes.  So guest
memory is read once, and what was encoded is what the copy holds, even if the guest writes at the same time.

A page that changes little costs what it costs to read it and its copy.  So which blocks of the copy are zero is kept
beside it, a bit a block, and those are not read: many pages of a guest are not full.

Three twins of each: plain C, AVX2 and AVX-512; the widest that the processor has is chosen when the module is loaded.
They differ in how a block is compared and how a run of middle length is copied, and in nothing else.

Holds  (1) decode(encode(old, new), old) == new; the copy equals what was encoded, also after UNCHANGED and TOO_BIG
       (2) never reads past either page or the delta, never writes past `limit` or the page
       (3) runs are maximal, as QEMU's: the delta is the same byte for byte
       (4) the twins agree on every input, faults included (tests/qemumig/encode/test_xbzrle.py)
       (5) a block of the copy whose bit in `filled` is 0 is zero, before and after
"""

from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memset

from ..errors import StreamError

cdef extern from *:
    """
    #include <immintrin.h>
    #include <stdint.h>
    #include <string.h>

    #define BLOCK XBZRLE_BLOCK                      /* bytes that one word of marks stands for */
    #define MAX_BLOCKS (0x3FFF / BLOCK + 1)
    #define WIDEST "avx512f,avx512bw,bmi,bmi2"

    /* What was loaded from guest memory stays what it is: without this a compiler may load it a second time. */
    #define LOADED_ONCE(value, where) __asm__ volatile("" : "+" where(value))

    static const uint8_t zero_block[BLOCK] __attribute__((aligned(BLOCK)));

    typedef uint64_t MarkBlock(uint8_t *seen, const uint8_t *old, const uint8_t *page);
    typedef void CopyRun(uint8_t *target, const uint8_t *source, size_t length);

    /* ---- blocks: which of 64 bytes of the page differ from `old`?  If any does, `seen` becomes the page's. ---- */

    static inline uint64_t nonzero_bytes(uint64_t word)
    {
        const uint64_t low = 0x7F7F7F7F7F7F7F7F;
        uint64_t tops = (((word & low) + low) | word) & ~low;      /* bit 7 of each byte that is not zero */
        return ((tops >> 7) * 0x0102040810204080) >> 56;           /* the eight bits, moved next to each other */
    }

    static inline uint64_t mark_plain(uint8_t *seen, const uint8_t *old, const uint8_t *page)
    {
        uint64_t now[8], then[8], any = 0, mark = 0;
        memcpy(then, old, BLOCK);
        for (int k = 0; k < 8; k++) {
            memcpy(&now[k], page + 8 * k, 8);
            LOADED_ONCE(now[k], "r");
            any |= now[k] ^ then[k];
        }
        if (!any)
            return 0;
        for (int k = 0; k < 8; k++)
            mark |= nonzero_bytes(now[k] ^ then[k]) << (8 * k);
        memcpy(seen, now, BLOCK);
        return mark;
    }

    __attribute__((target("avx2")))
    static inline uint64_t mark_avx2(uint8_t *seen, const uint8_t *old, const uint8_t *page)
    {
        const __m256i *then = (const __m256i *)old;
        __m256i low = _mm256_loadu_si256((const __m256i *)page);
        __m256i high = _mm256_loadu_si256((const __m256i *)page + 1);
        LOADED_ONCE(low, "x");
        LOADED_ONCE(high, "x");
        uint32_t low_same = _mm256_movemask_epi8(_mm256_cmpeq_epi8(low, _mm256_loadu_si256(then)));
        uint32_t high_same = _mm256_movemask_epi8(_mm256_cmpeq_epi8(high, _mm256_loadu_si256(then + 1)));
        uint64_t mark = ~((uint64_t)high_same << 32 | low_same);
        if (mark) {
            _mm256_storeu_si256((__m256i *)seen, low);
            _mm256_storeu_si256((__m256i *)seen + 1, high);
        }
        return mark;
    }

    __attribute__((target(WIDEST)))
    static inline uint64_t mark_avx512(uint8_t *seen, const uint8_t *old, const uint8_t *page)
    {
        __m512i now = _mm512_loadu_si512(page);
        LOADED_ONCE(now, "v");
        uint64_t mark = _mm512_cmpneq_epi8_mask(now, _mm512_loadu_si512(old));
        if (mark)
            _mm512_storeu_si512(seen, now);
        return mark;
    }

    static uint64_t mark_rest(uint8_t *seen, const uint8_t *page, size_t length)
    {
        uint64_t mark = 0;
        for (size_t i = 0; i < length; i++) {
            uint8_t now = ((const volatile uint8_t *)page)[i];
            mark |= (uint64_t)(now != seen[i]) << i;
            seen[i] = now;
        }
        return mark;
    }

    /* Keep in `filled` whether block number `block`, which lies at `content`, has a byte that is not zero. */
    static inline void note_filled(uint64_t *filled, size_t block, const uint8_t *content)
    {
        uint64_t bit = (uint64_t)1 << block % 64, words[8], any = 0;
        memcpy(words, content, BLOCK);
        for (int k = 0; k < 8; k++)
            any |= words[k];
        filled[block / 64] = any ? filled[block / 64] | bit : filled[block / 64] & ~bit;
    }

    static void keep_page(uint8_t *seen, const uint8_t *page, size_t length, uint64_t *filled)
    {
        memcpy(seen, page, length);
        for (size_t block = 0; block < length / BLOCK; block++)
            note_filled(filled, block, seen + block * BLOCK);
    }

    /* ---- runs: mostly a few bytes, for which a call of memcpy costs more than the copy ---- */

    #define COPY_ENDS(type, target, source, length)      /* two moves that overlap: sizeof(type) to twice that */ \\
        do {                                                                                                      \\
            type first, last;                                                                                     \\
            memcpy(&first, source, sizeof first);                                                                 \\
            memcpy(&last, source + length - sizeof last, sizeof last);                                            \\
            memcpy(target, &first, sizeof first);                                                                 \\
            memcpy(target + length - sizeof last, &last, sizeof last);                                            \\
        } while (0)

    static inline void copy_short(uint8_t *target, const uint8_t *source, size_t length)   /* 1 to 16 bytes */
    {
        if (length >= 8)
            COPY_ENDS(uint64_t, target, source, length);
        else if (length >= 4)
            COPY_ENDS(uint32_t, target, source, length);
        else if (length >= 2)
            COPY_ENDS(uint16_t, target, source, length);
        else
            *target = *source;
    }

    static inline void copy_plain(uint8_t *target, const uint8_t *source, size_t length)
    {
        if (length <= 16)
            copy_short(target, source, length);
        else
            memcpy(target, source, length);
    }

    __attribute__((target("avx2")))
    static inline void copy_avx2(uint8_t *target, const uint8_t *source, size_t length)
    {
        if (length <= 16)
            copy_short(target, source, length);
        else if (length <= 32)
            COPY_ENDS(__m128i, target, source, length);
        else if (length <= 64)
            COPY_ENDS(__m256i, target, source, length);
        else
            memcpy(target, source, length);
    }

    __attribute__((target(WIDEST)))
    static inline void copy_avx512(uint8_t *target, const uint8_t *source, size_t length)
    {
        if (length <= 16) {
            copy_short(target, source, length);
        } else if (length <= 64) {
            __mmask64 bytes = _bzhi_u64(~(uint64_t)0, length);
            _mm512_mask_storeu_epi8(target, bytes, _mm512_maskz_loadu_epi8(bytes, source));
        } else if (length <= 128) {
            COPY_ENDS(__m512i, target, source, length);
        } else {
            memcpy(target, source, length);
        }
    }

    /* ---- the encoder ---- */

    static inline uint8_t *put_number(uint8_t *to, size_t value)
    {
        if (value < 0x80) {
            *to++ = value;
        } else {
            *to++ = 0x80 | (value & 0x7F);
            *to++ = value >> 7;
        }
        return to;
    }

    static inline size_t number_length(size_t value) { return value < 0x80 ? 1 : 2; }

    /* `changed`: the blocks that have a mark, in order.  `marks` ends with a word of 0, so a run that reaches the end of
       the page is found to end there. */
    __attribute__((always_inline))
    static inline int write_runs(const uint64_t *marks, const uint16_t *changed, size_t count, const uint8_t *page,
                                 size_t length, uint8_t *delta, size_t limit, CopyRun *copy)
    {
        uint8_t *to = delta;
        size_t position = 0, next = 0;
        while (next < count) {
            size_t block = changed[next];
            uint64_t word = marks[block];
            do {
                size_t start = block * BLOCK + __builtin_ctzll(word);
                word |= word - 1;                      /* as if the bits below the run were part of it … */
                while (word == ~(uint64_t)0)
                    word = marks[++block];
                size_t end = block * BLOCK + __builtin_ctzll(~word);
                word &= word + 1;                      /* … and all of that is done with */
                size_t equal = start - position, run = end - start;
                if (number_length(equal) + number_length(run) + run > limit - (to - delta))
                    return -1;
                to = put_number(put_number(to, equal), run);
                copy(to, page + start, run);
                to += run;
                position = end;
            } while (word);
            while (++next < count && changed[next] <= block)       /* the last run went through them */
                ;
        }
        /* QEMU wants room for two more numbers as long as bytes are left, even if all of them are equal. */
        int too_big = position < length && limit - (to - delta) < 2;
        return too_big ? -1 : (int)(to - delta);
    }

    __attribute__((always_inline))
    static inline int encode(uint8_t *seen, uint64_t *filled, const uint8_t *page, size_t length,
                             uint8_t *delta, size_t limit, MarkBlock *mark_block, CopyRun *copy)
    {
        uint64_t marks[MAX_BLOCKS + 1];
        uint16_t changed[MAX_BLOCKS];
        size_t count = 0, blocks = length / BLOCK, rest = length % BLOCK;
        const uint8_t *zeroes = zero_block;
        LOADED_ONCE(zeroes, "r");                      /* or the compiler chooses by a branch that cannot be foreseen */
        for (size_t block = 0; block < blocks; block++) {
            uint8_t *target = seen + block * BLOCK;
            uintptr_t whether = -(uintptr_t)(filled[block / 64] >> block % 64 & 1);
            const uint8_t *old = zeroes + ((uintptr_t)(target - zeroes) & whether);
            marks[block] = mark_block(target, old, page + block * BLOCK);
            if (marks[block]) {
                changed[count++] = block;
                note_filled(filled, block, target);
            }
        }
        if (rest) {
            marks[blocks] = mark_rest(seen + blocks * BLOCK, page + blocks * BLOCK, rest);
            if (marks[blocks])
                changed[count++] = blocks;
            blocks++;
        }
        if (!count)
            return 0;
        marks[blocks] = 0;
        return write_runs(marks, changed, count, seen, length, delta, limit, copy);
    }

    static int encode_plain(uint8_t *seen, uint64_t *filled, const uint8_t *page, size_t length,
                            uint8_t *delta, size_t limit)
    {
        return encode(seen, filled, page, length, delta, limit, mark_plain, copy_plain);
    }

    __attribute__((target("avx2")))
    static int encode_avx2(uint8_t *seen, uint64_t *filled, const uint8_t *page, size_t length,
                           uint8_t *delta, size_t limit)
    {
        return encode(seen, filled, page, length, delta, limit, mark_avx2, copy_avx2);
    }

    __attribute__((target(WIDEST)))
    static int encode_avx512(uint8_t *seen, uint64_t *filled, const uint8_t *page, size_t length,
                             uint8_t *delta, size_t limit)
    {
        return encode(seen, filled, page, length, delta, limit, mark_avx512, copy_avx512);
    }

    /* ---- the decoder ---- */

    enum DeltaRule {                                   /* numbered as in xbzrle.md §2 */
        RULE_CUT = 1, RULE_LONG_NUMBER, RULE_EMPTY_SKIP, RULE_SKIP_PAST_END, RULE_EMPTY_RUN, RULE_RUN_PAST_END, RULE_RUN_CUT
    };

    /* The number at *at, which moves past it; a rule when it is none. */
    static inline int get_number(const uint8_t *delta, size_t length, size_t *at, size_t *value)
    {
        const uint8_t *from = delta + *at;
        if (length - *at < 2)                          /* a number is never the last byte */
            return RULE_CUT;
        *value = from[0] & 0x7F;
        if (from[0] & 0x80) {
            if (from[1] & 0x80)
                return RULE_LONG_NUMBER;
            *value |= (size_t)from[1] << 7;
            ++*at;
        }
        ++*at;
        return 0;
    }

    static __attribute__((noinline, cold))
    int refuse(struct DeltaFault *fault, int rule, size_t at, size_t position, size_t count)
    {
        fault->rule = rule;
        fault->at = at;
        fault->position = position;
        fault->count = count;
        return 1;
    }

    __attribute__((always_inline))
    static inline int patch(uint8_t *page, size_t size, const uint8_t *delta, size_t length, struct DeltaFault *fault,
                            CopyRun *copy)
    {
        size_t at = 0, position = 0;
        while (at < length) {
            size_t start = at, equal = 0, changed = 0;
            int rule = get_number(delta, length, &at, &equal);
            if (!rule && !equal && start)
                rule = RULE_EMPTY_SKIP;
            if (!rule && equal > size - position)
                rule = RULE_SKIP_PAST_END;
            if (rule)
                return refuse(fault, rule, start, position, equal);
            position += equal;
            start = at;
            rule = get_number(delta, length, &at, &changed);
            if (!rule && !changed)
                rule = RULE_EMPTY_RUN;
            if (!rule && changed > size - position)
                rule = RULE_RUN_PAST_END;
            if (!rule && changed > length - at)
                rule = RULE_RUN_CUT;
            if (rule)
                return refuse(fault, rule, start, position, changed);
            copy(page + position, delta + at, changed);
            at += changed;
            position += changed;
        }
        return 0;
    }

    static int patch_plain(uint8_t *page, size_t size, const uint8_t *delta, size_t length, struct DeltaFault *fault)
    {
        return patch(page, size, delta, length, fault, copy_plain);
    }

    __attribute__((target("avx2")))
    static int patch_avx2(uint8_t *page, size_t size, const uint8_t *delta, size_t length, struct DeltaFault *fault)
    {
        return patch(page, size, delta, length, fault, copy_avx2);
    }

    __attribute__((target(WIDEST)))
    static int patch_avx512(uint8_t *page, size_t size, const uint8_t *delta, size_t length, struct DeltaFault *fault)
    {
        return patch(page, size, delta, length, fault, copy_avx512);
    }

    static int has_avx2(void) { __builtin_cpu_init(); return __builtin_cpu_supports("avx2"); }

    static int has_widest(void)
    {
        __builtin_cpu_init();
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")
            && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
    }
    """
    enum:
        RULE_CUT
        RULE_LONG_NUMBER
        RULE_EMPTY_SKIP
        RULE_SKIP_PAST_END
        RULE_EMPTY_RUN
        RULE_RUN_PAST_END
    int encode_plain(
        uint8_t *seen, uint64_t *filled, const uint8_t *page, size_t length, uint8_t *delta, size_t limit
    ) noexcept nogil
    int encode_avx2(
        uint8_t *seen, uint64_t *filled, const uint8_t *page, size_t length, uint8_t *delta, size_t limit
    ) noexcept nogil
    int encode_avx512(
        uint8_t *seen, uint64_t *filled, const uint8_t *page, size_t length, uint8_t *delta, size_t limit
    ) noexcept nogil
    int patch_plain(uint8_t *page, size_t size, const uint8_t *delta, size_t length, DeltaFault *fault) noexcept nogil
    int patch_avx2(uint8_t *page, size_t size, const uint8_t *delta, size_t length, DeltaFault *fault) noexcept nogil
    int patch_avx512(uint8_t *page, size_t size, const uint8_t *delta, size_t length, DeltaFault *fault) noexcept nogil
    void keep_page(uint8_t *seen, const uint8_t *page, size_t length, uint64_t *filled) noexcept nogil
    bint has_avx2() noexcept nogil
    bint has_widest() noexcept nogil


cdef dict encoders = {"plain": <size_t> &encode_plain}
cdef dict decoders = {"plain": <size_t> &patch_plain}
if has_avx2():
    encoders["avx2"] = <size_t> &encode_avx2
    decoders["avx2"] = <size_t> &patch_avx2
if has_widest():
    encoders["avx512"] = <size_t> &encode_avx512
    decoders["avx512"] = <size_t> &patch_avx512

IMPLEMENTATIONS = tuple(encoders)
IMPLEMENTATION = IMPLEMENTATIONS[len(IMPLEMENTATIONS) - 1]

cdef DeltaEncoder encode_delta = <DeltaEncoder> <size_t> encoders[IMPLEMENTATION]
cdef DeltaDecoder apply_delta = <DeltaDecoder> <size_t> decoders[IMPLEMENTATION]


cdef void insert_page(uint8_t *seen, uint64_t *filled, const uint8_t *page, size_t length) noexcept nogil:
    keep_page(seen, page, length, filled)


cdef str fault_text(const DeltaFault *fault, size_t size, size_t length):
    """What is wrong with a delta of *length* bytes for a page of *size* bytes: the end of a sentence."""
    place = f"byte {fault.at} of the delta"
    if fault.rule == RULE_CUT:
        return f"{place}, of {length} bytes, should open a number and what it counts, and {length - fault.at} is left"
    if fault.rule == RULE_LONG_NUMBER:
        return f"{place} opens a number of more than two bytes"
    if fault.rule == RULE_EMPTY_SKIP:
        return f"{place} keeps 0 bytes, expected at least 1 after the first pair"
    if fault.rule == RULE_SKIP_PAST_END:
        return f"{place} keeps {fault.count} bytes from {fault.position} on, the page has {size}"
    if fault.rule == RULE_EMPTY_RUN:
        return f"{place} changes 0 bytes, expected at least 1"
    if fault.rule == RULE_RUN_PAST_END:
        return f"{place} changes {fault.count} bytes from {fault.position} on, the page has {size}"
    return f"{place} changes {fault.count} bytes, and fewer follow it in the delta's {length}"


# ---- the door ----

cdef size_t twin(dict twins, implementation) except 0:
    if implementation not in twins:
        raise ValueError(f"no delta codec {implementation!r} on this processor, there is {', '.join(twins)}")
    return twins[implementation]


cdef int check_lengths(size_t seen, size_t page) except -1:
    if not 0 < page <= XBZRLE_MAX_LENGTH or seen != page:
        raise ValueError(f"pages of {seen} and {page} bytes, expected one length from 1 to {XBZRLE_MAX_LENGTH}")
    return 0


def encode(const uint8_t[::1] old not None, const uint8_t[::1] new not None, size_t limit=4096, str implementation=None):
    """The delta that turns *old* into *new*, or None; see xbzrle.pyi."""
    delta = bytearray(limit)
    length = update(bytearray(old), new, delta, implementation)
    return None if length == XBZRLE_TOO_BIG else bytes(delta[:length])


def update(
    uint8_t[::1] seen not None,
    const uint8_t[::1] page not None,
    uint8_t[::1] delta not None,
    str implementation=None,
    uint64_t[::1] filled=None,
):
    """Bring *seen* up to *page*; returns the length of the delta; see xbzrle.pyi."""
    cdef DeltaEncoder encoder = <DeltaEncoder> twin(encoders, implementation or IMPLEMENTATION)
    cdef size_t length = page.shape[0], limit = delta.shape[0]
    cdef uint8_t nothing = 0
    cdef uint8_t *to = &delta[0] if limit else &nothing
    cdef uint64_t[XBZRLE_FILLED_WORDS] all_filled
    cdef uint64_t *bits = &all_filled[0]
    cdef int result
    check_lengths(seen.shape[0], length)
    if filled is not None and filled.shape[0] != XBZRLE_FILLED_WORDS:
        raise ValueError(f"{filled.shape[0]} words of bits, expected {XBZRLE_FILLED_WORDS}")
    memset(all_filled, 0xFF, sizeof(all_filled))
    if filled is not None:
        bits = &filled[0]
    with nogil:
        result = encoder(&seen[0], bits, &page[0], length, to, limit)
    return result


def decode(uint8_t[::1] page not None, const uint8_t[::1] delta not None, str implementation=None):
    """Patch *page* with *delta*; see xbzrle.pyi."""
    cdef DeltaDecoder decoder = <DeltaDecoder> twin(decoders, implementation or IMPLEMENTATION)
    cdef size_t size = page.shape[0], length = delta.shape[0]
    cdef DeltaFault fault
    cdef int refused = 0
    check_lengths(size, size)
    if length:
        with nogil:
            refused = decoder(&page[0], size, &delta[0], length, &fault)
    if refused:
        raise StreamError(fault_text(&fault, size, length), offset=fault.at)
