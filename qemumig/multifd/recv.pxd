"""Receivers of multifd for compiled rooms."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from ..encode.compress cimport Decompressor
from ..ram.landing cimport Landing
from ..wire.format cimport MULTIFD_HEADER_SIZE, MULTIFD_PACKET_PAGES
from ..wire.stream cimport InputStream, iovec
from .locks cimport pthread_cond_t, pthread_mutex_t
from .packet cimport Packet


cdef class Meeting:
    cdef readonly int count           # channels
    cdef pthread_mutex_t mutex
    cdef pthread_cond_t released
    cdef int report_fd                # an eventfd: something happened that the main loader may wait for
    # under the mutex
    cdef int waiting                  # channels that have loaded a SYNC
    cdef int ended                    # channels whose stream is over
    cdef uint64_t epoch               # how often all were released
    cdef uint8_t loading[256]         # per channel: it has loaded pages since the last sync point of all
    cdef bint is_over                 # the load is complete, or given up
    cdef readonly object error        # the first failure, or None
    cdef object on_failure

    cdef bint may_load(self, int channel_id) noexcept nogil
    cdef bint wait_release(self) noexcept nogil
    cdef void note_end(self) noexcept nogil
    cdef void report(self) noexcept nogil
    cdef int count_ready(self, bint *is_impossible) noexcept nogil


cdef class Receiver:
    cdef readonly int channel_id
    cdef readonly InputStream stream
    cdef Meeting meeting
    cdef Landing landing
    cdef Decompressor decompressor    # None: pages come as they are
    cdef uint32_t method              # the compression flag that packets with pages must have
    cdef uint8_t header[MULTIFD_HEADER_SIZE]
    cdef size_t ahead                 # bytes of the next header that are there already
    cdef Packet packet
    cdef int block                    # of the packet
    cdef uint32_t bad_page            # index of the offset that was refused
    cdef uint8_t *buffer              # compressed data of one packet
    cdef iovec iov[MULTIFD_PACKET_PAGES + 1]
    cdef uint64_t offset              # bytes of the stream before the header at hand
    cdef int packet_status
    cdef int stream_status
    cdef int codec_status
    cdef readonly uint64_t normal_pages
    cdef readonly uint64_t zero_pages

    cdef int serve(self) noexcept nogil
    cdef int read_list(self, int count, size_t wanted) noexcept nogil
    cdef int read_header(self) noexcept nogil
    cdef bint was_cut_off(self) noexcept nogil
    cdef int check_pages(self) noexcept nogil
    cdef int load_pages(self) noexcept nogil
    cdef int read_plain(self) noexcept nogil
    cdef int read_compressed(self) noexcept nogil
    cdef int list_pages(self) noexcept nogil
    cdef refusal(self, int status)
