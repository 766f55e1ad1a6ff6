"""The page cache: what the destination has of the pages that were sent last, and how a page goes out (xbzrle.md §4, §5).

In    a page that is not zero and has to be sent; the generation, which is the number of bitmap syncs so far
Out   a verdict: nothing to send, a delta, or the page

    slot of a page  =  its number & (slots − 1)        one copy a slot, so pages a cache's size apart share one
    number          =  pages of the RAM blocks before it + its place in its block

    the slot holds …                   goes out as              cache                        counted
    ───────────────────────────────────────────────────────────────────────────────────────────────────────────────
    another page, sent less than       PAGE, guest memory       as it was                    miss
      two generations ago
    another page, or nothing           PAGE, the cache's copy   the page; not in the last    miss
                                                                  stage (then guest memory)
    this page, no byte differs         nothing                  used in this generation      hit
    this page, delta ≤ 4096 bytes      a delta                  the page                     hit, bytes of the record − 8
    this page, delta too long          PAGE, the cache's copy   the page                     hit, overflow, 4096 bytes

A page that goes out whole while the cache has it is sent from the cache's copy: guest memory may have changed again,
and the next delta would not fit what the destination has.

Copies lie in one mapping, huge pages if the kernel gives them, that exists as far as it is used; it never exceeds `size`.
Beside each is kept which of its blocks are zero: the encoder need not read those, and a zero page need not be written.

Threads   the thread that sends; anyone may read the counters.  No GIL inside.
Holds     (1) a copy equals what the destination has once everything put on the stream has arrived
          (2) a copy that a stream refers to stays as it is until the next bitmap sync at least: flush before it
          (3) the wire is QEMU's: same hits, same misses, same deltas (tests/qemumig/ram/test_cache.py)
"""

from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from ..encode.xbzrle cimport XBZRLE_TOO_BIG, XBZRLE_UNCHANGED, encode_delta, expect_encoding, insert_page
from ..errors import OptionError
from ..wire.format cimport TARGET_PAGE_SIZE

cdef extern from "<sys/mman.h>" nogil:
    void *mmap(void *address, size_t length, int protection, int flags, int fd, ssize_t offset)
    int munmap(void *address, size_t length)
    int madvise(void *address, size_t length, int advice)
    int PROT_READ, PROT_WRITE, MAP_PRIVATE, MAP_ANONYMOUS, MAP_NORESERVE, MADV_HUGEPAGE
    void *MAP_FAILED

cdef enum:
    HUGE_PAGE = 0x200000
    RECORD_HEAD = 8               # bytes of a record that `sent_bytes` does not count
    STAYS = 2                     # generations for which a page keeps its slot against others

cdef uint64_t MAX_SIZE = <uint64_t> 1 << 62


cdef class PageCache:
    """Copies of pages and the verdict on the next one; see cache.pyi."""

    def __cinit__(self, size):
        self.map_slots(checked_size(size))

    def __dealloc__(self):
        self.unmap_slots()

    cdef int map_slots(self, uint64_t size) except -1:
        cdef uint64_t count = size // TARGET_PAGE_SIZE
        cdef size_t length = size + (HUGE_PAGE if size >= HUGE_PAGE else 0)
        cdef void *mapping
        cdef Slot *slots = <Slot *> calloc(count, sizeof(Slot))
        if slots == NULL:
            raise MemoryError(f"no memory for the {count} slots of a page cache of {size} bytes")
        mapping = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
        if mapping == MAP_FAILED:
            free(slots)
            raise MemoryError(f"no memory for a page cache of {size} bytes")
        self.slots = slots
        self.mapping = mapping
        self.mapping_length = length
        self.pages = <uint8_t *> mapping
        if size >= HUGE_PAGE:
            self.pages = <uint8_t *> ((<uint64_t> mapping + HUGE_PAGE - 1) & ~<uint64_t> (HUGE_PAGE - 1))
            madvise(self.pages, size, MADV_HUGEPAGE)  # refused by kernels without them: small pages do as well
        self.slot_mask = count - 1
        self.size = size
        return 0

    cdef void unmap_slots(self) noexcept:
        free(self.slots)
        if self.mapping != NULL:
            munmap(self.mapping, self.mapping_length)
        self.slots = NULL
        self.mapping = NULL

    # ---- the engine ----

    cdef int settle(
        self, uint64_t page, const uint8_t *content, uint64_t generation, bint last_stage, Verdict *verdict
    ) noexcept nogil:
        """How *page*, whose bytes are at *content*, goes out: a CacheVerdict."""
        cdef uint64_t index = page & self.slot_mask
        cdef Slot *slot = &self.slots[index]
        cdef uint8_t *copy = self.pages + index * TARGET_PAGE_SIZE
        cdef int length
        if slot.holds != page + 1:
            self.misses += 1
            verdict.page = content
            if not last_stage and (slot.holds == 0 or slot.age + STAYS <= generation):
                insert_page(copy, &slot.filled, content, TARGET_PAGE_SIZE)
                slot.holds = page + 1
                slot.age = generation
                verdict.page = copy
            return SEND_PAGE
        self.hits += 1
        slot.age = generation
        self.expect_settle(index + 1 & self.slot_mask)
        length = encode_delta(copy, &slot.filled, content, TARGET_PAGE_SIZE, verdict.delta, TARGET_PAGE_SIZE)
        if length == XBZRLE_UNCHANGED:
            return SEND_NOTHING
        if length == XBZRLE_TOO_BIG:
            self.overflows += 1
            self.sent_bytes += TARGET_PAGE_SIZE
            verdict.page = copy
            return SEND_PAGE
        verdict.length = length
        return SEND_DELTA

    cdef inline void expect_settle(self, uint64_t index) noexcept nogil:
        """The page in slot *index* may be the next: guests write pages that follow each other."""
        expect_encoding(self.pages + index * TARGET_PAGE_SIZE, self.slots[index].filled)

    cdef bint insert_zero(self, uint64_t page, uint64_t generation) noexcept nogil:
        """The page goes out as ZERO: keep that, unless the slot is another page's; True when it is kept."""
        cdef uint64_t index = page & self.slot_mask
        cdef Slot *slot = &self.slots[index]
        if slot.holds != page + 1 and slot.holds != 0 and slot.age + STAYS > generation:
            return False
        if slot.filled:
            memset(self.pages + index * TARGET_PAGE_SIZE, 0, TARGET_PAGE_SIZE)
            slot.filled = 0
        slot.holds = page + 1
        slot.age = generation
        return True

    cdef void count_delta(self, uint64_t record_bytes) noexcept nogil:
        self.sent_bytes += record_bytes - RECORD_HEAD

    # ---- the door ----

    cdef int check_page(self, uint64_t page) except -1:
        if page == <uint64_t> -1:
            raise ValueError(f"page number {page} is the one that marks an empty slot")
        return 0

    @property
    def slot_count(self) -> int:
        """How many pages it has room for."""
        return self.slot_mask + 1

    def held(self, uint64_t page):
        """The copy of *page*, or None; see cache.pyi."""
        cdef uint64_t index = page & self.slot_mask
        self.check_page(page)
        if self.slots[index].holds != page + 1:
            return None
        return (self.pages + index * TARGET_PAGE_SIZE)[:TARGET_PAGE_SIZE]

    def decide(self, uint64_t page, const uint8_t[::1] content not None, uint64_t generation, bint last_stage=False):
        """How the page goes out; see cache.pyi."""
        cdef Verdict verdict
        cdef int word
        self.check_page(page)
        if content.shape[0] != TARGET_PAGE_SIZE:
            raise ValueError(f"a page of {content.shape[0]} bytes, expected {TARGET_PAGE_SIZE}")
        with nogil:
            word = self.settle(page, &content[0], generation, last_stage, &verdict)
        if word == SEND_NOTHING:
            return "nothing", b""
        if word == SEND_DELTA:
            return "delta", verdict.delta[:verdict.length]
        return "page", verdict.page[:TARGET_PAGE_SIZE]

    def decide_zero(self, uint64_t page, uint64_t generation) -> bool:
        """The page goes out as ZERO; see cache.pyi."""
        self.check_page(page)
        return self.insert_zero(page, generation)

    def add_record(self, uint64_t record_bytes):
        """A record of a delta was put on the stream; see cache.pyi."""
        if record_bytes < RECORD_HEAD:
            raise ValueError(f"a record of {record_bytes} bytes, expected at least {RECORD_HEAD}")
        self.count_delta(record_bytes)

    def resize(self, size):
        """Make it *size* bytes; see cache.pyi."""
        cdef PageCache other = PageCache(size)
        cdef Slot *slot
        cdef Slot *target
        cdef uint64_t index, place
        with nogil:
            for index in range(self.slot_mask + 1):
                slot = &self.slots[index]
                if slot.holds == 0:
                    continue
                place = (slot.holds - 1) & other.slot_mask
                target = &other.slots[place]
                if target.holds and target.age >= slot.age:
                    continue
                target[0] = slot[0]
                memcpy(other.pages + place * TARGET_PAGE_SIZE, self.pages + index * TARGET_PAGE_SIZE, TARGET_PAGE_SIZE)
        self.slots, other.slots = other.slots, self.slots
        self.pages, other.pages = other.pages, self.pages
        self.mapping, other.mapping = other.mapping, self.mapping
        self.mapping_length, other.mapping_length = other.mapping_length, self.mapping_length
        self.slot_mask, other.slot_mask = other.slot_mask, self.slot_mask
        self.size, other.size = other.size, self.size

    def end_period(self, uint64_t handled):
        """A period is over: settle the rates; see cache.pyi."""
        cdef uint64_t pages = handled - self.last_handled
        cdef uint64_t encoded = self.hits - self.last_hits
        cdef uint64_t sent = self.sent_bytes - self.last_bytes
        if pages == 0:
            return
        self.miss_rate = (self.misses - self.last_misses) / <double> pages
        self.encoding_rate = encoded * TARGET_PAGE_SIZE / <double> sent if encoded and sent else 0.0
        self.last_handled = handled
        self.last_hits = self.hits
        self.last_misses = self.misses
        self.last_bytes = self.sent_bytes


cdef uint64_t checked_size(size) except 0:
    """*size* as a number of bytes that a cache can have (xbzrle.md §4)."""
    if not TARGET_PAGE_SIZE <= size <= MAX_SIZE or size & (size - 1):
        raise OptionError(
            f"xbzrle-cache-size {size}: expected a power of two no less than the target page size, {TARGET_PAGE_SIZE}",
            name="xbzrle-cache-size",
            value=size,
        )
    return size
