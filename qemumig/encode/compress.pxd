"""Streams of compressed data for compiled rooms: one compressor or decompressor a channel."""

from libc.stdint cimport uint8_t

cdef enum CodecStatus:
    CODEC_OK = 0
    CODEC_FULL = 1                # the target has no room for what came out
    CODEC_SHORT = 2               # the source ended before the target was full
    CODEC_FAILED = 3              # the library refuses the data


cdef class Compressor:
    cdef uint8_t *target          # where the packet at hand goes …
    cdef size_t capacity
    cdef size_t produced          # … and how much of it there is

    cdef void begin(self, uint8_t *target, size_t capacity) noexcept nogil
    cdef int feed(self, const uint8_t *data, size_t length, bint last) noexcept nogil
    cdef str failure(self)


cdef class Decompressor:
    cdef const uint8_t *source    # the packet at hand …
    cdef size_t length
    cdef size_t consumed          # … and how much of it is used up

    cdef void begin(self, const uint8_t *source, size_t length) noexcept nogil
    cdef int fill(self, uint8_t *target, size_t length) noexcept nogil
    cdef bint is_used_up(self) noexcept nogil
    cdef str failure(self)
