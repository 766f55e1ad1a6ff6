"""Records from the stream straight into guest RAM (ram.md §2–§4).

In    records on an InputStream: heads, names, fill bytes, pages, deltas
Out   guest RAM; which pages have been received

A page that lies in the stream's buffer is copied.  When the buffer runs dry in a page, the rest is read straight into
guest RAM, and so are the pages that *probably* follow: most often a head is "the next page, in full, same block".

    guess   [rest of page n → guest][head → aside][page n+1 → guest][head → aside][page n+2 → guest] …

The heads are checked afterwards.  Where one is not what was guessed, the bytes behind it are taken back out of guest RAM
into the buffer and parsed as usual, and the pages they had landed in become zero again.  That is only right for pages
that nobody has written yet, so only those are ever guessed: never received, in a block that is `fresh`.

Threads   one thread at a time per loader; no GIL inside.
Holds     (1) no byte of a peer is used as an offset, a length or a name before it was checked
          (2) a page is written only at the word of a record for it; after a wrong guess it reads as zero again
          (3) a delta patches the page where it lies; one that is malformed may leave it half patched, and ends the load
          (4) zeroes are not written to a page that reads as zero: memory that is untouched stays unpopulated
"""

from contextlib import suppress

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memset

from ..encode.xbzrle cimport DeltaFault, apply_delta, fault_text
from ..encode.zlib_page cimport ZLIB_PAGE_MAX_LENGTH, ZLIB_PAGE_OK, inflate_page
from ..encode.zlib_page import finding as page_finding
from ..encode.zlib_page import load_library
from ..errors import OptionError, StreamError
from ..wire.format cimport (
    ENCODING_FLAG_XBZRLE,
    RAM_SAVE_FLAG_COMPRESS_PAGE,
    RAM_SAVE_FLAG_CONTINUE,
    RAM_SAVE_FLAG_EOS,
    RAM_SAVE_FLAG_MEM_SIZE,
    RAM_SAVE_FLAG_PAGE,
    RAM_SAVE_FLAG_XBZRLE,
    RAM_SAVE_FLAG_ZERO,
    TARGET_PAGE_SIZE,
)
from ..wire.stream cimport STREAM_OK, InputStream, get_be16, get_be32, get_be64, iovec, put_be64
from .bitmap cimport clear_run
from .block cimport RAMBlock
from .landing cimport Landing, LoadBlock

from ..savevm import remedies
from ..wire.format import RamSaveFlag

cdef enum LoadStatus:
    LOAD_EOS = 0                  # the section's body is over
    LOAD_PAUSE = 1                # many records done, more to come: the caller has a look round
    LOAD_OTHER = 2                # a head that the caller handles
    LOAD_STREAM = 3               # the stream ended or failed
    LOAD_NO_BLOCK = 4             # CONTINUE before any name
    LOAD_BAD_NAME = 5             # no such block
    LOAD_BAD_OFFSET = 6           # past the block's end
    LOAD_BAD_FILL = 7             # a fill byte that is not zero
    LOAD_BAD_ENCODING = 8         # not a delta
    LOAD_LONG_DELTA = 9           # longer than a page
    LOAD_BAD_DELTA = 10           # what is wrong with it is in `fault`
    LOAD_BAD_LENGTH = 11          # of a compressed page
    LOAD_BAD_DATA = 12            # of a compressed page; what is wrong with it is in `page_status`

cdef enum:
    RECORDS_AT_A_TIME = 32768     # then the caller looks round, as QEMU's loader does
    GUESS_LIMIT = 128             # pages: the whole guess fits into the stream's buffer
    HEAD = 8
    DELTA_HEAD = 3                # behind the head of an XBZRLE record: encoding, length
    DATA_HEAD = 4                 # behind the head of a COMPRESS_PAGE record: length

cdef uint64_t PAGE_FLAGS = (
    RAM_SAVE_FLAG_PAGE | RAM_SAVE_FLAG_ZERO | RAM_SAVE_FLAG_XBZRLE | RAM_SAVE_FLAG_COMPRESS_PAGE
)


cdef class RamLoader:
    """Loads RAM records from *stream* to *landing*; see load.pyi."""

    cdef readonly InputStream stream
    cdef readonly Landing landing
    cdef LoadBlock *table             # the landing's
    cdef object on_flush              # called at a sync point of multifd
    cdef public object load_pages     # called with the index of each block listed: mapped-ram; None: pages come as records
    cdef int last_block               # of the previous record on this stream; −1: none yet
    cdef int guess                    # how many pages to guess next time
    cdef uint64_t head                # of the record at hand …
    cdef uint64_t head_offset         # … and where in the stream it stood
    cdef uint8_t name[256]            # of the block it names
    cdef size_t name_length
    cdef uint8_t fill                 # behind a ZERO record; behind an XBZRLE record …
    cdef uint16_t delta_length        # … its encoding and the length of its delta
    cdef DeltaFault fault
    cdef uint32_t data_length         # behind the head of a COMPRESS_PAGE record
    cdef int page_status
    cdef int stream_status
    cdef uint8_t heads[GUESS_LIMIT * HEAD]
    cdef iovec iov[1 + 2 * GUESS_LIMIT]
    cdef readonly uint64_t zero_pages
    cdef readonly uint64_t normal_pages
    cdef readonly uint64_t encoded_pages
    cdef readonly uint64_t compressed_pages
    cdef readonly uint64_t wrong_guesses

    def __cinit__(self, stream not None, Landing landing not None, on_flush=None):
        self.stream = stream
        self.landing = landing
        self.table = landing.table
        self.on_flush = on_flush
        self.last_block = -1
        self.guess = 1
        with suppress(OptionError):  # nearly no stream needs it; one that does is refused with what is missing
            load_library()

    @property
    def blocks(self) -> list:
        return self.landing.blocks

    # ---- the engine ----

    cdef int take_block(self) noexcept nogil:
        """Settle which block the record at hand means; the head has been consumed."""
        cdef int block
        if self.head & RAM_SAVE_FLAG_CONTINUE:
            return LOAD_EOS if self.last_block >= 0 else LOAD_NO_BLOCK
        self.stream_status = self.stream.ensure(1)
        if self.stream_status != STREAM_OK:
            return LOAD_STREAM
        self.name_length = self.stream.buffer[self.stream.position]
        self.stream_status = self.stream.ensure(1 + self.name_length)
        if self.stream_status != STREAM_OK:
            return LOAD_STREAM
        memcpy(self.name, self.stream.buffer + self.stream.position + 1, self.name_length)
        self.stream.position += 1 + self.name_length
        block = self.landing.find_block(self.name, self.name_length)
        if block < 0:
            return LOAD_BAD_NAME
        self.last_block = block
        return LOAD_EOS

    cdef int load_zero(self, LoadBlock *block, uint64_t page) noexcept nogil:
        self.stream_status = self.stream.ensure(1)
        if self.stream_status != STREAM_OK:
            return LOAD_STREAM
        self.fill = self.stream.buffer[self.stream.position]
        self.stream.position += 1
        if self.fill:
            return LOAD_BAD_FILL
        self.landing.clear_page(block, page)
        self.zero_pages += 1
        self.load_zero_run(block, page + 1)
        return LOAD_EOS

    cdef void load_zero_run(self, LoadBlock *block, uint64_t page) noexcept nogil:
        """Take what is in the buffer already of a run of zero pages that goes on with *page*: most of them have neighbours."""
        cdef const uint8_t *record = self.stream.buffer + self.stream.position
        cdef const uint8_t *end = self.stream.buffer + self.stream.end
        cdef uint64_t first = page
        while end - record > HEAD and page < block.pages and record[HEAD] == 0:
            if get_be64(record) != page * TARGET_PAGE_SIZE | RAM_SAVE_FLAG_ZERO | RAM_SAVE_FLAG_CONTINUE:
                break
            self.landing.clear_page(block, page)
            record += HEAD + 1
            page += 1
        self.zero_pages += page - first
        self.stream.position += (page - first) * (HEAD + 1)

    cdef int load_page(self, LoadBlock *block, uint64_t page) noexcept nogil:
        cdef uint8_t *target = block.host + page * TARGET_PAGE_SIZE
        cdef size_t there = min(<size_t> TARGET_PAGE_SIZE, self.stream.end - self.stream.position)
        memcpy(target, self.stream.buffer + self.stream.position, there)
        self.stream.position += there
        self.landing.note_received(block, page)
        self.normal_pages += 1
        if there == TARGET_PAGE_SIZE:
            return LOAD_EOS
        return self.read_pages(block, page, there)

    cdef int load_delta(self, LoadBlock *block, uint64_t page) noexcept nogil:
        """Patch *page*, whether or not this side has the capability on (xbzrle.md §1, §2)."""
        cdef const uint8_t *delta
        self.stream_status = self.stream.ensure(DELTA_HEAD)
        if self.stream_status != STREAM_OK:
            return LOAD_STREAM
        self.fill = self.stream.buffer[self.stream.position]
        self.delta_length = get_be16(self.stream.buffer + self.stream.position + 1)
        if self.fill != ENCODING_FLAG_XBZRLE:
            return LOAD_BAD_ENCODING
        if self.delta_length > TARGET_PAGE_SIZE:
            return LOAD_LONG_DELTA
        self.stream_status = self.stream.ensure(DELTA_HEAD + self.delta_length)
        if self.stream_status != STREAM_OK:
            return LOAD_STREAM
        delta = self.stream.buffer + self.stream.position + DELTA_HEAD
        self.stream.position += DELTA_HEAD + self.delta_length
        self.landing.note_received(block, page)
        self.encoded_pages += 1
        if self.delta_length and apply_delta(
            block.host + page * TARGET_PAGE_SIZE, TARGET_PAGE_SIZE, delta, self.delta_length, &self.fault
        ):
            return LOAD_BAD_DELTA
        return LOAD_EOS

    cdef int load_compressed(self, LoadBlock *block, uint64_t page) noexcept nogil:
        """A page that a QEMU before 9.1 compressed; it needs no capability here, for the record says what it is."""
        cdef const uint8_t *data
        self.stream_status = self.stream.ensure(DATA_HEAD)
        if self.stream_status != STREAM_OK:
            return LOAD_STREAM
        self.data_length = get_be32(self.stream.buffer + self.stream.position)
        if not 0 < self.data_length <= ZLIB_PAGE_MAX_LENGTH:
            return LOAD_BAD_LENGTH
        self.stream_status = self.stream.ensure(DATA_HEAD + self.data_length)
        if self.stream_status != STREAM_OK:
            return LOAD_STREAM
        data = self.stream.buffer + self.stream.position + DATA_HEAD
        self.stream.position += DATA_HEAD + self.data_length
        self.landing.note_received(block, page)
        self.compressed_pages += 1
        self.page_status = inflate_page(block.host + page * TARGET_PAGE_SIZE, data, self.data_length)
        return LOAD_EOS if self.page_status == ZLIB_PAGE_OK else LOAD_BAD_DATA

    cdef int list_guess(self, LoadBlock *block, uint64_t page, size_t there) noexcept nogil:
        """List where the rest of *page* goes, and the pages that may follow it; returns how many were guessed."""
        cdef uint64_t limit, guessed = 0, index
        cdef uint8_t *target = block.host + page * TARGET_PAGE_SIZE
        self.iov[0].iov_base = target + there
        self.iov[0].iov_len = TARGET_PAGE_SIZE - there
        if block.fresh and not self.landing.shared:  # another thread may have got further with them
            limit = min(page + 1 + self.guess, block.pages)
            guessed = clear_run(block.received, page + 1, limit) if limit > page + 1 else 0
        for index in range(guessed):
            self.iov[1 + 2 * index].iov_base = self.heads + index * HEAD
            self.iov[1 + 2 * index].iov_len = HEAD
            self.iov[2 + 2 * index].iov_base = target + (index + 1) * TARGET_PAGE_SIZE
            self.iov[2 + 2 * index].iov_len = TARGET_PAGE_SIZE
        return <int> guessed

    cdef int read_pages(self, LoadBlock *block, uint64_t page, size_t there) noexcept nogil:
        """Read the rest of *page*, of which *there* bytes are in place, and what follows if it is as guessed.

        The stream's buffer is empty.
        """
        cdef int guessed, index
        cdef size_t received, part
        cdef uint64_t expected
        cdef uint8_t head[HEAD]
        self.stream.base += self.stream.position
        self.stream.position = self.stream.end = 0
        while there < TARGET_PAGE_SIZE:
            guessed = self.list_guess(block, page, there)
            self.stream_status = self.stream.receive(self.iov, 1 + 2 * guessed, &received)
            if self.stream_status != STREAM_OK:
                return LOAD_STREAM
            part = min(received, TARGET_PAGE_SIZE - there)
            there += part
            received -= part
            self.stream.base += part
            for index in range(guessed):
                if received < HEAD:
                    break
                expected = (page + 1) * TARGET_PAGE_SIZE | RAM_SAVE_FLAG_PAGE | RAM_SAVE_FLAG_CONTINUE
                put_be64(head, expected)
                if memcmp(head, self.heads + index * HEAD, HEAD):
                    self.wrong_guesses += 1
                    break
                page += 1
                self.landing.note_received(block, page)
                self.normal_pages += 1
                part = min(received - HEAD, <size_t> TARGET_PAGE_SIZE)
                there = part
                received -= HEAD + part
                self.stream.base += HEAD + part
            else:
                index = guessed
                if guessed == self.guess:
                    self.guess = min(2 * self.guess, <int> GUESS_LIMIT)
            if received:
                if received >= HEAD:
                    self.guess = max(self.guess // 2, 1)
                self.take_back(index, guessed, received)
        return LOAD_EOS

    cdef void take_back(self, int index, int guessed, size_t length) noexcept nogil:
        """Move *length* bytes that were guessed wrong, from head *index* on, into the stream's buffer."""
        cdef size_t part
        cdef int entry
        self.stream.end = 0
        for entry in range(1 + 2 * index, 1 + 2 * guessed):
            part = min(length, self.iov[entry].iov_len)
            memcpy(self.stream.buffer + self.stream.end, self.iov[entry].iov_base, part)
            if self.iov[entry].iov_len == TARGET_PAGE_SIZE:
                memset(self.iov[entry].iov_base, 0, part)
            self.stream.end += part
            length -= part
            if length == 0:
                return

    cdef int load_some(self, int limit) noexcept nogil:
        cdef LoadBlock *block
        cdef uint64_t flags, page
        cdef int status
        while limit > 0:
            limit -= 1
            self.stream_status = self.stream.ensure(HEAD)
            if self.stream_status != STREAM_OK:
                return LOAD_STREAM
            self.head_offset = self.stream.base + self.stream.position
            self.head = get_be64(self.stream.buffer + self.stream.position)
            self.stream.position += HEAD
            flags = self.head & (TARGET_PAGE_SIZE - 1)
            if self.head == RAM_SAVE_FLAG_EOS:
                return LOAD_EOS
            flags &= ~(<uint64_t> RAM_SAVE_FLAG_CONTINUE)
            if self.load_pages is not None:
                return LOAD_OTHER
            if not flags & PAGE_FLAGS or flags & (flags - 1):
                return LOAD_OTHER
            status = self.take_block()
            if status != LOAD_EOS:
                return status
            block = &self.table[self.last_block]
            page = self.head // TARGET_PAGE_SIZE
            if page >= block.pages:
                return LOAD_BAD_OFFSET
            if flags == RAM_SAVE_FLAG_PAGE:
                status = self.load_page(block, page)
            elif flags == RAM_SAVE_FLAG_XBZRLE:
                status = self.load_delta(block, page)
            elif flags == RAM_SAVE_FLAG_COMPRESS_PAGE:
                status = self.load_compressed(block, page)
            else:
                status = self.load_zero(block, page)
            if status != LOAD_EOS:
                return status
        return LOAD_PAUSE

    # ---- the door ----

    def load_body(self, look_round=None):
        """Load records up to the end of the section's body; see load.pyi."""
        cdef int status
        while True:
            with nogil:
                status = self.load_some(RECORDS_AT_A_TIME)
            if status == LOAD_EOS:
                return
            if status == LOAD_PAUSE:
                if look_round is not None:
                    look_round()
            elif status == LOAD_OTHER:
                self.load_other()
            elif status == LOAD_STREAM:
                self.stream.raise_on(self.stream_status, "a record of section 'ram'")
            else:
                raise self.refusal(status)

    cdef load_other(self):
        cdef uint64_t flags = self.head & (TARGET_PAGE_SIZE - 1)
        if flags == RAM_SAVE_FLAG_MEM_SIZE:
            self.load_block_list(self.head - flags)
        elif self.load_pages is not None:
            raise StreamError(
                f"section 'ram' instance 0, record at offset {self.head_offset:#x}: head {self.head:#x} has flags "
                f"{flags:#x}{flag_names(flags)}, expected MEM_SIZE (0x4) or EOS (0x10): with mapped-ram pages are no records",
                offset=self.head_offset,
                section="ram",
            )
        elif flags == RamSaveFlag.RAM_SAVE_FLAG_MULTIFD_FLUSH and self.head == flags:
            if self.on_flush is not None:  # 8.1 sends it without multifd, too: then there is nothing to do
                self.on_flush()
        else:
            raise StreamError(
                f"section 'ram' instance 0, record at offset {self.head_offset:#x}: head {self.head:#x} has flags "
                f"{flags:#x}{flag_names(flags)}, expected one of ZERO (0x2), MEM_SIZE (0x4), PAGE (0x8), EOS (0x10), "
                f"XBZRLE (0x40), COMPRESS_PAGE (0x100), and with a page also CONTINUE (0x20)",
                offset=self.head_offset,
                section="ram",
                remedy=remedies.for_record(flags),
            )

    cdef load_block_list(self, uint64_t total):
        """The list of RAM blocks: each must exist here, and have or take the same length (ram.md §3)."""
        cdef uint64_t length, left = total
        cdef int index
        while left:
            place = self.stream.offset
            name = self.stream.read(self.stream.read_u8("the list of RAM blocks"), "the name of a RAM block")
            length = self.stream.read_be64("the list of RAM blocks")
            if name not in self.landing.names:
                raise self.unknown_block(name, place, length, is_main=left == total)
            index = self.landing.names.index(name)
            self.take_length(index, length, place)
            if self.landing.ignore_shared:
                self.check_address(index, self.stream.read_be64("the list of RAM blocks"), place)
            if length > left:
                raise list_error(
                    place,
                    f"block '{self.blocks[index].idstr}' has {length:#x} bytes, "
                    f"only {left:#x} are left of the announced total of {total:#x}",
                )
            left -= length
            if self.landing.postcopy_advised and self.blocks[index].page_size != TARGET_PAGE_SIZE:
                self.check_page_size(self.blocks[index])
            self.landing.listed.add(index)
            if self.load_pages is not None:
                self.normal_pages += self.load_pages(index)

    def check_page_size(self, RAMBlock block):
        """Both ends place whole host pages, which must be the same ones (ram.md §3)."""
        place = self.stream.offset
        page_size = self.stream.read_be64("the list of RAM blocks")
        if page_size != block.page_size:
            raise list_error(
                place, f"block '{block.idstr}' has host pages of {block.page_size:#x} bytes here, {page_size:#x} at the source"
            )

    cdef check_address(self, int index, uint64_t address, place):
        """Memory that both ends have must be the same memory: seen by the guest at the same place."""
        cdef RAMBlock block = self.blocks[index]
        if self.landing.is_ignored(block) and address != block.guest_address:
            raise list_error(
                place, f"block '{block.idstr}' is at guest address {block.guest_address:#x} here, at {address:#x} there"
            )

    cdef take_length(self, int index, uint64_t length, place):
        """Let a block have the length that it has at the source, if there is room to grow or shrink in."""
        cdef RAMBlock block = self.blocks[index]
        if length == block.used_length:
            return
        if length > block.max_length or self.landing.is_ignored(block) or length % TARGET_PAGE_SIZE or block.max_length == block.used_length:
            raise list_error(
                place,
                f"block '{block.idstr}' has {block.used_length:#x} bytes here, the stream says {length:#x}",
                remedies.for_block_length(block.idstr, length),
            )
        block.used_length = length
        self.table[index].pages = length // TARGET_PAGE_SIZE

    def unknown_block(self, bytes name, place, length=None, *, is_main=False):
        text = name.decode("ascii", "backslashreplace")
        here = {block.idstr: block.used_length for block in self.blocks}
        known = ", ".join(f"'{idstr}'" for idstr in here)
        return list_error(
            place,
            f"block {text!r} does not exist here, this machine has {known}",
            remedies.for_block(text, length, here, is_main=is_main),
        )

    cdef refusal(self, int status):
        place = self.head_offset
        if status == LOAD_BAD_NAME:
            return self.unknown_block(self.name[:self.name_length], place)
        if status == LOAD_NO_BLOCK:
            finding = f"head {self.head:#x} continues a block, expected a name: no page came before it on this channel"
        elif status == LOAD_BAD_OFFSET and self.landing.is_ignored(self.blocks[self.last_block]):
            block = self.blocks[self.last_block]
            finding = f"a page of block '{block.idstr}', expected none: with x-ignore-shared both ends have that memory"
        elif status == LOAD_BAD_OFFSET:
            block = self.blocks[self.last_block]
            finding = (
                f"offset {self.head & ~<uint64_t> (TARGET_PAGE_SIZE - 1):#x} in block '{block.idstr}', "
                f"expected one below {block.used_length:#x}"
            )
        elif status == LOAD_BAD_ENCODING:
            finding = f"encoding {self.fill:#x}, expected that of a delta, {ENCODING_FLAG_XBZRLE:#x}"
        elif status == LOAD_LONG_DELTA:
            finding = f"a delta of {self.delta_length} bytes, expected at most {TARGET_PAGE_SIZE}"
        elif status == LOAD_BAD_DELTA:
            finding = fault_text(&self.fault, TARGET_PAGE_SIZE, self.delta_length)
        elif status == LOAD_BAD_LENGTH:
            finding = f"compressed data of {self.data_length} bytes, expected 1 to {ZLIB_PAGE_MAX_LENGTH}"
        elif status == LOAD_BAD_DATA:
            finding = f"compressed data of {self.data_length} bytes: {page_finding(self.page_status)}"
        else:
            finding = f"fill byte {self.fill:#x} of a zero page, expected 0"
        return StreamError(
            f"section 'ram' instance 0, record at offset {place:#x}: {finding}", offset=place, section="ram"
        )


def list_error(place, finding, remedy=""):
    """What is wrong with the entry at *place* of the list of blocks."""
    return StreamError(f"section 'ram' instance 0 at offset {place:#x}: {finding}", offset=place, section="ram", remedy=remedy)


def flag_names(flags):
    """The flags that have a name, as the end of a phrase."""
    names = [one.name.removeprefix("RAM_SAVE_FLAG_") for one in RamSaveFlag if flags & one]
    return f" ({', '.join(names)})" if names else ""
