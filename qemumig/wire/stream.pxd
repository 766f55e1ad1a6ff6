"""Byte streams for compiled rooms: the engines work on these objects without the GIL."""

cimport cython
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from "<sys/uio.h>" nogil:
    cdef struct iovec:
        void *iov_base
        size_t iov_len

cdef enum StreamStatus:
    STREAM_OK = 0
    STREAM_END = 1                # the peer closed its side
    STREAM_FAILED = 2             # errno is in .error
    STREAM_CANCELLED = 3          # the channel was told to quit

cdef enum:
    IOV_LIMIT = 1024              # entries of one writev or readv (IOV_MAX)


@cython.overflowcheck(False)
cdef inline uint16_t get_be16(const uint8_t *p) noexcept nogil:
    return (<uint16_t> p[0] << 8) | p[1]


@cython.overflowcheck(False)
cdef inline uint32_t get_be32(const uint8_t *p) noexcept nogil:
    return (<uint32_t> p[0] << 24) | (<uint32_t> p[1] << 16) | (<uint32_t> p[2] << 8) | p[3]


@cython.overflowcheck(False)
cdef inline uint64_t get_be64(const uint8_t *p) noexcept nogil:
    return (<uint64_t> get_be32(p) << 32) | get_be32(p + 4)


@cython.overflowcheck(False)
cdef inline void put_be32(uint8_t *p, uint32_t value) noexcept nogil:
    cdef int i
    for i in range(4):
        p[i] = <uint8_t> (value >> (24 - 8 * i))


@cython.overflowcheck(False)
cdef inline void put_be16(uint8_t *p, uint16_t value) noexcept nogil:
    p[0] = <uint8_t> (value >> 8)
    p[1] = <uint8_t> value


@cython.overflowcheck(False)
cdef inline void put_be64(uint8_t *p, uint64_t value) noexcept nogil:
    cdef int i
    for i in range(8):
        p[i] = <uint8_t> (value >> (56 - 8 * i))


cdef int wait_for(int fd, short events, int quit_fd) noexcept nogil


cdef class Carrier:
    cdef int send(self, const iovec *iov, int count, size_t *sent) noexcept nogil
    cdef int receive(self, const iovec *iov, int count, size_t *received) noexcept nogil
    cdef bint is_cut_off(self) noexcept nogil
    cdef str failure(self)


cdef class OutputStream:
    cdef readonly object channel      # keeps the descriptors open
    cdef Carrier carrier              # None: the descriptors take the bytes as they are
    cdef int fd
    cdef int quit_fd
    cdef int error                    # errno of the first failed write; 0 while all is well
    cdef uint8_t *buffer              # small pieces are gathered here …
    cdef size_t used
    cdef size_t capacity
    cdef iovec iov[IOV_LIMIT]         # … and listed here, between pages that are only referred to
    cdef int iov_count
    cdef size_t pending               # bytes that the list stands for
    cdef readonly uint64_t offset     # bytes put so far, the pending ones included

    cdef int put(self, const void *data, size_t length) noexcept nogil
    cdef int put_reference(self, const void *data, size_t length) noexcept nogil
    cdef int flush_pending(self) noexcept nogil
    cdef int append(self, const void *data, size_t length) noexcept nogil
    cdef int send(self, const iovec *iov, int count, size_t *sent) noexcept nogil
    cdef str reason(self)
    cdef int raise_on(self, int status) except -1


cdef class InputStream:
    cdef readonly object channel
    cdef Carrier carrier
    cdef int fd
    cdef int quit_fd
    cdef int error
    cdef int eager_reads              # tries before going to sleep
    cdef uint8_t *buffer
    cdef size_t capacity
    cdef size_t position              # next byte to consume
    cdef size_t end                   # one past the last byte that is there
    cdef uint64_t base                # offset in the stream of buffer[0]

    cdef int receive(self, iovec *iov, int count, size_t *received) noexcept nogil
    cdef int ensure(self, size_t length) noexcept nogil
    cdef int read_into(self, void *target, size_t length) noexcept nogil
    cdef str reason(self)
    cdef int raise_on(self, int status, str what) except -1
