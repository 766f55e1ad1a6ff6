"""The pipe through which one channel of multifd gives pages to the network."""

from libc.stdint cimport uint8_t

from ..wire.stream cimport iovec


cdef class Splice:
    cdef object channel               # keeps the descriptor open
    cdef int fd
    cdef int quit_fd
    cdef int pipe_in                  # the pipe's two ends; −1: closed
    cdef int pipe_out
    cdef size_t inside                # bytes in the pipe
    cdef int error                    # errno; 0 while all is well

    cdef int send(self, const uint8_t *header, size_t length, iovec *iov, int count) noexcept nogil
    cdef int put_header(self, const uint8_t *header, size_t length) noexcept nogil
    cdef int put_pages(self, iovec **iov, int *count) noexcept nogil
    cdef int empty_pipe(self, bint more) noexcept nogil
    cdef int fail(self, int error) noexcept nogil
    cdef int raise_on(self, int status) except -1
