"""Batches of pages into packets, each channel in its own thread (multifd.md §3, §6, §12).

    Dispatch   the migration thread fills a batch with pages of one block and hands it to the channel with the shortest
               queue; a sync point is a batch without pages in every queue
    Sender     [batch] ─▶ which pages are zero? ─▶ [header][page][page]…  one writev      or [header][compressed pages]

Nobody waits at a sync point: it travels in the queues as in the streams, and the destination is who has to wait.
When all queues are full the migration thread sleeps until one is nearly empty, so that it wakes up once for several
packets and not for each of them.

Threads   `Sender.run` in the channel's thread, `mig/src/send_N`; Dispatch in the migration thread, `fail` and `close` from
          any.  No GIL while anything is sent or waited for.
Holds     (1) pages are read when they are sent, later than the migration thread has cleared their dirty bits
          (2) a failure of one channel ends the others, and wakes whoever waits for them
          (3) batches of one queue leave in their order
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy

from ..encode.compress cimport CODEC_OK
from ..encode.zero cimport LOOK_AHEAD, expect_look, is_zero
from ..errors import ChannelError, MigrationCancelled, MigrationError
from ..wire.format cimport (
    MULTIFD_DATA_LIMIT,
    MULTIFD_FLAG_SYNC,
    MULTIFD_HEADER_SIZE,
    MULTIFD_MAGIC,
    MULTIFD_PACKET_PAGES,
    MULTIFD_VERSION,
    TARGET_PAGE_SIZE,
)
from ..wire.stream cimport STREAM_OK
from .locks cimport (
    pthread_cond_broadcast,
    pthread_cond_destroy,
    pthread_cond_init,
    pthread_cond_signal,
    pthread_cond_wait,
    pthread_mutex_destroy,
    pthread_mutex_init,
    pthread_mutex_lock,
    pthread_mutex_unlock,
)
from .packet cimport fill_header

cdef enum SenderStatus:
    SEND_OK = 0
    SEND_STREAM = 1               # the stream has an error
    SEND_CODEC = 2                # the compressor has


cdef class Dispatch:
    """The queues of *count* channels; see send.pyi."""

    def __cinit__(self, int count, on_failure):
        cdef int index
        if not 1 <= count <= 255:
            raise ValueError(f"{count} multifd channels, expected 1 to 255")
        self.count = count
        self.on_failure = on_failure
        self.awaited = NOBODY_WAITS
        self.queues = <Queue *> calloc(count, sizeof(Queue))
        if self.queues == NULL:
            raise MemoryError("no memory for the queues of multifd channels")
        pthread_mutex_init(&self.mutex, NULL)
        pthread_cond_init(&self.room, NULL)
        for index in range(count):
            pthread_cond_init(&self.queues[index].work, NULL)

    def __dealloc__(self):
        cdef int index
        if self.queues == NULL:
            return
        for index in range(self.count):
            pthread_cond_destroy(&self.queues[index].work)
        pthread_cond_destroy(&self.room)
        pthread_mutex_destroy(&self.mutex)
        free(self.queues)

    # ---- for the migration thread ----

    cdef void choose_block(self, const uint8_t *host, const uint8_t *name, size_t length) noexcept nogil:
        """The pages that follow are of this block; the batch is empty."""
        self.filling.host = host
        self.filling.name = name
        self.filling.name_length = length

    cdef bint add_page(self, uint64_t offset, bint is_zero) noexcept nogil:
        """Add a page of the chosen block to the batch, which has room; True when it is full now."""
        if is_zero:
            self.filling.zero_pages += 1
            self.filling.offset[MULTIFD_PACKET_PAGES - self.filling.zero_pages] = offset
        else:
            self.filling.offset[self.filling.normal_pages] = offset
            self.filling.normal_pages += 1
        return self.filling.normal_pages + self.filling.zero_pages == MULTIFD_PACKET_PAGES

    cdef int shortest_queue(self) noexcept nogil:
        """The channel with the shortest queue, looked for from `next` on; the mutex is held."""
        cdef int step, index, best = self.next
        for step in range(self.count):
            index = (self.next + step) % self.count
            if self.queues[index].count < self.queues[best].count:
                best = index
        return best

    cdef void wait_for_room(self, int awaited) noexcept nogil:
        """Sleep until a queue may have come down to *awaited*; the mutex is held."""
        self.awaited = awaited
        pthread_cond_wait(&self.room, &self.mutex)
        self.awaited = NOBODY_WAITS

    cdef bint put_batch(self, int channel_id, const Batch *batch) noexcept nogil:
        """Put *batch* into the queue of a channel, −1: of any, after waiting for room; False when one has failed."""
        cdef Queue *queue
        cdef int chosen
        pthread_mutex_lock(&self.mutex)
        while True:
            if self.is_over:
                pthread_mutex_unlock(&self.mutex)
                return False
            chosen = channel_id if channel_id >= 0 else self.shortest_queue()
            queue = &self.queues[chosen]
            if queue.count < QUEUE_DEPTH:
                break
            self.wait_for_room(QUEUE_LOW)
        queue.batches[(queue.first + queue.count) % QUEUE_DEPTH] = batch[0]
        queue.count += 1
        self.next = (chosen + 1) % self.count
        pthread_cond_signal(&queue.work)
        pthread_mutex_unlock(&self.mutex)
        return True

    cdef bint hand_over(self) noexcept nogil:
        """Give the batch, if there is anything in it, to a channel; False when one has failed."""
        cdef uint32_t pages = self.filling.normal_pages + self.filling.zero_pages
        if pages == 0:
            return True
        if not self.put_batch(-1, &self.filling):
            return False
        self.queued_pages += pages
        self.filling.normal_pages = self.filling.zero_pages = 0
        return True

    cdef bint put_sync(self) noexcept nogil:
        """A sync point behind everything so far, on every channel; False when one has failed."""
        cdef Batch sync
        cdef int index
        if not self.hand_over():
            return False
        sync.is_sync = True
        sync.normal_pages = sync.zero_pages = 0
        for index in range(self.count):
            if not self.put_batch(index, &sync):
                return False
        return True

    cdef bint wait_sent(self) noexcept nogil:
        """Wait until the kernel has taken everything; False when a channel has failed."""
        cdef int index = 0
        cdef bint is_well
        if not self.hand_over():
            return False
        pthread_mutex_lock(&self.mutex)
        while index < self.count and not self.is_over:
            if self.queues[index].count:
                self.wait_for_room(0)
            else:
                index += 1
        is_well = not self.is_over
        pthread_mutex_unlock(&self.mutex)
        return is_well

    def sync(self):
        """A sync point on every channel; see send.pyi."""
        cdef bint is_well
        with nogil:
            is_well = self.put_sync()
        if not is_well:
            self.raise_failure()

    def drain(self):
        """Wait until everything has left; see send.pyi."""
        cdef bint is_well
        with nogil:
            is_well = self.wait_sent()
        if not is_well:
            self.raise_failure()

    def raise_failure(self):
        """Raise what the first channel failed of; see send.pyi."""
        raise self.error if self.error is not None else MigrationCancelled("the migration was cancelled")

    # ---- for the channels ----

    cdef Batch *next_batch(self, int channel_id) noexcept nogil:
        """The batch to send now, after waiting for one; NULL at the end.  It stays where it is until `batch_done`."""
        cdef Queue *queue = &self.queues[channel_id]
        cdef Batch *batch = NULL
        pthread_mutex_lock(&self.mutex)
        while queue.count == 0 and not self.is_over:
            pthread_cond_wait(&queue.work, &self.mutex)
        if not self.is_over:
            batch = &queue.batches[queue.first]
        pthread_mutex_unlock(&self.mutex)
        return batch

    cdef void batch_done(self, int channel_id) noexcept nogil:
        cdef Queue *queue = &self.queues[channel_id]
        pthread_mutex_lock(&self.mutex)
        queue.first = (queue.first + 1) % QUEUE_DEPTH
        queue.count -= 1
        if queue.count <= self.awaited:
            pthread_cond_signal(&self.room)
        pthread_mutex_unlock(&self.mutex)

    cdef uint64_t number_packet(self) noexcept nogil:
        cdef uint64_t number
        pthread_mutex_lock(&self.mutex)
        number = self.packets
        self.packets += 1
        pthread_mutex_unlock(&self.mutex)
        return number

    # ---- for both ----

    def fail(self, error):
        """A channel failed: whoever waits is woken; see send.pyi."""
        with nogil:
            pthread_mutex_lock(&self.mutex)
        is_first = not self.is_over
        if is_first:
            self.error = error
        self.end()
        pthread_mutex_unlock(&self.mutex)
        if is_first:
            self.on_failure()

    def close(self):
        """The channels end; what is queued is dropped; see send.pyi."""
        with nogil:
            pthread_mutex_lock(&self.mutex)
        self.end()
        pthread_mutex_unlock(&self.mutex)

    cdef void end(self) noexcept nogil:
        """Let everybody go; the mutex is held."""
        cdef int index
        self.is_over = True
        for index in range(self.count):
            pthread_cond_broadcast(&self.queues[index].work)
        pthread_cond_broadcast(&self.room)


cdef class Sender:
    """Sends the batches of one channel; see send.pyi."""

    def __cinit__(self, int channel_id, OutputStream out not None, Dispatch dispatch not None, *, bint detects_zero):
        if not 0 <= channel_id < dispatch.count:
            raise ValueError(f"channel {channel_id} of {dispatch.count}")
        self.channel_id = channel_id
        self.out = out
        self.dispatch = dispatch
        self.detects_zero = detects_zero
        self.packet.magic = MULTIFD_MAGIC
        self.packet.version = MULTIFD_VERSION

    def __dealloc__(self):
        free(self.buffer)

    def compress_with(self, uint32_t method, Compressor compressor not None):
        """Send packets of compression *method*; see send.pyi."""
        self.buffer = <uint8_t *> malloc(MULTIFD_DATA_LIMIT)
        if self.buffer == NULL:
            raise MemoryError("no memory for the data of a packet")
        self.method = method
        self.compressor = compressor

    def send_uncopied_by(self, ZeroCopy zero_copy not None):
        """Let the network take pages from where they lie; see send.pyi."""
        self.zero_copy = zero_copy

    def send_references_by(self, Splice splice not None):
        """Let the kernel hand pages on by reference; see send.pyi."""
        self.splice = splice

    @property
    def missed_zero_copy(self) -> int:
        """Sync points before which everything was copied all the same; see send.pyi."""
        return self.zero_copy.missed if self.zero_copy is not None else 0

    # ---- the engine ----

    cdef int serve(self) noexcept nogil:
        cdef Batch *batch
        cdef int status
        while True:
            batch = self.dispatch.next_batch(self.channel_id)
            if batch == NULL:
                return SEND_OK
            status = self.send_batch(batch)
            if status != SEND_OK:
                return status
            self.dispatch.batch_done(self.channel_id)

    cdef int send_batch(self, const Batch *batch) noexcept nogil:
        cdef int status = SEND_OK
        self.packet.number = self.dispatch.number_packet()
        self.packet.data_size = 0
        if batch.is_sync:
            self.packet.flags = MULTIFD_FLAG_SYNC
            self.packet.slots = self.packet.normal_pages = self.packet.zero_pages = 0
            self.packet.name_length = 0
        else:
            self.packet.flags = self.method
            self.packet.slots = MULTIFD_PACKET_PAGES
            self.packet.name_length = batch.name_length
            memcpy(self.packet.name, batch.name, batch.name_length)
            self.sort_pages(batch)
        if self.packet.normal_pages:
            if self.compressor is not None:
                status = self.compress_pages(batch)
                if status != SEND_OK:
                    return status
            else:
                self.packet.data_size = self.packet.normal_pages * TARGET_PAGE_SIZE
        fill_header(self.header, &self.packet)
        self.stream_status = self.send_packet(batch)
        self.normal_pages += self.packet.normal_pages
        self.zero_pages += self.packet.zero_pages
        return SEND_OK if self.stream_status == STREAM_OK else SEND_STREAM

    cdef int send_packet(self, const Batch *batch) noexcept nogil:
        """Send the header and what belongs to it; a sync point waits until the network has done with all pages."""
        cdef int status
        if self.splice is not None and self.packet.normal_pages:
            return self.send_references(batch)
        status = self.out.put_reference(self.header, MULTIFD_HEADER_SIZE)
        if status == STREAM_OK and self.packet.normal_pages and self.zero_copy is None:
            status = self.put_pages(batch)
        if status == STREAM_OK:
            status = self.out.flush_pending()
        if status != STREAM_OK or self.zero_copy is None:
            return status
        return self.zero_copy.flush() if batch.is_sync else self.send_uncopied(batch)

    cdef int send_uncopied(self, const Batch *batch) noexcept nogil:
        """Send the data of the packet, whose header has left, from where it lies."""
        self.out.offset += self.packet.data_size
        return self.zero_copy.send(self.pages, self.list_pages(batch))

    cdef int send_references(self, const Batch *batch) noexcept nogil:
        """Send the packet; its data by reference."""
        return self.splice.send(self.header, MULTIFD_HEADER_SIZE, self.pages, self.list_pages(batch))

    cdef int list_pages(self, const Batch *batch) noexcept nogil:
        """List where the normal pages of the packet lie, neighbours in one entry; returns the number of entries."""
        cdef uint32_t index
        cdef int count = 0
        cdef const uint8_t *page
        for index in range(self.packet.normal_pages):
            page = batch.host + self.packet.offset[index]
            if count and <const uint8_t *> self.pages[count - 1].iov_base + self.pages[count - 1].iov_len == page:
                self.pages[count - 1].iov_len += TARGET_PAGE_SIZE
                continue
            self.pages[count].iov_base = <void *> page
            self.pages[count].iov_len = TARGET_PAGE_SIZE
            count += 1
        return count

    cdef void sort_pages(self, const Batch *batch) noexcept nogil:
        """The offsets of the batch into the packet: normal pages first, zero pages behind them."""
        cdef uint32_t index, normal = 0, zero = 0
        cdef uint64_t zeroes[MULTIFD_PACKET_PAGES]
        for index in range(batch.normal_pages):
            if self.detects_zero and index + LOOK_AHEAD < batch.normal_pages:
                expect_look(batch.host + batch.offset[index + LOOK_AHEAD])
            if self.detects_zero and is_zero(batch.host + batch.offset[index], TARGET_PAGE_SIZE):
                zeroes[zero] = batch.offset[index]
                zero += 1
            else:
                self.packet.offset[normal] = batch.offset[index]
                normal += 1
        memcpy(&self.packet.offset[normal], zeroes, zero * sizeof(uint64_t))
        for index in range(batch.zero_pages):
            self.packet.offset[normal + zero] = batch.offset[MULTIFD_PACKET_PAGES - 1 - index]
            zero += 1
        self.packet.normal_pages = normal
        self.packet.zero_pages = zero

    cdef int put_pages(self, const Batch *batch) noexcept nogil:
        """List the data of the packet behind its header."""
        cdef uint32_t index
        cdef int status = STREAM_OK
        if self.compressor is not None:
            return self.out.put_reference(self.buffer, self.packet.data_size)
        for index in range(self.packet.normal_pages):
            status = self.out.put_reference(batch.host + self.packet.offset[index], TARGET_PAGE_SIZE)
            if status != STREAM_OK:
                break
        return status

    cdef int compress_pages(self, const Batch *batch) noexcept nogil:
        """The pages of the packet into the buffer, neighbours at once."""
        cdef uint32_t first = 0, end, count = self.packet.normal_pages
        self.compressor.begin(self.buffer, MULTIFD_DATA_LIMIT)
        while first < count:
            end = first + 1
            while end < count and self.packet.offset[end] == self.packet.offset[end - 1] + TARGET_PAGE_SIZE:
                end += 1
            self.codec_status = self.compressor.feed(
                batch.host + self.packet.offset[first], (end - first) * TARGET_PAGE_SIZE, end == count
            )
            if self.codec_status != CODEC_OK:
                return SEND_CODEC
            first = end
        self.packet.data_size = <uint32_t> self.compressor.produced
        return SEND_OK

    # ---- the door ----

    def run(self):
        """Send batches until there will be no more; see send.pyi."""
        cdef int status
        with nogil:
            status = self.serve()
        if status == SEND_OK:
            return
        try:
            if status == SEND_CODEC:
                raise ChannelError(
                    f"multifd channel {self.channel_id}: a packet cannot be compressed: {self.compressor.failure()}",
                    channel=self.out.channel.name,
                )
            if self.zero_copy is not None and self.zero_copy.error:
                self.zero_copy.raise_on(self.stream_status)
            self.out.raise_on(self.stream_status)
        except MigrationError as error:
            self.dispatch.fail(error)
