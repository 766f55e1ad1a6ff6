"""Senders of multifd for compiled rooms: batches of pages, and the channels that take them."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from ..encode.compress cimport Compressor
from ..wire.format cimport MULTIFD_HEADER_SIZE, MULTIFD_PACKET_PAGES
from ..wire.stream cimport OutputStream, iovec
from .locks cimport pthread_cond_t, pthread_mutex_t
from .packet cimport Packet
from .splice cimport Splice
from .zerocopy cimport ZeroCopy

cdef enum:
    QUEUE_DEPTH = 8               # batches of one channel: one under way, the rest ready
    QUEUE_LOW = 3                 # enough to go on with while whoever fills the queue wakes up
    NOBODY_WAITS = -1

cdef struct Batch:                # pages of one block, on their way to some channel
    const uint8_t *host           # address of the block's page 0
    const uint8_t *name           # of the block; kept alive by whoever fills the batch
    size_t name_length
    uint32_t normal_pages         # offsets at the front: pages to send
    uint32_t zero_pages           # offsets at the back: pages known to be zero
    bint is_sync                  # no pages: a sync point
    uint64_t offset[MULTIFD_PACKET_PAGES]

cdef struct Queue:
    Batch batches[QUEUE_DEPTH]    # a ring; the first one may be under way
    int first
    int count
    pthread_cond_t work           # for its channel: there is a batch, or an end


cdef class Dispatch:
    cdef readonly int count           # channels
    cdef Queue *queues                # one a channel
    cdef Batch filling                # the migration thread's
    cdef int next                     # channel to look at first for room
    cdef pthread_mutex_t mutex
    cdef pthread_cond_t room          # for the migration thread: some queue has come down to `awaited`
    cdef readonly uint64_t queued_pages   # handed over so far
    # under the mutex
    cdef int awaited                  # length of a queue that the migration thread waits for, or NOBODY_WAITS
    cdef uint64_t packets             # numbered so far
    cdef bint is_over
    cdef readonly object error        # the first failure, or None
    cdef object on_failure

    cdef bint add_page(self, uint64_t offset, bint is_zero) noexcept nogil
    cdef void choose_block(self, const uint8_t *host, const uint8_t *name, size_t length) noexcept nogil
    cdef bint hand_over(self) noexcept nogil
    cdef bint put_sync(self) noexcept nogil
    cdef bint wait_sent(self) noexcept nogil
    cdef void wait_for_room(self, int awaited) noexcept nogil
    cdef bint put_batch(self, int channel_id, const Batch *batch) noexcept nogil
    cdef int shortest_queue(self) noexcept nogil
    cdef Batch *next_batch(self, int channel_id) noexcept nogil
    cdef void batch_done(self, int channel_id) noexcept nogil
    cdef uint64_t number_packet(self) noexcept nogil
    cdef void end(self) noexcept nogil


cdef class Sender:
    cdef readonly int channel_id
    cdef readonly OutputStream out
    cdef Dispatch dispatch
    cdef bint detects_zero            # look for zero pages here
    cdef Compressor compressor        # None: pages leave as they are
    cdef uint32_t method              # the flag of its packets
    cdef uint8_t *buffer              # compressed data of one packet
    cdef ZeroCopy zero_copy           # at most one of these two; neither: the kernel copies pages
    cdef Splice splice
    cdef iovec pages[MULTIFD_PACKET_PAGES]    # of one packet, for those
    cdef Packet packet
    cdef uint8_t header[MULTIFD_HEADER_SIZE]
    cdef readonly uint64_t normal_pages
    cdef readonly uint64_t zero_pages
    cdef int stream_status
    cdef int codec_status

    cdef int serve(self) noexcept nogil
    cdef int send_batch(self, const Batch *batch) noexcept nogil
    cdef void sort_pages(self, const Batch *batch) noexcept nogil
    cdef int send_packet(self, const Batch *batch) noexcept nogil
    cdef int send_uncopied(self, const Batch *batch) noexcept nogil
    cdef int send_references(self, const Batch *batch) noexcept nogil
    cdef int list_pages(self, const Batch *batch) noexcept nogil
    cdef int put_pages(self, const Batch *batch) noexcept nogil
    cdef int compress_pages(self, const Batch *batch) noexcept nogil
