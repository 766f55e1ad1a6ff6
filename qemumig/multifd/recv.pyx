"""Packets straight into guest RAM, each channel in its own thread; and where the channels meet (multifd.md §3, §6).

    Receiver   [header] ─checked─▶ zero pages cleared ─▶ one readv: [page]…[page][next header] ─▶ SYNC? meet the others
    Meeting    a channel that has loaded a SYNC reports and waits; the main loader, on its mark, waits for all of them
               and lets them go

The header of the next packet is asked for together with the data of this one, because it is what always follows.

Threads   `Receiver.run` in the channel's thread, `mig/dst/recv_N`; `Meeting.sync` and `Meeting.close` in the main loader's;
          the rest from any.  No GIL while anything is loaded or waited for.
Holds     (1) no byte of a peer is used as an offset, a length or a name before it was checked
          (2) after `close` no channel writes to guest RAM: one that would have to is refused before
          (3) nobody waits for a channel that has ended or failed
"""

import os

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset

from ..encode.compress cimport CODEC_OK, CODEC_SHORT
from ..errors import MigrationCancelled, MigrationError, StreamError
from ..wire.format cimport (
    MULTIFD_DATA_LIMIT,
    MULTIFD_FLAG_COMPRESSION_MASK,
    MULTIFD_FLAG_SYNC,
    MULTIFD_HEADER_SIZE,
    MULTIFD_INIT_SIZE,
    TARGET_PAGE_SIZE,
)
from ..wire.stream cimport STREAM_CANCELLED, STREAM_END, STREAM_FAILED, STREAM_OK, wait_for
from .locks cimport (
    pthread_cond_broadcast,
    pthread_cond_destroy,
    pthread_cond_init,
    pthread_cond_wait,
    pthread_mutex_destroy,
    pthread_mutex_init,
    pthread_mutex_lock,
    pthread_mutex_unlock,
)
from .packet cimport PACKET_OK, describe_fault, parse_header

cdef extern from "<sys/eventfd.h>" nogil:
    int eventfd_write(int fd, unsigned long long value)
    int eventfd_read(int fd, unsigned long long *value)

cdef extern from "<poll.h>" nogil:
    enum: POLLIN

cdef enum ReceiverStatus:
    RECV_OK = 0
    RECV_END = 1                  # the stream is over, between two packets
    RECV_OVER = 2                 # the load is over, nothing is loaded any more
    RECV_STREAM = 3               # the stream ended in a packet, or failed
    RECV_BAD_HEADER = 4
    RECV_BAD_METHOD = 5           # another compression than the one agreed upon
    RECV_BAD_BLOCK = 6
    RECV_BAD_OFFSET = 7
    RECV_BAD_SIZE = 8             # more or less data than pages can be
    RECV_BAD_DATA = 9             # it does not decompress into these pages


cdef class Meeting:
    """Where *count* channels and the main loader meet; see recv.pyi."""

    def __cinit__(self, int count, on_failure):
        self.count = count
        self.on_failure = on_failure
        pthread_mutex_init(&self.mutex, NULL)
        pthread_cond_init(&self.released, NULL)
        self.report_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def __dealloc__(self):
        self.release()
        pthread_cond_destroy(&self.released)
        pthread_mutex_destroy(&self.mutex)

    def release(self):
        """Give the descriptor back: nobody waits any more."""
        if self.report_fd >= 0:
            os.close(self.report_fd)
            self.report_fd = -1

    # ---- for the channels ----

    cdef void report(self) noexcept nogil:
        eventfd_write(self.report_fd, 1)

    cdef bint may_load(self, int channel_id) noexcept nogil:
        """Announce that pages are about to be loaded; False when it is too late for that."""
        cdef bint is_over
        pthread_mutex_lock(&self.mutex)
        is_over = self.is_over
        if not is_over:
            self.loading[channel_id] = True
        pthread_mutex_unlock(&self.mutex)
        return not is_over

    cdef bint wait_release(self) noexcept nogil:
        """Report a SYNC and wait until all are let go; False when the load is over."""
        cdef uint64_t epoch
        cdef bint is_over
        pthread_mutex_lock(&self.mutex)
        self.waiting += 1
        epoch = self.epoch
        if self.waiting + self.ended >= self.count:
            self.report()
        while self.epoch == epoch and not self.is_over:
            pthread_cond_wait(&self.released, &self.mutex)
        is_over = self.is_over
        pthread_mutex_unlock(&self.mutex)
        return not is_over

    cdef void note_end(self) noexcept nogil:
        pthread_mutex_lock(&self.mutex)
        self.ended += 1
        self.report()
        pthread_mutex_unlock(&self.mutex)

    def fail(self, error):
        """A channel failed: whoever waits is woken; see recv.pyi."""
        with nogil:
            pthread_mutex_lock(&self.mutex)
        is_first = self.error is None and not self.is_over
        if is_first:
            self.error = error
        self.is_over = True
        self.report()
        pthread_cond_broadcast(&self.released)
        pthread_mutex_unlock(&self.mutex)
        if is_first:
            self.on_failure()

    # ---- for the main loader ----

    cdef int count_ready(self, bint *is_impossible) noexcept nogil:
        """How many channels have reported; when all have, they are let go."""
        cdef int ready
        pthread_mutex_lock(&self.mutex)
        ready = self.waiting
        is_impossible[0] = self.is_over or self.ended > 0
        if ready == self.count and not self.is_over:
            memset(self.loading, 0, sizeof(self.loading))
            self.waiting = 0
            self.epoch += 1
            pthread_cond_broadcast(&self.released)
        pthread_mutex_unlock(&self.mutex)
        return ready

    def sync(self, int quit_fd):
        """Wait until every channel has loaded a SYNC, and let them go; see recv.pyi."""
        cdef bint is_impossible = False
        cdef int ready, status = STREAM_OK
        cdef unsigned long long reports
        with nogil:
            while True:
                eventfd_read(self.report_fd, &reports)
                ready = self.count_ready(&is_impossible)
                if ready == self.count or is_impossible:
                    break
                status = wait_for(self.report_fd, POLLIN, quit_fd)
                if status != STREAM_OK:
                    break
        self.raise_failure()
        if status == STREAM_CANCELLED:
            raise MigrationCancelled("the migration was cancelled")
        if ready != self.count:
            raise StreamError(
                f"{self.ended} of {self.count} multifd channels ended before the sync point that the main channel has reached"
            )

    def raise_failure(self):
        """Raise what a channel failed of, if one did."""
        if self.error is not None:
            raise self.error

    def close(self, *, is_complete):
        """Nothing is loaded any more; see recv.pyi."""
        cdef int index
        with nogil:
            pthread_mutex_lock(&self.mutex)
        unsynced = [index for index in range(self.count) if self.loading[index]]
        self.is_over = True
        pthread_cond_broadcast(&self.released)
        pthread_mutex_unlock(&self.mutex)
        if is_complete:
            self.raise_failure()
            if unsynced:
                raise StreamError(f"multifd channel {unsynced[0]} has brought pages behind the last sync point of the main channel")


cdef class Receiver:
    """Loads the packets of one channel; see recv.pyi."""

    def __cinit__(self, int channel_id, InputStream stream not None, Meeting meeting not None, Landing landing not None):
        if not 0 <= channel_id < meeting.count:
            raise ValueError(f"channel {channel_id} of {meeting.count}")
        self.channel_id = channel_id
        self.stream = stream
        self.meeting = meeting
        self.landing = landing
        self.offset = MULTIFD_INIT_SIZE

    def __dealloc__(self):
        free(self.buffer)

    def decompress_with(self, uint32_t method, Decompressor decompressor not None):
        """Expect packets of compression *method*; see recv.pyi."""
        self.buffer = <uint8_t *> malloc(MULTIFD_DATA_LIMIT)
        if self.buffer == NULL:
            raise MemoryError("no memory for the data of a packet")
        self.method = method
        self.decompressor = decompressor

    # ---- the engine ----

    cdef int serve(self) noexcept nogil:
        cdef int status
        while True:
            status = self.read_header()
            if status != RECV_OK:
                return status
            self.packet_status = parse_header(self.header, &self.packet)
            self.ahead = 0
            if self.packet_status != PACKET_OK:
                return RECV_BAD_HEADER
            if self.packet.normal_pages + self.packet.zero_pages:
                status = self.check_pages()
                if status != RECV_OK:
                    return status
                if not self.meeting.may_load(self.channel_id):
                    return RECV_OVER
                status = self.load_pages()
                if status != RECV_OK:
                    return status
            else:
                self.offset += MULTIFD_HEADER_SIZE
            if self.packet.flags & MULTIFD_FLAG_SYNC and not self.meeting.wait_release():
                return RECV_OVER

    cdef int read_list(self, int count, size_t wanted) noexcept nogil:
        """Fill the list; *wanted* bytes must come, what the next header has beyond that may."""
        cdef int first = 0
        cdef size_t received = 0
        while True:
            self.stream_status = self.stream.receive(&self.iov[first], count - first, &received)
            if self.stream_status != STREAM_OK:
                return RECV_STREAM
            self.stream.base += received
            if received >= wanted:
                self.ahead = received - wanted
                return RECV_OK
            wanted -= received
            while received >= self.iov[first].iov_len:
                received -= self.iov[first].iov_len
                first += 1
            self.iov[first].iov_base = <uint8_t *> self.iov[first].iov_base + received
            self.iov[first].iov_len -= received

    cdef int read_header(self) noexcept nogil:
        """Complete the header of the next packet."""
        cdef size_t received = 0
        while self.ahead < MULTIFD_HEADER_SIZE:
            self.iov[0].iov_base = self.header + self.ahead
            self.iov[0].iov_len = MULTIFD_HEADER_SIZE - self.ahead
            self.stream_status = self.stream.receive(self.iov, 1, &received)
            if self.ahead == 0 and (self.stream_status == STREAM_END or self.was_cut_off()):
                return RECV_END
            if self.stream_status != STREAM_OK:
                return RECV_STREAM
            self.stream.base += received
            self.ahead += received
        return RECV_OK

    cdef bint was_cut_off(self) noexcept nogil:
        """Whether TLS ended unannounced, as it does with QEMU before 10.0.

        Between two packets that is an end like any other: what is missing shows at the next sync point.
        """
        return (
            self.stream_status == STREAM_FAILED and self.stream.carrier is not None and self.stream.carrier.is_cut_off()
        )

    cdef int check_pages(self) noexcept nogil:
        """Check everything that a packet with pages says."""
        cdef uint64_t limit
        cdef uint32_t index
        if self.packet.flags & MULTIFD_FLAG_COMPRESSION_MASK != self.method:
            return RECV_BAD_METHOD
        self.block = self.landing.find_block(self.packet.name, self.packet.name_length)
        if self.block < 0:
            return RECV_BAD_BLOCK
        limit = self.landing.table[self.block].pages * TARGET_PAGE_SIZE
        for index in range(self.packet.normal_pages + self.packet.zero_pages):
            if self.packet.offset[index] >= limit or self.packet.offset[index] % TARGET_PAGE_SIZE:
                self.bad_page = index
                return RECV_BAD_OFFSET
        if self.decompressor is None:
            return RECV_OK
        if self.packet.data_size > MULTIFD_DATA_LIMIT or (self.packet.data_size == 0) != (self.packet.normal_pages == 0):
            return RECV_BAD_SIZE
        return RECV_OK

    cdef int load_pages(self) noexcept nogil:
        cdef uint32_t index, normal = self.packet.normal_pages
        cdef int status = RECV_OK
        self.offset += MULTIFD_HEADER_SIZE
        for index in range(normal, normal + self.packet.zero_pages):
            self.landing.clear_page(&self.landing.table[self.block], self.packet.offset[index] // TARGET_PAGE_SIZE)
        self.zero_pages += self.packet.zero_pages
        if normal == 0:
            return RECV_OK
        status = self.read_plain() if self.decompressor is None else self.read_compressed()
        for index in range(normal):
            self.landing.note_received(&self.landing.table[self.block], self.packet.offset[index] // TARGET_PAGE_SIZE)
        self.normal_pages += normal
        return status

    cdef int list_pages(self) noexcept nogil:
        """List where the normal pages of the packet go, neighbours in one entry; returns the number of entries."""
        cdef int count = 0
        cdef uint32_t index
        cdef uint8_t *page
        for index in range(self.packet.normal_pages):
            page = self.landing.table[self.block].host + self.packet.offset[index]
            if count and <uint8_t *> self.iov[count - 1].iov_base + self.iov[count - 1].iov_len == page:
                self.iov[count - 1].iov_len += TARGET_PAGE_SIZE
                continue
            self.iov[count].iov_base = page
            self.iov[count].iov_len = TARGET_PAGE_SIZE
            count += 1
        return count

    cdef int read_plain(self) noexcept nogil:
        cdef int count = self.list_pages()
        cdef size_t size = <size_t> self.packet.normal_pages * TARGET_PAGE_SIZE
        self.iov[count].iov_base = self.header
        self.iov[count].iov_len = MULTIFD_HEADER_SIZE
        self.offset += size
        return self.read_list(count + 1, size)

    cdef int read_compressed(self) noexcept nogil:
        cdef int count, index, status
        self.iov[0].iov_base = self.buffer
        self.iov[0].iov_len = self.packet.data_size
        self.iov[1].iov_base = self.header
        self.iov[1].iov_len = MULTIFD_HEADER_SIZE
        self.offset += self.packet.data_size
        status = self.read_list(2, self.packet.data_size)
        if status != RECV_OK:
            return status
        count = self.list_pages()
        self.decompressor.begin(self.buffer, self.packet.data_size)
        for index in range(count):
            self.codec_status = self.decompressor.fill(<uint8_t *> self.iov[index].iov_base, self.iov[index].iov_len)
            if self.codec_status != CODEC_OK:
                return RECV_BAD_DATA
        return RECV_OK if self.decompressor.is_used_up() else RECV_BAD_DATA

    # ---- the door ----

    def run(self):
        """Load packets until the stream or the load is over; see recv.pyi."""
        cdef int status
        with nogil:
            status = self.serve()
            if status == RECV_END:
                self.meeting.note_end()
        if status == RECV_END or status == RECV_OVER:
            return
        try:
            if status == RECV_STREAM:
                self.stream.raise_on(self.stream_status, f"a packet of multifd channel {self.channel_id}")
            raise self.refusal(status)
        except MigrationError as error:
            self.meeting.fail(error)

    cdef refusal(self, int status):
        place = f"multifd channel {self.channel_id}, packet at offset {self.offset:#x}"
        if status == RECV_BAD_HEADER:
            finding = describe_fault(self.packet_status, &self.packet)
        elif status == RECV_BAD_METHOD:
            found = METHODS.get(self.packet.flags & MULTIFD_FLAG_COMPRESSION_MASK, "unknown")
            finding = (
                f"compression {found} (flags {self.packet.flags:#x}) found, this side has {METHODS[self.method]}: "
                f"parameter 'multifd-compression' must be equal on both sides"
            )
        elif status == RECV_BAD_BLOCK:
            name = (<bytes> self.packet.name[:self.packet.name_length]).decode("ascii", "backslashreplace")
            known = ", ".join(f"'{block.idstr}'" for block in self.landing.blocks)
            finding = f"block {name!r} does not exist here, this machine has {known}"
        elif status == RECV_BAD_OFFSET:
            block = self.landing.blocks[self.block]
            finding = (
                f"offset {self.packet.offset[self.bad_page]:#x} of page {self.bad_page} in block '{block.idstr}', "
                f"expected a multiple of {TARGET_PAGE_SIZE:#x} below {block.used_length:#x}"
            )
        elif status == RECV_BAD_SIZE:
            finding = (
                f"{self.packet.data_size} bytes of compressed data for {self.packet.normal_pages} pages, "
                f"expected at most {MULTIFD_DATA_LIMIT}, and none without pages"
            )
        elif self.codec_status == CODEC_OK or self.codec_status == CODEC_SHORT:
            finding = (
                f"{self.packet.data_size} bytes of {METHODS[self.method]} data make "
                f"{'fewer' if self.codec_status == CODEC_SHORT else 'more'} than {self.packet.normal_pages} pages"
            )
        else:
            finding = f"{METHODS[self.method]} data that does not decompress: {self.decompressor.failure()}"
        return StreamError(f"{place}: {finding}")


METHODS = {0: "none", 2: "zlib", 4: "zstd", 8: "qpl", 16: "uadk", 32: "qatzip"}
