"""The pipe through which one channel of multifd gives pages to the network."""

from libc.stdint cimport uint8_t

from ..wire.stream cimport OutputStream, iovec


cdef class Splice:
    cdef OutputStream out             # of the same channel: counts the bytes, keeps the first error
    cdef bint is_open                 # the pipe, whose two ends these are
    cdef int pipe_in
    cdef int pipe_out
    cdef size_t inside                # bytes in the pipe

    cdef int send(self, const uint8_t *header, size_t length, iovec *iov, int count) noexcept nogil
    cdef int put_header(self, const uint8_t *header, size_t length) noexcept nogil
    cdef int put_pages(self, iovec **iov, int *count) noexcept nogil
    cdef int empty_pipe(self, bint more) noexcept nogil
    cdef int fail(self, int error) noexcept nogil
