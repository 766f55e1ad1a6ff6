"""Pages that the kernel hands on by reference: vmsplice into a pipe, splice from there into the socket.

    [header] ──copied──▶ ┌──── pipe ────┐
    page ───reference──▶ │ h p p p p p p │ ──▶ socket ──▶ network card, or the other process's read: the first copy
                         └──────────────┘

Between two processes of one host this saves one of two copies, towards a network card the only one.  Unlike MSG_ZEROCOPY
it locks no memory, works over the loopback device, and nobody tells when the other end has taken a page.  So a page may be
read long after it was sent:

    while the guest runs    its log tells of every write since the page's dirty bit was cleared, before it was sent: the
                            page goes once more behind the next sync point, and what arrived before may be torn
    when the guest goes on  after a failure, say, pages that are still under way change.  Therefore this is only for a
                            source that makes its last write after the destination has answered that all is loaded

Threads   the channel's; no GIL but at the door.
Holds     (1) the pipe is empty between two packets
          (2) nothing but guest memory goes by reference; headers are copied
          (3) an error is the stream's, as if it had written itself
"""

import os

from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport uint8_t

from ..errors import ChannelError
from ..wire.format cimport MULTIFD_PACKET_PAGES, TARGET_PAGE_SIZE
from ..wire.stream cimport STREAM_FAILED, STREAM_OK, OutputStream, iovec, wait_for

cdef extern from "<fcntl.h>" nogil:
    ssize_t vmsplice(int fd, const iovec *iov, size_t count, unsigned int flags)
    ssize_t splice(int fd_in, void *offset_in, int fd_out, void *offset_out, size_t length, unsigned int flags)
    int fcntl(int fd, int command, ...)
    enum: SPLICE_F_NONBLOCK
    enum: SPLICE_F_MORE
    enum: F_SETPIPE_SZ

cdef extern from "<unistd.h>" nogil:
    ssize_t write(int fd, const void *data, size_t length)

cdef extern from "<poll.h>" nogil:
    enum: POLLOUT


cdef class Splice:
    """Sends memory by reference; see splice.pyi."""

    def __cinit__(self, OutputStream out not None):
        channel = out.channel
        self.out = out
        try:
            self.pipe_out, self.pipe_in = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise ChannelError(
                f"no pipe for {channel.kind} '{channel.name}': {error.strerror}", channel=channel.name, errno=error.errno
            ) from error
        self.is_open = True
        # a packet: a slot for each page, one for the header; refused where pipes are many: then packets go in pieces
        fcntl(self.pipe_in, F_SETPIPE_SZ, <int> (MULTIFD_PACKET_PAGES + 1) * <int> TARGET_PAGE_SIZE)

    def __dealloc__(self):
        self.close()

    def close(self):
        """Give the pipe back; see splice.pyi."""
        if self.is_open:
            self.is_open = False
            os.close(self.pipe_in)
            os.close(self.pipe_out)

    # ---- the engine ----

    cdef int send(self, const uint8_t *header, size_t length, iovec *iov, int count) noexcept nogil:
        """Send *header*, at most a page, and all of the list, which is used up by that; nothing is pending in the stream."""
        cdef int status = self.put_header(header, length)
        while status == STREAM_OK and (count or self.inside):
            status = self.put_pages(&iov, &count)
            if status == STREAM_OK:
                status = self.empty_pipe(count > 0)
        return status

    cdef int put_header(self, const uint8_t *header, size_t length) noexcept nogil:
        """Copy *header* into the pipe, which is empty."""
        cdef ssize_t taken
        while True:
            taken = write(self.pipe_in, header, length)
            if taken >= 0:  # up to a page it is all or nothing
                self.inside = taken
                return STREAM_OK
            if errno != EINTR:
                return self.fail(errno)

    cdef int put_pages(self, iovec **iov, int *count) noexcept nogil:
        """Put references to as many of the pages into the pipe as there is room for."""
        cdef ssize_t taken
        while count[0]:
            taken = vmsplice(self.pipe_in, iov[0], count[0], SPLICE_F_NONBLOCK)
            if taken < 0:
                if errno == EINTR:
                    continue
                return STREAM_OK if errno == EAGAIN and self.inside else self.fail(errno)
            self.inside += taken
            while count[0] and <size_t> taken >= iov[0].iov_len:
                taken -= iov[0].iov_len
                iov[0] += 1
                count[0] -= 1
            if count[0]:
                iov[0].iov_base = <uint8_t *> iov[0].iov_base + taken
                iov[0].iov_len -= taken
                break  # it is full
        return STREAM_OK

    cdef int empty_pipe(self, bint more) noexcept nogil:
        """Move everything in the pipe into the socket; *more* of the packet follows."""
        cdef ssize_t moved
        cdef int status
        cdef unsigned int flags = SPLICE_F_NONBLOCK | (SPLICE_F_MORE if more else 0)
        while self.inside:
            moved = splice(self.pipe_out, NULL, self.out.fd, NULL, self.inside, flags)
            if moved > 0:
                self.inside -= moved
                self.out.offset += moved
                continue
            if moved < 0 and errno == EINTR:
                continue
            if moved < 0 and errno != EAGAIN:
                return self.fail(errno)
            status = wait_for(self.out.fd, POLLOUT, self.out.quit_fd)
            if status != STREAM_OK:
                return self.fail(errno) if status == STREAM_FAILED else status
        return STREAM_OK

    cdef int fail(self, int error) noexcept nogil:
        self.out.error = error
        return STREAM_FAILED

    # ---- the door ----

    def send_pages(self, const uint8_t[::1] header not None, const uint8_t[::1] memory not None):
        """Send *header* and *memory*; see splice.pyi."""
        cdef iovec iov
        cdef int status
        if not 0 < header.shape[0] <= TARGET_PAGE_SIZE or memory.shape[0] == 0:
            raise ValueError(f"a header of {header.shape[0]} bytes before {memory.shape[0]}, expected 1 to {TARGET_PAGE_SIZE}")
        iov.iov_base, iov.iov_len = <void *> &memory[0], memory.shape[0]
        with nogil:
            status = self.send(&header[0], header.shape[0], &iov, 1)
        self.out.raise_on(status)
