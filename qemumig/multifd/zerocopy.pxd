"""What the network has of guest memory and has not given back; for the senders of multifd."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from ..wire.stream cimport iovec

cdef extern from "<linux/errqueue.h>" nogil:
    cdef struct sock_extended_err:    # a note about some calls
        uint8_t ee_origin
        uint8_t ee_code
        uint32_t ee_info              # the first of them …
        uint32_t ee_data              # … and the last


cdef class ZeroCopy:
    cdef object channel               # keeps the descriptor open
    cdef int fd
    cdef int quit_fd
    cdef uint64_t sent                # calls that the kernel has taken; each is answered once
    cdef uint64_t completed           # of those, the ones that were answered
    cdef uint64_t copied              # of those, the ones that the kernel has copied all the same
    cdef uint64_t flushed             # `sent` at the last flush …
    cdef uint64_t copied_then         # … and `copied`
    cdef readonly uint64_t missed     # flushes in which everything had been copied
    cdef int error                    # errno; 0 while all is well

    cdef int send(self, iovec *iov, int count) noexcept nogil
    cdef int flush(self) noexcept nogil
    cdef int collect(self) noexcept nogil
    cdef int wait_completion(self) noexcept nogil
    cdef int make_room(self, int reason) noexcept nogil
    cdef void count(self, const sock_extended_err *note) noexcept nogil
    cdef int fail(self, int error) noexcept nogil
    cdef str failure(self)
    cdef int raise_on(self, int status) except -1
