"""PageServer: the source's pages while the guest runs at the destination (postcopy.md §2, §7).

    RequestReader ─▶ request ─┬─ preempt: sent at once, on the channel of urgent pages
                              └─ else: queue ─▶ serve: requests first, then the walk, from there on

A host page leaves once.  Whoever clears its bits, under the lock, sends all of it, on one channel, in one piece: a request
for a page that is clean, or just being sent, needs no answer.  The guest stands still here, so pages are read as they are.

Threads   the migration thread serves; `mig/src/return` takes requests and, with a channel of urgent pages, sends those;
          no GIL inside.
Holds     (1) no range of a peer is used before `request` has checked it
          (2) a page waits in the queue at most once, so the queue is never longer than guest memory
          (3) once `begin_release` was called, a page is given back when its bytes have left, never before
"""

from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy

from ..encode.zero cimport is_zero
from ..ram.bitmap cimport Bitmap, clear_bit, count_set, find_next_set, set_bit, test_bit
from ..ram.block cimport RAMBlock
from ..ram.dirty cimport DirtyPages, PageBlock
from ..ram.search cimport next_dirty_page
from ..wire.format cimport (
    MIG_CMD_POSTCOPY_RAM_DISCARD,
    QEMU_VM_COMMAND,
    RAM_SAVE_FLAG_CONTINUE,
    RAM_SAVE_FLAG_PAGE,
    RAM_SAVE_FLAG_ZERO,
    TARGET_PAGE_SIZE,
)
from ..wire.stream cimport STREAM_OK, OutputStream, put_be64
from .uffd cimport FaultMessage, Userfaultfd
from .mutex cimport pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock

import os

from ..errors import MachineError, StreamError

cdef extern from "<sys/mman.h>" nogil:
    int madvise(void *address, size_t length, int advice)
    enum: MADV_DONTNEED
    enum: MADV_REMOVE

cdef extern from "<sys/eventfd.h>" nogil:
    int eventfd_write(int fd, uint64_t value)
    int eventfd_read(int fd, uint64_t *value)

cdef enum ServeStatus:
    SERVE_LIMIT = 0               # sent what was allowed
    SERVE_CLEAN = 1               # no dirty page is left
    SERVE_FAILED = 2              # the stream has an error

cdef enum:
    FLUSH_BYTES = 0x10000         # 64 KiB: what an urgent page may have to wait behind
    DISCARD_RANGES = 12           # in one command
    FAULTS_AT_A_TIME = 32


cdef class Lane:
    """One channel of pages; *names_all*: every record names its block."""

    def __cinit__(self, OutputStream out not None, bint names_all=False):
        self.out = out
        self.names_all = names_all
        self.last_block = -1


cdef class PageServer:
    """Sends the pages of *dirty*; see serve.pyi."""

    def __cinit__(self, DirtyPages dirty not None):
        cdef RAMBlock block
        cdef Bitmap bitmap
        cdef bytes name
        cdef int index
        self.wake_fd = -1
        self.dirty = dirty
        self.jump.block = -1
        self.queued = []
        self.discarded = []
        self.clean = []
        self.names = [bytes([len(b.idstr.encode())]) + b.idstr.encode() for b in dirty.blocks]
        self.blocks = <ServedBlock *> calloc(max(dirty.block_count, 1), sizeof(ServedBlock))
        self.ring_size = 1024
        self.ring = <HostPage *> malloc(self.ring_size * sizeof(HostPage))
        if self.blocks == NULL or self.ring == NULL:
            raise MemoryError("no memory for page requests")
        for index in range(dirty.block_count):
            block = dirty.blocks[index]
            bitmap = Bitmap(dirty.table[index].pages)
            name = self.names[index]
            self.queued.append(bitmap)
            self.blocks[index].queued = bitmap.words
            self.blocks[index].count = block.page_size // TARGET_PAGE_SIZE
            self.blocks[index].shared = block.shared
            self.blocks[index].name = name
            self.blocks[index].name_length = len(name)
        pthread_mutex_init(&self.lock, NULL)
        pthread_mutex_init(&self.urgent_lock, NULL)
        self.wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def __dealloc__(self):
        free(self.blocks)
        free(self.ring)
        pthread_mutex_destroy(&self.lock)
        pthread_mutex_destroy(&self.urgent_lock)
        self.close()

    def close(self) -> None:
        """Give the eventfd back; the figures stay."""
        if self.wake_fd >= 0:
            os.close(self.wake_fd)
            self.wake_fd = -1

    # ---- who sends which page ----

    cdef bint claim(self, int block, uint64_t page) noexcept nogil:
        """Take a host page that is dirty: from now on it is the caller's to send.  False when it is nobody's any more."""
        cdef PageBlock *entry = &self.dirty.table[block]
        cdef uint64_t end = min(page + self.blocks[block].count, entry.pages), number
        cdef bint found = False
        pthread_mutex_lock(&self.lock)
        number = find_next_set(entry.dirty, page, end)
        while number < end:
            clear_bit(entry.dirty, number)
            self.dirty.remaining -= 1
            found = True
            number = find_next_set(entry.dirty, number + 1, end)
        pthread_mutex_unlock(&self.lock)
        return found

    cdef bint enqueue(self, int block, uint64_t page) noexcept nogil:
        """Put a host page into the queue, unless it is clean or in it; False without memory.  Under the lock."""
        cdef HostPage *larger
        cdef uint64_t index
        if not test_bit(self.dirty.table[block].dirty, page) or test_bit(self.blocks[block].queued, page):
            return True
        if self.ring_count == self.ring_size:
            larger = <HostPage *> malloc(2 * self.ring_size * sizeof(HostPage))
            if larger == NULL:
                return False
            for index in range(self.ring_count):
                larger[index] = self.ring[(self.ring_first + index) % self.ring_size]
            free(self.ring)
            self.ring = larger
            self.ring_first = 0
            self.ring_size *= 2
        index = (self.ring_first + self.ring_count) % self.ring_size
        self.ring[index].block = block
        self.ring[index].page = page
        self.ring_count += 1
        set_bit(self.blocks[block].queued, page)
        return True

    cdef bint take_request(self, HostPage *found) noexcept nogil:
        """The next request; else the walk jumps to where the last urgent page was."""
        cdef bint taken = False
        cdef uint64_t told
        pthread_mutex_lock(&self.lock)
        if self.ring_count:
            found[0] = self.ring[self.ring_first]
            self.ring_first = (self.ring_first + 1) % self.ring_size
            self.ring_count -= 1
            clear_bit(self.blocks[found.block].queued, found.page)
            taken = True
            if self.ring_count == 0:
                eventfd_read(self.wake_fd, &told)
        elif self.jump.block >= 0:
            self.walk.block = self.jump.block
            self.walk.page = self.jump.page
            self.jump.block = -1
        pthread_mutex_unlock(&self.lock)
        return taken

    cdef int request(self, int block, uint64_t start, uint64_t length) noexcept nogil:
        """A range of a block is wanted, now."""
        cdef uint64_t count = self.blocks[block].count, pages = self.dirty.table[block].pages
        cdef uint64_t page = start // TARGET_PAGE_SIZE, end = page + length // TARGET_PAGE_SIZE
        cdef int status = STREAM_OK
        if start % TARGET_PAGE_SIZE or length % TARGET_PAGE_SIZE or page % count or (end - page) % count:
            return REQUEST_BAD_RANGE
        if length == 0 or page >= pages or end > pages:
            return REQUEST_BAD_RANGE
        self.requests += 1
        if self.urgent is None:
            pthread_mutex_lock(&self.lock)
            while page < end and self.enqueue(block, page):
                page += count
            pthread_mutex_unlock(&self.lock)
            eventfd_write(self.wake_fd, 1)
            return REQUEST_TAKEN
        self.begin_urgent()
        while page < end and status == STREAM_OK:
            status = self.send_urgent(block, page)
            page += count
        status = self.end_urgent(status)
        pthread_mutex_lock(&self.lock)
        self.jump.block = block
        self.jump.page = min(page, pages)
        pthread_mutex_unlock(&self.lock)
        return REQUEST_TAKEN if status == STREAM_OK else REQUEST_SEND

    cdef void begin_urgent(self) noexcept nogil:
        """The channel of urgent pages is the caller's until `end_urgent`."""
        pthread_mutex_lock(&self.urgent_lock)

    cdef int send_urgent(self, int block, uint64_t page) noexcept nogil:
        return self.send_host_page(self.urgent, block, page) if self.claim(block, page) else STREAM_OK

    cdef int end_urgent(self, int status) noexcept nogil:
        """Let the pages leave, unless one has failed already."""
        if status == STREAM_OK:
            status = self.flush(self.urgent)
        self.urgent_status = status
        pthread_mutex_unlock(&self.urgent_lock)
        return status

    # ---- pages into a lane ----

    cdef int send_host_page(self, Lane lane, int block, uint64_t page) noexcept nogil:
        """All target pages of a host page that was claimed."""
        cdef uint8_t head[8 + 256 + 1]
        cdef PageBlock *entry = &self.dirty.table[block]
        cdef uint64_t end = min(page + self.blocks[block].count, entry.pages), flags, zeroes = 0, normals = 0
        cdef const uint8_t *data
        cdef size_t length
        cdef int status = STREAM_OK
        lane.sent[lane.sent_count].block = block
        lane.sent[lane.sent_count].page = page
        lane.sent_count += 1
        while page < end and status == STREAM_OK:
            data = entry.host + page * TARGET_PAGE_SIZE
            length = 8
            if is_zero(data, TARGET_PAGE_SIZE):
                flags = RAM_SAVE_FLAG_ZERO
            else:
                flags = RAM_SAVE_FLAG_PAGE
            if block == lane.last_block and not lane.names_all:
                put_be64(head, page * TARGET_PAGE_SIZE | flags | RAM_SAVE_FLAG_CONTINUE)
            else:
                put_be64(head, page * TARGET_PAGE_SIZE | flags)
                memcpy(head + 8, self.blocks[block].name, self.blocks[block].name_length)
                length += self.blocks[block].name_length
                lane.last_block = block
            if flags == RAM_SAVE_FLAG_ZERO:
                head[length] = 0
                status = lane.out.put(head, length + 1)
                zeroes += 1
            else:
                status = lane.out.put(head, length)
                if status == STREAM_OK:
                    status = lane.out.put_reference(data, TARGET_PAGE_SIZE)
                normals += 1
            page += 1
        self.count(zeroes, normals)
        if status == STREAM_OK and lane.sent_count == RELEASE_LIMIT:
            status = self.flush(lane)
        return status

    cdef void count(self, uint64_t zeroes, uint64_t normals) noexcept nogil:
        pthread_mutex_lock(&self.lock)
        self.zero_pages += zeroes
        self.normal_pages += normals
        pthread_mutex_unlock(&self.lock)

    cdef int flush(self, Lane lane) noexcept nogil:
        """Hand what is pending to the kernel; then its pages are not needed here any more."""
        cdef int status = lane.out.flush_pending()
        if status == STREAM_OK:
            if self.releases or self.frozen is not None:
                self.release(lane)
            lane.sent_count = 0
        return status

    cdef void release(self, Lane lane) noexcept nogil:
        """Give the pages that have left back to the kernel, neighbours at once; where it refuses, they stay."""
        cdef int index = 0, first
        cdef uint64_t count, length
        cdef uint8_t *host
        while index < lane.sent_count:
            first = index
            count = self.blocks[lane.sent[first].block].count
            while (
                index + 1 < lane.sent_count
                and lane.sent[index + 1].block == lane.sent[first].block
                and lane.sent[index + 1].page == lane.sent[index].page + count
            ):
                index += 1
            index += 1
            host = self.dirty.table[lane.sent[first].block].host
            length = <uint64_t> (index - first) * count * TARGET_PAGE_SIZE
            if self.frozen is not None:
                self.frozen.protect(host + lane.sent[first].page * TARGET_PAGE_SIZE, length, False)
                continue
            madvise(
                host + lane.sent[first].page * TARGET_PAGE_SIZE,
                length,
                MADV_REMOVE if self.blocks[lane.sent[first].block].shared else MADV_DONTNEED,
            )

    cdef int serve_some(self, uint64_t byte_limit, uint64_t page_limit) noexcept nogil:
        cdef uint64_t last_offset = self.main.out.offset + byte_limit, sent = 0
        cdef HostPage found
        cdef bint wanted
        while True:
            if self.frozen is not None:
                self.stream_status = self.take_write_faults()
                if self.stream_status != STREAM_OK:
                    return SERVE_FAILED
            wanted = self.take_request(&found)
            if not wanted:
                if self.main.out.offset >= last_offset or sent >= page_limit:
                    self.stream_status = self.flush(self.main)
                    return SERVE_LIMIT if self.stream_status == STREAM_OK else SERVE_FAILED
                if not next_dirty_page(&self.walk, self.dirty):
                    self.stream_status = self.flush(self.main)
                    return SERVE_CLEAN if self.stream_status == STREAM_OK else SERVE_FAILED
                found.block = self.walk.block
                found.page = self.walk.page - self.walk.page % self.blocks[found.block].count
            self.walk.block = found.block
            self.walk.page = min(found.page + self.blocks[found.block].count, self.dirty.table[found.block].pages)
            if not self.claim(found.block, found.page):
                continue
            self.stream_status = self.send_host_page(self.main, found.block, found.page)
            sent += self.blocks[found.block].count
            if self.stream_status == STREAM_OK and (wanted or self.main.out.pending >= FLUSH_BYTES):
                self.stream_status = self.flush(self.main)
            if self.stream_status != STREAM_OK:
                return SERVE_FAILED

    # ---- background snapshots: who writes to a page waits until it has left ----

    cdef int find_address(self, uint64_t address) noexcept nogil:
        cdef int index
        cdef uint64_t host
        for index in range(self.dirty.block_count):
            host = <uint64_t> self.dirty.table[index].host
            if host <= address < host + self.dirty.table[index].pages * TARGET_PAGE_SIZE:
                return index
        return -1

    cdef int take_write_faults(self) noexcept nogil:
        """Let pages that somebody wants to write go first; what has gone already may be written."""
        cdef FaultMessage faults[FAULTS_AT_A_TIME]
        cdef int index, block, count = 0, status = STREAM_OK
        cdef uint64_t offset, size
        self.frozen.read_faults(faults, FAULTS_AT_A_TIME, &count)
        for index in range(count):
            block = self.find_address(faults[index].address)
            if block < 0 or status != STREAM_OK:
                continue
            size = self.blocks[block].count * TARGET_PAGE_SIZE
            offset = faults[index].address - <uint64_t> self.dirty.table[block].host
            offset -= offset % size
            pthread_mutex_lock(&self.lock)
            self.enqueue(block, offset // TARGET_PAGE_SIZE)
            pthread_mutex_unlock(&self.lock)
            if not test_bit(self.dirty.table[block].dirty, offset // TARGET_PAGE_SIZE):
                status = self.flush(self.main)
                self.frozen.protect(self.dirty.table[block].host + offset, size, False)
        return status

    def unprotect_by(self, Userfaultfd uffd not None) -> None:
        """Pages are protected, by *uffd*, until they have left."""
        self.frozen = uffd

    def protect_all(self) -> None:
        """Protect all of memory: it stays as it is until it has left.  MachineError when the kernel refuses."""
        cdef PageBlock *entry
        cdef int index, status
        for index in range(self.dirty.block_count):
            entry = &self.dirty.table[index]
            with nogil:
                status = self.frozen.protect(entry.host, entry.pages * TARGET_PAGE_SIZE, True)
            if status:
                name = self.dirty.blocks[index].idstr
                raise MachineError(f"RAM block '{name}' cannot be protected against writes: {os.strerror(status)}")

    # ---- the door of the migration thread ----

    def connect(self, OutputStream out not None, OutputStream urgent=None) -> None:
        """Send to *out* from now on, urgent pages to *urgent* if there is one; nothing was sent on either before."""
        self.main = Lane(out)
        self.urgent = None if urgent is None else Lane(urgent, True)

    def serve(self, uint64_t byte_limit, uint64_t page_limit) -> bool:
        """Send what is asked for, and about *byte_limit* bytes and *page_limit* pages besides; True when all is clean."""
        cdef int status
        with nogil:
            status = self.serve_some(byte_limit, page_limit)
        if status == SERVE_FAILED:
            self.main.out.raise_on(self.stream_status)
        return status == SERVE_CLEAN

    def make_uniform(self) -> None:
        """A host page of which some target page is dirty is dirty as a whole; then count anew."""
        cdef PageBlock *entry
        cdef uint64_t page, first, end, total = 0
        cdef int index
        with nogil:
            pthread_mutex_lock(&self.lock)
            for index in range(self.dirty.block_count):
                entry = &self.dirty.table[index]
                if self.blocks[index].count == 1:
                    total += count_set(entry.dirty, entry.pages)
                    continue
                page = find_next_set(entry.dirty, 0, entry.pages)
                while page < entry.pages:
                    first = page - page % self.blocks[index].count
                    end = min(first + self.blocks[index].count, entry.pages)
                    for page in range(first, end):
                        set_bit(entry.dirty, page)
                    total += end - first
                    page = find_next_set(entry.dirty, end, entry.pages)
            self.dirty.remaining = total
            pthread_mutex_unlock(&self.lock)

    def send_first(self, places) -> None:
        """Send the host pages at *places* before all others; see serve.pyi."""
        cdef int index, status = STREAM_OK
        cdef uint64_t page
        cdef list found = []
        for index, offset in places:
            if not (0 <= index < self.dirty.block_count and 0 <= offset < self.dirty.table[index].pages * TARGET_PAGE_SIZE):
                raise ValueError(f"offset {offset:#x} in block {index}")
            page = offset // TARGET_PAGE_SIZE
            found.append((index, page - page % self.blocks[index].count))
        if self.urgent is None:
            self.queue_first(found)
            return
        with nogil:  # as all that may wait for the other side
            self.begin_urgent()
        for index, page in found:
            with nogil:
                status = self.send_urgent(index, page) if status == STREAM_OK else status
        with nogil:
            status = self.end_urgent(status)
        self.urgent.out.raise_on(status)

    cdef queue_first(self, list places):
        cdef int index
        cdef uint64_t page
        for index, page in places:
            pthread_mutex_lock(&self.lock)
            self.enqueue(index, page)
            pthread_mutex_unlock(&self.lock)
        if places:
            eventfd_write(self.wake_fd, 1)

    def put_discards(self) -> None:
        """Tell the destination of what is dirty, block by block, on the main channel; see serve.pyi."""
        cdef int index, status
        cdef Bitmap news
        if not self.discarded:
            self.discarded = [Bitmap(self.dirty.table[index].pages) for index in range(self.dirty.block_count)]
        for index in range(self.dirty.block_count):
            news = self.not_discarded(index)
            with nogil:
                status = self.put_discard(index, news.words)
            self.main.out.raise_on(status)

    cdef Bitmap not_discarded(self, int block):
        """What of a block is dirty and was not told before; from now on it was."""
        cdef PageBlock *entry = &self.dirty.table[block]
        cdef Bitmap told = self.discarded[block], news = Bitmap(entry.pages)
        cdef uint64_t word
        for word in range((entry.pages + 63) // 64):
            news.words[word] = entry.dirty[word] & ~told.words[word]
            told.words[word] |= entry.dirty[word]
        return news

    cdef int put_discard(self, int block, const uint64_t *news) noexcept nogil:
        """Commands with the pages of a block that are set in *news*."""
        cdef uint8_t message[5 + 1 + 256 + 1 + 16 * DISCARD_RANGES]
        cdef PageBlock *entry = &self.dirty.table[block]
        cdef size_t name_length = self.blocks[block].name_length
        cdef size_t start = 5 + 1 + name_length + 1, length
        cdef uint64_t page, end
        cdef int ranges, status
        page = find_next_set(news, 0, entry.pages)
        while page < entry.pages:
            ranges = 0
            while page < entry.pages and ranges < DISCARD_RANGES:
                end = page + 1
                while end < entry.pages and test_bit(news, end):
                    end += 1
                put_be64(message + start + 16 * ranges, page * TARGET_PAGE_SIZE)
                put_be64(message + start + 16 * ranges + 8, (end - page) * TARGET_PAGE_SIZE)
                ranges += 1
                page = find_next_set(news, end, entry.pages)
            length = start + 16 * ranges
            message[0] = QEMU_VM_COMMAND
            message[1] = 0
            message[2] = MIG_CMD_POSTCOPY_RAM_DISCARD
            message[3] = <uint8_t> ((length - 5) >> 8)
            message[4] = <uint8_t> ((length - 5) & 0xFF)
            message[5] = 0  # version
            memcpy(message + 6, self.blocks[block].name, name_length)
            message[6 + name_length] = 0
            status = self.main.out.put(message, length)
            if status != STREAM_OK:
                return status
        return STREAM_OK

    def note_clean(self) -> None:
        """Remember what the destination has already: it is given back by `begin_release`."""
        cdef Bitmap kept
        cdef int index
        for index in range(self.dirty.block_count):
            kept = Bitmap(self.dirty.table[index].pages)
            memcpy(kept.words, self.dirty.table[index].dirty, (kept.bits + 63) // 64 * 8)
            self.clean.append(kept)

    def begin_release(self) -> None:
        """The guest is at the destination: give back what it had at the switch, and from now on what has left."""
        cdef PageBlock *entry
        cdef uint64_t page, end
        cdef Bitmap kept
        self.releases = True
        clean, self.clean = self.clean, []
        for index, kept in enumerate(clean):
            entry = &self.dirty.table[<int> index]
            advice = MADV_REMOVE if self.blocks[<int> index].shared else MADV_DONTNEED
            page = 0
            while page < entry.pages:
                end = find_next_set(kept.words, page, entry.pages)
                if end > page:
                    madvise(entry.host + page * TARGET_PAGE_SIZE, (end - page) * TARGET_PAGE_SIZE, advice)
                page = end
                while page < entry.pages and test_bit(kept.words, page):
                    page += 1

    # ---- recovery ----

    def bitmap_size(self, str idstr) -> int:
        """Bytes of a block's received bitmap on the wire; KeyError for a block that does not exist."""
        return (self.dirty.table[<int> self.index_of(idstr)].pages + 63) // 64 * 8

    def index_of(self, str idstr) -> int:
        for index, block in enumerate(self.dirty.blocks):
            if block.idstr == idstr:
                return index
        raise KeyError(idstr)

    def take_received(self, str idstr, const uint8_t[::1] bitmap not None) -> None:
        """The destination has these pages of a block: the others are to be sent.

        StreamError when it claims one that was never sent: what it has then is not the guest's.
        """
        cdef int index = self.index_of(idstr)
        cdef PageBlock *entry = &self.dirty.table[index]
        cdef uint64_t page, unsent = 0, first_unsent = 0
        if <uint64_t> bitmap.shape[0] * 8 < entry.pages:
            raise ValueError(f"a bitmap of {bitmap.shape[0]} bytes for {entry.pages} pages")
        with nogil:
            for page in range(entry.pages):
                if (bitmap[page >> 3] >> (page & 7)) & 1 and test_bit(entry.dirty, page):
                    if unsent == 0:
                        first_unsent = page
                    unsent += 1
        if unsent:
            raise StreamError(
                f"the destination says that it has {unsent} pages of block '{idstr}' that were never sent, "
                f"the first at {first_unsent * TARGET_PAGE_SIZE:#x}"
            )
        with nogil:
            for page in range(entry.pages):
                if not (bitmap[page >> 3] >> (page & 7)) & 1:
                    set_bit(entry.dirty, page)

    def forget_requests(self) -> None:
        """The connection is lost: the destination will ask again for what it still needs."""
        cdef uint64_t told
        cdef Bitmap bitmap
        with nogil:
            pthread_mutex_lock(&self.lock)
        self.ring_count = 0
        self.jump.block = -1
        self.walk.block = 0
        self.walk.page = 0
        for bitmap in self.queued:
            bitmap.clear_all()
        eventfd_read(self.wake_fd, &told)
        pthread_mutex_unlock(&self.lock)
