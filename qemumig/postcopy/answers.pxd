"""Answers for compiled rooms: page requests without the GIL."""

from libc.stdint cimport uint8_t, uint64_t

from ..wire.stream cimport OutputStream
from .mutex cimport pthread_mutex_t

cdef enum AnswerStatus:
    ANSWER_SENT = 0
    ANSWER_LOST = 1               # there is no connection, or it has just failed


cdef class Answers:
    cdef pthread_mutex_t lock
    cdef OutputStream out             # under the lock; None while there is no connection
    cdef bint connected               # under the lock
    cdef int last_block               # under the lock; of the last page request; −1: the next one names its block
    cdef readonly uint64_t requests   # page requests sent

    cdef int request(self, int block, const uint8_t *name, size_t name_length, uint64_t start, uint64_t length) noexcept nogil
