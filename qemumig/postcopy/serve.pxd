"""PageServer for compiled rooms: page requests without the GIL."""

from libc.stdint cimport uint8_t, uint64_t

from ..ram.bitmap cimport Bitmap
from ..ram.dirty cimport DirtyPages
from ..ram.search cimport Walk
from ..wire.stream cimport OutputStream
from .mutex cimport pthread_mutex_t
from .uffd cimport Userfaultfd

cdef enum:
    RELEASE_LIMIT = 256           # host pages sent and not yet released

cdef enum RequestStatus:
    REQUEST_TAKEN = 0
    REQUEST_OTHER = 1             # another message waits, or the end of the stream
    REQUEST_STREAM = 2            # the return path failed
    REQUEST_NO_BLOCK = 3          # a short request before any that names a block
    REQUEST_BAD_NAME = 4
    REQUEST_BAD_RANGE = 5
    REQUEST_SEND = 6              # the channel of urgent pages failed

cdef struct HostPage:
    int block
    uint64_t page                 # its first target page

cdef struct ServedBlock:
    uint64_t *queued              # one bit a target page, that of the first of a host page: it waits in the queue
    uint64_t count                # target pages of a host page
    bint shared                   # another process may see what is given back
    size_t name_length
    const uint8_t *name           # counted string


cdef class Lane:
    cdef readonly OutputStream out
    cdef bint names_all               # every record names its block
    cdef int last_block               # of the previous record; −1: none yet
    cdef HostPage sent[RELEASE_LIMIT] # since the last flush
    cdef int sent_count


cdef class PageServer:
    cdef readonly DirtyPages dirty
    cdef readonly Lane main
    cdef readonly Lane urgent         # of the preempt channel; None: urgent pages go where all others go
    cdef Userfaultfd frozen           # what has left is unprotected there; None: nothing is protected
    cdef bint releases                # what was sent is given back to the kernel
    cdef ServedBlock *blocks
    cdef list names
    cdef list queued
    cdef list discarded               # Bitmap of each block: what the destination was told to discard; empty: nothing yet
    cdef list clean                   # Bitmap of each block: what was dirty at the switch
    cdef readonly int wake_fd         # an eventfd: readable while requests wait
    cdef pthread_mutex_t lock
    cdef HostPage *ring               # under the lock: requests, first come first served
    cdef uint64_t ring_size, ring_first, ring_count
    cdef HostPage jump                # under the lock: the last urgent page, block −1 for none: the walk goes on behind it
    cdef Walk walk                    # the migration thread's
    cdef int stream_status            # of the main channel
    cdef pthread_mutex_t urgent_lock  # of the urgent lane: the return path's thread and the migration thread send there
    cdef int urgent_status
    cdef readonly uint64_t requests   # messages
    cdef readonly uint64_t zero_pages
    cdef readonly uint64_t normal_pages

    cdef bint claim(self, int block, uint64_t page) noexcept nogil
    cdef bint take_request(self, HostPage *found) noexcept nogil
    cdef bint enqueue(self, int block, uint64_t page) noexcept nogil
    cdef int request(self, int block, uint64_t start, uint64_t length) noexcept nogil
    cdef queue_first(self, list places)
    cdef void begin_urgent(self) noexcept nogil
    cdef int send_urgent(self, int block, uint64_t page) noexcept nogil
    cdef int end_urgent(self, int status) noexcept nogil
    cdef int send_host_page(self, Lane lane, int block, uint64_t page) noexcept nogil
    cdef int flush(self, Lane lane) noexcept nogil
    cdef void release(self, Lane lane) noexcept nogil
    cdef int take_write_faults(self) noexcept nogil
    cdef int find_address(self, uint64_t address) noexcept nogil
    cdef void count(self, uint64_t zeroes, uint64_t normals) noexcept nogil
    cdef int serve_some(self, uint64_t byte_limit, uint64_t page_limit) noexcept nogil
    cdef Bitmap not_discarded(self, int block)
    cdef int put_discard(self, int block, const uint64_t *news) noexcept nogil
