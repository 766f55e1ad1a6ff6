"""Pages placed whole and once, while the guest runs (postcopy.md §5).

    MissingMemory   all of guest RAM after LISTEN: what has arrived, what was asked for; registered with userfaultfd
    PageReceiver    the records of one channel ─▶ host pages ─▶ UFFDIO_COPY, or UFFDIO_ZEROPAGE

Where a host page is one target page, PAGE records are placed out of the stream's buffer: neighbours that are there
already are pushed together in it and placed at once, which saves half of what the kernel takes for one by one.

    [head][PAGE 0x3000][head][PAGE 0x4000][head][PAGE 0x5000] ─▶ [ 0x3000 0x4000 0x5000 ] ─▶ placed

A run ends with a page that somebody waits for, and before anything is read: no page waits for bytes to come.  A larger
host page is gathered in a page of the receiver's own: its target pages come one behind the other on that channel, in any
order, each once.

    PAGE 0x0000 … PAGE 0x1000 … ZERO 0x2000 … ─▶ [ 2 MiB ] ─▶ placed when the last of them is there

A source with urgent pages of the old layout names a block anew after each change of the channel, but QEMU 7.2 forgets it
where a section ends behind an urgent page: what follows in the next section says CONTINUE and means the urgent page's block.
What is missing tells which block it can be (`mend_block`); a page that could be either's is refused.

Threads   one thread at a time per receiver; several receivers, and the fault thread, share a MissingMemory.
Holds     (1) no byte of a peer is used as an offset, a length or a name before it was checked
          (2) a page is marked received after it was placed, never before
          (3) a record for a page that was received already changes nothing
"""

from libc.errno cimport EEXIST
from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memmove, memset
from posix.unistd cimport usleep

from ..wire.format cimport (
    RAM_SAVE_FLAG_CONTINUE,
    RAM_SAVE_FLAG_EOS,
    RAM_SAVE_FLAG_PAGE,
    RAM_SAVE_FLAG_ZERO,
    TARGET_PAGE_SIZE,
)
from ..wire.stream cimport STREAM_END, STREAM_OK, InputStream, get_be64
from ..ram.bitmap cimport (
    SEQ_CST,
    Bitmap,
    atomic_fetch_add,
    clear_bit_shared,
    set_bit_shared,
    test_bit_shared,
)
from ..ram.block cimport RAMBlock
from ..ram.landing cimport Landing
from .blocktime cimport FaultTimes
from .uffd cimport Userfaultfd

import os

from ..errors import MachineError, StreamError

cdef enum ReceiveStatus:
    RECEIVE_EOS = 0               # the section's body is over
    RECEIVE_PAUSE = 1             # many records done, more to come
    RECEIVE_STREAM = 2            # the stream ended or failed
    RECEIVE_NO_BLOCK = 3          # CONTINUE before any name
    RECEIVE_BAD_NAME = 4          # no such block, or one that the source does not send
    RECEIVE_BAD_OFFSET = 5        # past the block's end
    RECEIVE_BAD_FILL = 6          # a fill byte that is not zero
    RECEIVE_BAD_FLAGS = 7         # a record that has no place here
    RECEIVE_TWO_PAGES = 8         # a record for another host page, while one is half here
    RECEIVE_NOT_PLACED = 9        # the kernel refused
    RECEIVE_TWO_BLOCKS = 10       # CONTINUE, which may mean the block of the last urgent page as well

cdef enum:
    RECORDS_AT_A_TIME = 32768
    RUN_LIMIT = 16                # neighbours placed at once: more gain little, and who touched the first waits for the last
    HEAD = 8
    URGENT_WAIT_US = 500
    URGENT_WAITS = 200            # 0.1 s in all: what was asked for comes by the other channel, which is not held up here


cdef class MissingMemory:
    """Guest RAM of which pages are missing; see place.pyi."""

    def __cinit__(self, Landing landing not None, Userfaultfd uffd not None, FaultTimes times not None):
        cdef RAMBlock block
        cdef Bitmap bitmap
        cdef int index
        self.uffd = uffd
        self.times = times
        self.landing = landing
        self.blocks = landing.blocks
        self.received = landing.received
        self.requested = []
        self.block_count = landing.block_count
        self.table = <MissingBlock *> calloc(max(self.block_count, 1), sizeof(MissingBlock))
        if self.table == NULL:
            raise MemoryError("no memory for the list of RAM blocks")
        for index in range(self.block_count):
            block = self.blocks[index]
            bitmap = self.received[index]
            self.table[index].host = <uint8_t *> block.host_address
            self.table[index].pages = block.used_length // TARGET_PAGE_SIZE
            self.table[index].host_page = block.page_size
            self.table[index].received = bitmap.words
            bitmap = Bitmap(bitmap.bits)
            self.requested.append(bitmap)
            self.table[index].requested = bitmap.words
            self.table[index].comes = index in landing.listed
            self.table[index].name = landing.table[index].name
            self.table[index].name_length = landing.table[index].name_length
            self.largest = max(self.largest, block.page_size)
        self.zeroes = <uint8_t *> calloc(1, self.largest or 1)
        if self.zeroes == NULL:
            raise MemoryError(f"no memory for a zero page of {self.largest} bytes")

    def __dealloc__(self):
        free(self.table)
        free(self.zeroes)

    # ---- the engine ----

    cdef int find_address(self, uint64_t address) noexcept nogil:
        """The block that *address* lies in, −1 for none."""
        cdef int index
        cdef uint64_t host
        for index in range(self.block_count):
            host = <uint64_t> self.table[index].host
            if host <= address < host + self.table[index].pages * TARGET_PAGE_SIZE:
                return index
        return -1

    cdef int place(self, int index, uint64_t page, uint64_t count, const void *data) noexcept nogil:
        """Place *count* host pages that begin with target page *page*; *data* NULL: zeroes.  0 or an errno.

        One that somebody else has placed meanwhile stays as it is, and those behind it are placed all the same.  What the
        kernel does not take at once, as where its own division of the memory lies between two pages, it gets one by one.
        """
        cdef MissingBlock *block = &self.table[index]
        cdef uint64_t offset = page * TARGET_PAGE_SIZE, length = count * block.host_page, step = length, done = 0, part
        cdef const uint8_t *rest = <const uint8_t *> data
        cdef int status = 0
        while done < length and status == 0:
            status = self.put(block, offset + done, min(step, length - done), rest, &part)
            if status == EEXIST:
                status = self.uffd.wake(block.host + offset + done + part, block.host_page)
                part += 0 if status else block.host_page
            elif status and step > block.host_page:
                step = block.host_page
                status = 0
            done += part
            if data != NULL:
                rest += part
        atomic_fetch_add(&self.placings, 1, SEQ_CST)
        self.note_placed(block, page, page + done // TARGET_PAGE_SIZE)
        if status:
            self.error = status
            self.failed_block = index
            self.failed_page = page + done // TARGET_PAGE_SIZE
        return status

    cdef int put(self, MissingBlock *block, uint64_t offset, uint64_t length, const void *data, uint64_t *done) noexcept nogil:
        """Have the kernel place whole host pages, as many as it can; *done* bytes of them are."""
        if data != NULL:
            return self.uffd.copy(block.host + offset, data, length, done)
        if block.takes_zero:
            return self.uffd.zero(block.host + offset, length, done)
        return self.uffd.copy(block.host + offset, self.zeroes, block.host_page, done)

    cdef void note_placed(self, MissingBlock *block, uint64_t page, uint64_t end) noexcept nogil:
        """The target pages from *page* to *end* are here, and whoever waited for them goes on."""
        cdef uint64_t count = block.host_page // TARGET_PAGE_SIZE, number
        if page == end:
            return
        for number in range(page, end):
            set_bit_shared(block.received, number)
            if test_bit_shared(block.requested, number):
                clear_bit_shared(block.requested, number)
        atomic_fetch_add(&self.placed, (end - page) // count, SEQ_CST)
        self.times.end(<uint64_t> block.host + page * TARGET_PAGE_SIZE, (end - page) * TARGET_PAGE_SIZE)

    cdef bint is_missing(self, int index, uint64_t page) noexcept nogil:
        return page < self.table[index].pages and not test_bit_shared(self.table[index].received, page)

    cdef uint64_t next_missing(self, int index, uint64_t page) noexcept nogil:
        """The first page from *page* on that is not here, or the end of the block."""
        while page < self.table[index].pages and test_bit_shared(self.table[index].received, page):
            page += 1
        return page

    cdef bint waits_beside(self, int index) noexcept nogil:
        """Something was asked for in another block than *index*, and is not here."""
        cdef int other
        cdef uint64_t word
        for other in range(self.block_count):
            if other != index:
                for word in range((self.table[other].pages + 63) // 64):
                    if self.table[other].requested[word] & ~self.table[other].received[word]:
                        return True
        return False

    # ---- the door ----

    def register(self) -> None:
        """Have the kernel tell of missing pages in every block that the source sends; MachineError when it cannot."""
        cdef RAMBlock block
        cdef int index
        for index in range(self.block_count):
            if self.table[index].comes:
                block = self.blocks[index]
                self.table[index].takes_zero = self.uffd.register_missing(
                    block.host_address, block.used_length, block.idstr
                )

    def unregister(self) -> None:
        """All of it is ordinary memory again."""
        cdef RAMBlock block
        cdef int index
        for index in range(self.block_count):
            if self.table[index].comes:
                block = self.blocks[index]
                self.uffd.unregister(block.host_address, block.used_length)

    @property
    def placed_pages(self) -> int:
        """Host pages placed so far."""
        return self.placed

    @property
    def times_placed(self) -> int:
        """How often pages were placed; neighbours that were placed at once count as one."""
        return self.placings

    def missing_pages(self) -> int:
        """Target pages that the source has still to send."""
        cdef Bitmap bitmap
        total = 0
        for index, bitmap in enumerate(self.received):
            if self.table[<int> index].comes:
                total += self.table[<int> index].pages - bitmap.count()
        return total

    def outstanding_pages(self) -> int:
        """Host pages that were asked for and are not here."""
        cdef Bitmap requested, received
        cdef uint64_t page
        total = 0
        for requested, received in zip(self.requested, self.received):
            page = requested.next_set(0)
            while page < requested.bits:
                total += not received.test(page)
                page = requested.next_set(page + 1)
        return total


cdef class PageReceiver:
    """Places the pages of one channel; see place.pyi."""

    cdef readonly InputStream stream
    cdef readonly MissingMemory memory
    cdef bint urgent                  # this is the channel of urgent pages
    cdef bint forgets                 # the source may leave out a block's name behind an urgent page
    cdef int last_block               # of the previous record on this channel; −1: none yet
    cdef uint64_t last_page           # … and its page
    cdef int meant                    # the block whose name may have been forgotten, where it is not sure
    cdef uint64_t head                # of the record at hand …
    cdef uint64_t head_offset         # … and where in the stream it stood
    cdef uint8_t name[256]            # of the block it names
    cdef size_t name_length
    cdef uint8_t fill
    cdef uint8_t *gathered            # a host page larger than a target page, on its way
    cdef uint64_t *arrived            # one bit a target page of it
    cdef int gathered_block
    cdef uint64_t gathered_page       # its first target page
    cdef uint64_t gathered_count      # target pages of it that are here; 0: there is none on its way
    cdef bint gathered_zero           # all of them zero so far
    cdef int run_block                # neighbours that were read and not placed yet
    cdef uint64_t run_page            # the first of them
    cdef uint64_t run_count           # 0: there are none
    cdef uint8_t *run_data            # in the stream's buffer, before its position; NULL: zeroes
    cdef int stream_status
    cdef bint between_records         # nothing of the next one was read
    cdef readonly uint64_t zero_pages
    cdef readonly uint64_t normal_pages

    def __cinit__(self, InputStream stream not None, MissingMemory memory not None, *, bint forgets=False):
        cdef uint64_t bits = memory.largest // TARGET_PAGE_SIZE
        self.stream = stream
        self.forgets = forgets
        self.memory = memory
        self.last_block = -1
        if memory.largest > TARGET_PAGE_SIZE:
            self.gathered = <uint8_t *> calloc(1, memory.largest)
            self.arrived = <uint64_t *> calloc((bits + 63) // 64, 8)
            if self.gathered == NULL or self.arrived == NULL:
                raise MemoryError(f"no memory for a host page of {memory.largest} bytes")

    def __dealloc__(self):
        free(self.gathered)
        free(self.arrived)

    # ---- the engine ----

    cdef int take_block(self) noexcept nogil:
        """Settle which block the record at hand means; its head has been consumed."""
        cdef int block, status
        if self.head & RAM_SAVE_FLAG_CONTINUE:
            return RECEIVE_EOS if self.last_block >= 0 else RECEIVE_NO_BLOCK
        status = self.need(1)
        if status != RECEIVE_EOS:
            return status
        self.name_length = self.stream.buffer[self.stream.position]
        status = self.need(1 + self.name_length)
        if status != RECEIVE_EOS:
            return status
        memcpy(self.name, self.stream.buffer + self.stream.position + 1, self.name_length)
        self.stream.position += 1 + self.name_length
        block = self.memory.landing.find_block(self.name, self.name_length)
        if block < 0 or not self.memory.table[block].comes:
            return RECEIVE_BAD_NAME
        self.last_block = block
        return RECEIVE_EOS

    cdef int mend_block(self) noexcept nogil:
        """Settle which block CONTINUE means at the head of a section, from a source that forgets to name it."""
        cdef uint64_t page
        cdef int block, found = -1, waits = URGENT_WAITS, status = self.need(HEAD)
        if status != RECEIVE_EOS or self.last_block < 0:
            return status
        self.head_offset = self.stream.base + self.stream.position
        self.head = get_be64(self.stream.buffer + self.stream.position)
        if not self.head & RAM_SAVE_FLAG_CONTINUE:
            return RECEIVE_EOS
        while self.memory.waits_beside(self.last_block) and waits:
            waits -= 1
            usleep(URGENT_WAIT_US)
        page = self.head // TARGET_PAGE_SIZE
        for block in range(self.memory.block_count):
            if block != self.last_block and self.may_mean(block, page):
                self.meant = block
                if found >= 0 or self.memory.next_missing(self.last_block, self.last_page + 1) == page:
                    return RECEIVE_TWO_BLOCKS
                found = block
        if found >= 0:
            self.last_block = found
        return RECEIVE_EOS

    cdef bint may_mean(self, int block, uint64_t page) noexcept nogil:
        """An urgent page of *block* may have made the source forget to name it for *page*."""
        cdef uint64_t end = self.memory.table[block].urgent_end
        if end == 0 or not self.memory.is_missing(block, page):
            return False
        return not self.memory.is_missing(self.last_block, page) or self.memory.next_missing(block, end) == page

    cdef int take_page(self, uint64_t page, uint8_t *data) noexcept nogil:
        """One target page of `last_block`; *data* NULL: zeroes."""
        cdef MissingBlock *block = &self.memory.table[self.last_block]
        cdef int status
        if block.host_page > TARGET_PAGE_SIZE:
            return self.gather(block, page, data)
        if not self.continues_run(page, data):
            status = self.place_run()
            if status != RECEIVE_EOS:
                return status
        if test_bit_shared(block.received, page):
            return RECEIVE_EOS
        if self.run_count == 0:
            self.run_block = self.last_block
            self.run_page = page
            self.run_data = data
        elif data != NULL:  # the head of a record lies between the pages: close the gap
            memmove(self.run_data + self.run_count * TARGET_PAGE_SIZE, data, TARGET_PAGE_SIZE)
        self.run_count += 1
        return self.place_run() if test_bit_shared(block.requested, page) else RECEIVE_EOS

    cdef bint continues_run(self, uint64_t page, const uint8_t *data) noexcept nogil:
        return (
            0 < self.run_count < RUN_LIMIT
            and self.run_block == self.last_block
            and self.run_page + self.run_count == page
            and (self.run_data == NULL) == (data == NULL)
        )

    cdef int place_run(self) noexcept nogil:
        """Place the pages that were read and are not placed yet."""
        cdef uint64_t count = self.run_count
        self.run_count = 0
        if count == 0:
            return RECEIVE_EOS
        return RECEIVE_NOT_PLACED if self.memory.place(self.run_block, self.run_page, count, self.run_data) else RECEIVE_EOS

    cdef int need(self, size_t length) noexcept nogil:
        """Have *length* bytes of the stream at hand.  Nothing waits to be placed while the stream is waited for."""
        cdef int status
        if self.stream.end - self.stream.position >= length:
            return RECEIVE_EOS
        status = self.place_run()
        if status != RECEIVE_EOS:
            return status
        self.stream_status = self.stream.ensure(length)
        return RECEIVE_EOS if self.stream_status == STREAM_OK else RECEIVE_STREAM

    cdef int gather(self, MissingBlock *block, uint64_t page, const uint8_t *data) noexcept nogil:
        """A piece of a larger host page; it is placed with the last of them."""
        cdef uint64_t count = block.host_page // TARGET_PAGE_SIZE
        cdef uint64_t first = page - page % count
        cdef uint8_t *target = self.gathered + (page - first) * TARGET_PAGE_SIZE
        if self.gathered_count == 0:
            self.gathered_block = self.last_block
            self.gathered_page = first
            self.gathered_zero = True
            memset(self.arrived, 0, (count + 63) // 64 * 8)
        elif self.gathered_block != self.last_block or self.gathered_page != first:
            return RECEIVE_TWO_PAGES
        if set_bit_shared(self.arrived, page - first):
            return RECEIVE_EOS
        if data == NULL:
            memset(target, 0, TARGET_PAGE_SIZE)
        else:
            memcpy(target, data, TARGET_PAGE_SIZE)
            self.gathered_zero = False
        self.gathered_count += 1
        if self.gathered_count < count:
            return RECEIVE_EOS
        self.gathered_count = 0
        if test_bit_shared(block.received, first):
            return RECEIVE_EOS
        data = NULL if self.gathered_zero else self.gathered
        return RECEIVE_NOT_PLACED if self.memory.place(self.gathered_block, first, 1, data) else RECEIVE_EOS

    cdef int receive_record(self) noexcept nogil:
        """The record whose head was read."""
        cdef uint64_t flags = self.head & (TARGET_PAGE_SIZE - 1) & ~(<uint64_t> RAM_SAVE_FLAG_CONTINUE)
        cdef uint64_t page = self.head // TARGET_PAGE_SIZE
        cdef size_t length = TARGET_PAGE_SIZE if flags == RAM_SAVE_FLAG_PAGE else 1
        cdef int status
        if flags != RAM_SAVE_FLAG_PAGE and flags != RAM_SAVE_FLAG_ZERO:
            return RECEIVE_BAD_FLAGS
        status = self.take_block()
        if status != RECEIVE_EOS:
            return status
        if page >= self.memory.table[self.last_block].pages:
            return RECEIVE_BAD_OFFSET
        status = self.need(length)
        if status != RECEIVE_EOS:
            return status
        if self.urgent:  # noted before it is placed, which ends the wait for it
            self.memory.table[self.last_block].urgent_end = page + 1
        if flags == RAM_SAVE_FLAG_PAGE:
            self.normal_pages += 1
            status = self.take_page(page, self.stream.buffer + self.stream.position)
        else:
            self.zero_pages += 1
            self.fill = self.stream.buffer[self.stream.position]
            status = RECEIVE_BAD_FILL if self.fill else self.take_page(page, NULL)
        self.stream.position += length
        self.last_page = page
        return status

    cdef int receive_some(self, int limit) noexcept nogil:
        """Up to *limit* records; every page of them that is whole is placed, whatever comes after it."""
        cdef int status = self.receive_records(limit)
        cdef int placed = self.place_run()
        return placed if placed != RECEIVE_EOS else status

    cdef int receive_records(self, int limit) noexcept nogil:
        cdef int status
        while limit > 0:
            limit -= 1
            self.between_records = True
            status = self.need(HEAD)
            if status != RECEIVE_EOS:
                return status
            self.head_offset = self.stream.base + self.stream.position
            self.head = get_be64(self.stream.buffer + self.stream.position)
            self.stream.position += HEAD
            self.between_records = False
            if self.head == RAM_SAVE_FLAG_EOS:
                return RECEIVE_EOS
            status = self.receive_record()
            if status != RECEIVE_EOS:
                return status
        return RECEIVE_PAUSE

    # ---- the door ----

    def load_body(self, look_round=None):
        """Place records up to the end of the section's body; see place.pyi."""
        cdef int status = RECEIVE_EOS
        if self.forgets:
            with nogil:
                status = self.mend_block()
        while True:
            if status == RECEIVE_EOS or status == RECEIVE_PAUSE:
                with nogil:
                    status = self.receive_some(RECORDS_AT_A_TIME)
            if status == RECEIVE_EOS:
                return
            if status == RECEIVE_PAUSE:
                if look_round is not None:
                    look_round()
            elif status == RECEIVE_STREAM:
                self.stream.raise_on(self.stream_status, "a record of section 'ram'")
            else:
                raise self.refusal(status)

    def load_channel(self) -> bool:
        """Place records until the channel ends; see place.pyi."""
        cdef int status = RECEIVE_PAUSE
        self.urgent = True
        while status == RECEIVE_PAUSE:
            with nogil:
                status = self.receive_some(RECORDS_AT_A_TIME)
        if status == RECEIVE_EOS:
            return True
        if status == RECEIVE_STREAM:
            if self.stream_status == STREAM_END and self.between_records and self.stream.position == self.stream.end:
                return False
            self.stream.raise_on(self.stream_status, "a record of the preempt channel")
        raise self.refusal(status)

    cdef refusal(self, int status):
        place = self.head_offset
        value = self.head & ~<uint64_t> (TARGET_PAGE_SIZE - 1)
        block = self.memory.blocks[self.last_block].idstr if self.last_block >= 0 else ""
        if status == RECEIVE_NOT_PLACED:
            block, value = self.memory.blocks[self.memory.failed_block].idstr, self.memory.failed_page * TARGET_PAGE_SIZE
            text = f"the page at {value:#x} of block '{block}' could not be placed: {os.strerror(self.memory.error)}"
            return MachineError(text)
        if status == RECEIVE_BAD_NAME:
            name = (<bytes> self.name[:self.name_length]).decode("ascii", "backslashreplace")
            known = ", ".join(f"'{b.idstr}'" for i, b in enumerate(self.memory.blocks) if self.memory.table[<int> i].comes)
            finding = f"block {name!r} was not in the source's list, expected one of {known}"
        elif status == RECEIVE_NO_BLOCK:
            finding = f"head {self.head:#x} continues a block, expected a name: no page came before it on this channel"
        elif status == RECEIVE_BAD_OFFSET:
            end = self.memory.table[self.last_block].pages * TARGET_PAGE_SIZE
            finding = f"offset {value:#x} in block '{block}', expected one below {end:#x}"
        elif status == RECEIVE_BAD_FILL:
            finding = f"fill byte {self.fill:#x} of a zero page, expected 0"
        elif status == RECEIVE_TWO_BLOCKS:
            other = self.memory.blocks[self.meant].idstr
            finding = f"offset {value:#x} without a name may be of block '{block}' or of '{other}', expected a name"
        elif status == RECEIVE_TWO_PAGES:
            half = self.memory.blocks[self.gathered_block].idstr
            finding = (
                f"offset {value:#x} of block '{block}' while the host page at "
                f"{self.gathered_page * TARGET_PAGE_SIZE:#x} of block '{half}' is half here, expected the rest of that"
            )
        else:
            finding = (
                f"head {self.head:#x} has flags {self.head & (TARGET_PAGE_SIZE - 1):#x}, expected ZERO (0x2), PAGE (0x8) "
                f"or EOS (0x10): nothing else is sent in postcopy"
            )
        return StreamError(f"postcopy record at offset {place:#x}: {finding}", offset=place, section="ram")
