"""RequestReader: page requests as they come off one return path (postcopy.md §1, §2).

    REQ_PAGES_ID   a range of the block that it names
    REQ_PAGES      a range of the block of the request before, on the same connection

Whatever else comes is left for who reads the other messages.

Threads   `mig/src/return`; no GIL from one request to the next.
Holds     (1) no byte of a peer is used as a length, a name or a range before it was checked
"""

from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memcmp

from ..wire.format cimport MIG_RP_MSG_REQ_PAGES, MIG_RP_MSG_REQ_PAGES_ID
from ..wire.stream cimport STREAM_FAILED, STREAM_OK, InputStream, get_be16, get_be32, get_be64
from .serve cimport (
    REQUEST_BAD_NAME,
    REQUEST_NO_BLOCK,
    REQUEST_OTHER,
    REQUEST_SEND,
    REQUEST_STREAM,
    REQUEST_TAKEN,
    PageServer,
)

from ..errors import StreamError

cdef enum:
    MESSAGE_HEAD = 4
    RANGE = 12


cdef class RequestReader:
    """Takes the requests on *stream* to *server*; see requests.pyi."""

    cdef readonly PageServer server
    cdef readonly InputStream stream
    cdef int block                    # of the request at hand, and then of the one before; −1: none
    cdef uint64_t start, length       # of the request at hand
    cdef int stream_status

    def __cinit__(self, PageServer server not None, InputStream stream not None):
        self.server = server
        self.stream = stream
        self.block = -1

    # ---- the engine ----

    cdef int need(self, size_t length) noexcept nogil:
        """Have *length* bytes of the stream at hand."""
        self.stream_status = self.stream.ensure(length)
        if self.stream_status == STREAM_OK:
            return REQUEST_TAKEN
        return REQUEST_STREAM if self.stream_status == STREAM_FAILED else REQUEST_OTHER

    cdef int take_one(self) noexcept nogil:
        """The next request."""
        cdef size_t length, name_length
        cdef const uint8_t *message
        cdef unsigned int kind
        cdef int status = self.need(MESSAGE_HEAD)
        if status != REQUEST_TAKEN:
            return status
        message = self.stream.buffer + self.stream.position
        kind = get_be16(message)
        length = get_be16(message + 2)
        if not (
            (kind == MIG_RP_MSG_REQ_PAGES and length == RANGE)
            or (kind == MIG_RP_MSG_REQ_PAGES_ID and RANGE + 1 < length <= RANGE + 1 + 255)
        ):
            return REQUEST_OTHER
        status = self.need(MESSAGE_HEAD + length)
        if status != REQUEST_TAKEN:
            return status
        message = self.stream.buffer + self.stream.position + MESSAGE_HEAD
        if kind == MIG_RP_MSG_REQ_PAGES_ID:
            name_length = message[RANGE]
            if RANGE + 1 + name_length != length:
                return REQUEST_OTHER
            self.block = self.find_name(message + RANGE, 1 + name_length)
        self.start = get_be64(message)
        self.length = get_be32(message + 8)
        if self.block < 0:
            return REQUEST_BAD_NAME if kind == MIG_RP_MSG_REQ_PAGES_ID else REQUEST_NO_BLOCK
        status = self.server.request(self.block, self.start, self.length)
        if status == REQUEST_TAKEN:
            self.stream.position += MESSAGE_HEAD + length
        return status

    cdef int find_name(self, const uint8_t *name, size_t length) noexcept nogil:
        """The block with that counted string for a name, −1 for none."""
        cdef int index
        for index in range(self.server.dirty.block_count):
            if self.server.blocks[index].name_length == length and not memcmp(self.server.blocks[index].name, name, length):
                return index
        return -1

    # ---- the door ----

    def read(self) -> None:
        """Take page requests, until another message waits, or the end of the stream; see requests.pyi."""
        cdef int status = REQUEST_TAKEN
        with nogil:
            while status == REQUEST_TAKEN:
                status = self.take_one()
        if status == REQUEST_STREAM:
            self.stream.raise_on(self.stream_status, "a page request")
        elif status != REQUEST_OTHER:
            self.refuse(status)

    cdef refuse(self, int status):
        place = self.stream.offset
        if status == REQUEST_SEND:
            self.server.urgent.out.raise_on(self.server.urgent_status)
        what = f"page request at offset {place:#x} of the return path"
        if status == REQUEST_NO_BLOCK:
            raise StreamError(f"{what}: it means the block of the request before, there is none", offset=place)
        if status == REQUEST_BAD_NAME:
            known = ", ".join(f"'{one.idstr}'" for one in self.server.dirty.blocks)
            raise StreamError(f"{what}: of a block that does not exist here, this machine has {known}", offset=place)
        one = self.server.dirty.blocks[self.block]
        raise StreamError(
            f"{what}: {self.length:#x} bytes at {self.start:#x} of block '{one.idstr}', expected whole host pages "
            f"of {one.page_size:#x} bytes below {one.used_length:#x}",
            offset=place,
        )
