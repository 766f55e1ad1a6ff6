"""Answers: the destination's words on the return path, which several threads write (stream.md §10).

    REQ_PAGES_ID   be16 3  be16 13 + n  be64 start  be32 length  u8 n, name      names the block …
    REQ_PAGES      be16 4  be16 12      be64 start  be32 length                  … that this one means as well

A message is written in one piece, under a lock that is never held together with the GIL.  When the connection fails,
page requests are dropped, not raised: who asked remembers them, and asks again on the next connection.

Threads   any.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

from ..wire.format cimport MIG_RP_MSG_REQ_PAGES, MIG_RP_MSG_REQ_PAGES_ID
from ..wire.stream cimport STREAM_OK, OutputStream, put_be32, put_be64
from .mutex cimport pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock

from ..errors import ChannelError

cdef enum:
    HEAD = 4
    RANGE = 12


cdef void put_be16(uint8_t *p, unsigned int value) noexcept nogil:
    p[0] = <uint8_t> (value >> 8)
    p[1] = <uint8_t> (value & 0xFF)


cdef class Answers:
    """Messages towards *channel*; see answers.pyi."""

    def __cinit__(self, channel=None):
        pthread_mutex_init(&self.lock, NULL)
        self.last_block = -1
        if channel is not None:
            self.attach(channel)

    def __dealloc__(self):
        pthread_mutex_destroy(&self.lock)

    @property
    def is_open(self) -> bool:
        """Whether there is a connection to write to."""
        return self.connected

    def attach(self, channel) -> None:
        """Write to *channel* from now on."""
        cdef OutputStream out = OutputStream(channel)
        with nogil:
            pthread_mutex_lock(&self.lock)
        self.out = out
        self.connected = True
        self.last_block = -1
        pthread_mutex_unlock(&self.lock)

    def detach(self) -> None:
        """Write nowhere; whoever is in the middle of a write has been woken by the end of the channel."""
        with nogil:
            pthread_mutex_lock(&self.lock)
        self.out = None
        self.connected = False
        pthread_mutex_unlock(&self.lock)

    def send(self, const uint8_t[::1] message not None) -> None:
        """Write one message, or several; ChannelError when that is not possible."""
        cdef OutputStream out
        cdef size_t done = 0, part, length = message.shape[0]
        cdef int status = STREAM_OK
        with nogil:
            pthread_mutex_lock(&self.lock)
        out = self.out
        if out is not None:
            with nogil:
                while status == STREAM_OK and done < length:
                    part = min(length - done, out.capacity)
                    status = out.put(&message[done], part)
                    done += part
                if status == STREAM_OK:
                    status = out.flush_pending()
        pthread_mutex_unlock(&self.lock)
        if out is None:
            raise ChannelError("there is no return path: the connection is lost")
        out.raise_on(status)

    cdef int request(self, int block, const uint8_t *name, size_t name_length, uint64_t start, uint64_t length) noexcept nogil:
        """Ask for a range of a block."""
        cdef uint8_t message[HEAD + RANGE + 256]
        cdef size_t size = HEAD + RANGE
        cdef int status
        pthread_mutex_lock(&self.lock)
        if not self.connected:
            pthread_mutex_unlock(&self.lock)
            return ANSWER_LOST
        put_be64(message + HEAD, start)
        put_be32(message + HEAD + 8, <uint32_t> length)
        if block == self.last_block:
            put_be16(message, MIG_RP_MSG_REQ_PAGES)
        else:
            put_be16(message, MIG_RP_MSG_REQ_PAGES_ID)
            message[size] = <uint8_t> name_length
            memcpy(message + size + 1, name, name_length)
            size += 1 + name_length
        put_be16(message + 2, <unsigned int> (size - HEAD))
        self.last_block = block
        status = self.out.put(message, size)
        if status == STREAM_OK:
            status = self.out.flush_pending()
        if status == STREAM_OK:
            self.requests += 1
        else:
            self.connected = False
        pthread_mutex_unlock(&self.lock)
        return ANSWER_SENT if status == STREAM_OK else ANSWER_LOST
