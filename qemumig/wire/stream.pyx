"""InputStream and OutputStream: buffered bytes over the descriptors of one channel.

    OutputStream   put (copied into the buffer)   put_reference (only listed)   flush: one writev for all of it
    InputStream    read, peek, be16 … from the buffer; engines read past it, straight to where the bytes belong

    buffer  [head 8][head 8, name][zero, zero, zero …][head 8] …
              │        │                                │
    iov     [b][page A][b][page B][b··················· b][page C]      pages stay where the guest has them

The descriptors are non-blocking.  A stream that has to wait polls its own descriptor and the channel's quit event, so
that a cancel wakes it wherever it sleeps.  A channel whose descriptors do not carry the bytes as they are (TLS) brings a
Carrier, and the streams hand their lists to that instead.

Threads   one thread at a time per stream; `offset` may be read by anyone.
Holds     (1) what was put by reference is read when it is written, not when it is put
          (2) nothing is written after an error: the first one stays
          (3) an InputStream never reads past what it returns, except into its own buffer
"""

import os

from libc.errno cimport EAGAIN, EINTR, EIO, errno
from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memmove

from ..errors import ChannelError, MigrationCancelled, StreamError

cdef extern from "<sys/uio.h>" nogil:
    ssize_t writev(int fd, const iovec *iov, int count)
    ssize_t readv(int fd, const iovec *iov, int count)

cdef extern from "<poll.h>" nogil:
    cdef struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd *fds, unsigned long count, int timeout)
    enum: POLLIN
    enum: POLLOUT

cdef enum:
    OUTPUT_CAPACITY = 0x10000         # 64 KiB
    INPUT_CAPACITY = 0xA0000          # 640 KiB: holds a whole guess of ram/load that went wrong
    EAGER_READS = 20                  # tries before going to sleep: some microseconds, less than a wake-up takes
    READ_AHEAD = 0x40000              # 256 KiB: asked for at once when the buffer is empty: stays in the second-level cache


cdef int wait_for(int fd, short events, int quit_fd) noexcept nogil:
    """Sleep until *fd* is ready or the channel was told to quit."""
    cdef pollfd fds[2]
    cdef int count
    fds[0].fd = fd
    fds[0].events = events
    fds[1].fd = quit_fd
    fds[1].events = POLLIN
    while True:
        fds[0].revents = fds[1].revents = 0
        count = poll(fds, 2, -1)
        if count < 0:
            if errno == EINTR:
                continue
            return STREAM_FAILED
        if fds[1].revents:
            return STREAM_CANCELLED
        if fds[0].revents:
            return STREAM_OK


cdef class Carrier:
    """Takes the place of writev and readv; it does its own waiting, like the streams.  A subclass overrides all three.

    `send` and `receive` move some bytes, at least one, and say how many; both may run at once, each in one thread.
    """

    cdef int send(self, const iovec *iov, int count, size_t *sent) noexcept nogil:
        return STREAM_FAILED

    cdef int receive(self, const iovec *iov, int count, size_t *received) noexcept nogil:
        return STREAM_FAILED

    cdef bint is_cut_off(self) noexcept nogil:
        """Whether it failed because the connection ended, and nobody had announced that."""
        return False

    cdef str failure(self):
        """Why it failed, as the end of a sentence."""
        return "this carrier carries nothing"


cdef class OutputStream:
    """Bytes towards *channel*: an object with `write_fd`, `quit_fd` (an eventfd) and `kind` (for messages)."""

    def __cinit__(self, channel):
        self.channel = channel
        self.carrier = getattr(channel, "carrier", None)
        self.fd = channel.write_fd
        self.quit_fd = channel.quit_fd
        self.capacity = OUTPUT_CAPACITY
        self.buffer = <uint8_t *> malloc(self.capacity)
        if self.buffer == NULL:
            raise MemoryError("no memory for a stream buffer")

    def __dealloc__(self):
        free(self.buffer)

    cdef int append(self, const void *data, size_t length) noexcept nogil:
        cdef iovec *last
        if self.iov_count:
            last = &self.iov[self.iov_count - 1]
            if <const uint8_t *> last.iov_base + last.iov_len == <const uint8_t *> data:
                last.iov_len += length
                self.pending += length
                self.offset += length
                return STREAM_OK
        self.iov[self.iov_count].iov_base = <void *> data
        self.iov[self.iov_count].iov_len = length
        self.iov_count += 1
        self.pending += length
        self.offset += length
        return STREAM_OK

    cdef int put(self, const void *data, size_t length) noexcept nogil:
        """Copy *length* bytes (at most the capacity) behind what is pending."""
        cdef int status
        if self.used + length > self.capacity or self.iov_count == IOV_LIMIT:
            status = self.flush_pending()
            if status != STREAM_OK:
                return status
        memcpy(self.buffer + self.used, data, length)
        self.used += length
        return self.append(self.buffer + self.used - length, length)

    cdef int put_reference(self, const void *data, size_t length) noexcept nogil:
        """List *length* bytes at *data*; they are read when the list is flushed."""
        cdef int status
        if self.iov_count == IOV_LIMIT:
            status = self.flush_pending()
            if status != STREAM_OK:
                return status
        return self.append(data, length)

    cdef int send(self, const iovec *iov, int count, size_t *sent) noexcept nogil:
        """One writev, after waiting for it to be possible."""
        cdef ssize_t written
        cdef int status
        if self.carrier is not None:
            status = self.carrier.send(iov, count, sent)
            if status == STREAM_FAILED:
                self.error = EIO
            return status
        while True:
            written = writev(self.fd, iov, count)
            if written >= 0:
                sent[0] = written
                return STREAM_OK
            if errno == EINTR:
                continue
            if errno != EAGAIN:
                self.error = errno
                return STREAM_FAILED
            status = wait_for(self.fd, POLLOUT, self.quit_fd)
            if status != STREAM_OK:
                if status == STREAM_FAILED:
                    self.error = errno
                return status

    cdef int flush_pending(self) noexcept nogil:
        cdef int first = 0, status
        cdef size_t sent = 0
        if self.error:
            return STREAM_FAILED
        while first < self.iov_count:
            status = self.send(&self.iov[first], self.iov_count - first, &sent)
            if status != STREAM_OK:
                return status
            self.pending -= sent
            while first < self.iov_count and sent >= self.iov[first].iov_len:
                sent -= self.iov[first].iov_len
                first += 1
            if sent:
                self.iov[first].iov_base = <uint8_t *> self.iov[first].iov_base + sent
                self.iov[first].iov_len -= sent
        self.iov_count = 0
        self.used = 0
        return STREAM_OK

    cdef int raise_on(self, int status) except -1:
        if status == STREAM_OK:
            return 0
        if status == STREAM_CANCELLED:
            raise MigrationCancelled("the migration was cancelled")
        raise ChannelError(
            f"Unable to write to {self.channel.kind}: {self.reason()}",
            channel=self.channel.name,
            errno=self.error,
        )

    cdef str reason(self):
        return os.strerror(self.error) if self.carrier is None else self.carrier.failure()

    def write(self, const uint8_t[::1] data not None):
        """Put *data* behind what is pending; it leaves with the next flush, or when the buffer is full."""
        cdef size_t position = 0, part, length = data.shape[0]
        cdef int status = STREAM_OK
        while position < length:
            part = min(length - position, self.capacity)
            with nogil:
                status = self.put(&data[position], part)
            self.raise_on(status)
            position += part

    def flush(self):
        """Hand everything that is pending to the kernel."""
        cdef int status
        with nogil:
            status = self.flush_pending()
        self.raise_on(status)

    def file_position(self) -> int:
        """Where the next byte goes, when the channel is a file that can be sought; see stream.pyi."""
        self.flush()
        return seek_in(self.channel, self.fd, 0, os.SEEK_CUR)

    def go_to(self, position):
        """Let the next byte go to *position* of the file; see stream.pyi."""
        self.flush()
        seek_in(self.channel, self.fd, position, os.SEEK_SET)

    def accepted_bytes(self) -> int:
        """Bytes that the kernel has taken."""
        return self.offset - self.pending

    def pending_bytes(self) -> int:
        """Bytes that were put and that the kernel has not taken."""
        return self.pending

    def write_u8(self, unsigned int value):
        self.write(value.to_bytes(1, "big"))

    def write_be16(self, unsigned int value):
        self.write(value.to_bytes(2, "big"))

    def write_be32(self, unsigned long value):
        self.write(value.to_bytes(4, "big"))

    def write_be64(self, unsigned long long value):
        self.write(value.to_bytes(8, "big"))


def seek_in(channel, fd, position, whence):
    """lseek on the file of *channel*; ChannelError when it is none, or has no such place."""
    try:
        return os.lseek(fd, position, whence)
    except (OSError, OverflowError) as error:
        number = getattr(error, "errno", None)
        raise ChannelError(
            f"{channel.kind} '{channel.name}' has no position {position:#x} to go to "
            f"({os.strerror(number) if number else error}): expected a file",
            channel=channel.name,
            errno=number,
        ) from error


cdef class InputStream:
    """Bytes from *channel*; see stream.pyi."""

    def __cinit__(self, channel, *, bint eager=True):
        self.channel = channel
        self.eager_reads = EAGER_READS if eager else 0
        self.carrier = getattr(channel, "carrier", None)
        self.fd = channel.read_fd
        self.quit_fd = channel.quit_fd
        self.capacity = INPUT_CAPACITY
        self.buffer = <uint8_t *> malloc(self.capacity)
        if self.buffer == NULL:
            raise MemoryError("no memory for a stream buffer")

    def __dealloc__(self):
        free(self.buffer)

    @property
    def offset(self) -> int:
        """Bytes consumed so far."""
        return self.base + self.position

    def file_position(self) -> int:
        """Where the next byte to consume lies, when the channel is a file that can be sought; see stream.pyi."""
        return seek_in(self.channel, self.fd, 0, os.SEEK_CUR) - (self.end - self.position)

    def go_to(self, position):
        """Go on at *position* of the file; see stream.pyi."""
        offset = self.offset + position - self.file_position()
        seek_in(self.channel, self.fd, position, os.SEEK_SET)
        self.position = self.end = 0
        self.base = offset

    cdef int receive(self, iovec *iov, int count, size_t *received) noexcept nogil:
        """One readv, after waiting for it to be possible."""
        cdef ssize_t length
        cdef int status, tries = 0
        if self.carrier is not None:
            status = self.carrier.receive(iov, count, received)
            if status == STREAM_FAILED:
                self.error = EIO
            return status
        while True:
            length = readv(self.fd, iov, count)
            if length > 0:
                received[0] = length
                return STREAM_OK
            if length == 0:
                return STREAM_END
            if errno == EINTR:
                continue
            if errno != EAGAIN:
                self.error = errno
                return STREAM_FAILED
            if tries < self.eager_reads:
                tries += 1
                continue
            status = wait_for(self.fd, POLLIN, self.quit_fd)
            if status != STREAM_OK:
                if status == STREAM_FAILED:
                    self.error = errno
                return status

    cdef int ensure(self, size_t length) noexcept nogil:
        """Have *length* bytes (at most the capacity) in the buffer at `position`."""
        cdef iovec iov
        cdef size_t received, kept
        cdef int status
        while self.end - self.position < length:
            kept = self.end - self.position
            if kept == 0 or self.position + length > self.capacity:
                memmove(self.buffer, self.buffer + self.position, kept)
                self.base += self.position
                self.position = 0
                self.end = kept
            iov.iov_base = self.buffer + self.end
            iov.iov_len = min(self.capacity - self.end, max(<size_t> READ_AHEAD, length - kept))
            status = self.receive(&iov, 1, &received)
            if status != STREAM_OK:
                return status
            self.end += received
        return STREAM_OK

    cdef int read_into(self, void *target, size_t length) noexcept nogil:
        """Move *length* bytes to *target*: first those in the buffer, the rest straight from the channel."""
        cdef size_t part = min(length, self.end - self.position), received
        cdef iovec iov
        cdef int status
        memcpy(target, self.buffer + self.position, part)
        self.position += part
        while part < length:
            iov.iov_base = <uint8_t *> target + part
            iov.iov_len = length - part
            status = self.receive(&iov, 1, &received)
            if status != STREAM_OK:
                return status
            part += received
            self.base += received
        return STREAM_OK

    cdef int raise_on(self, int status, str what) except -1:
        cdef uint64_t place
        if status == STREAM_OK:
            return 0
        if status == STREAM_CANCELLED:
            raise MigrationCancelled("the migration was cancelled")
        place = self.base + self.end
        if status == STREAM_END:
            raise StreamError(f"stream ends inside {what} at offset {place:#x}", offset=place)
        raise ChannelError(
            f"Unable to read from {self.channel.kind}: {self.reason()} at offset {place:#x}, inside {what}",
            channel=self.channel.name,
            errno=self.error,
        )

    cdef str reason(self):
        return os.strerror(self.error) if self.carrier is None else self.carrier.failure()

    def read(self, size_t length, str what="a field") -> bytes:
        """Exactly *length* bytes.

        Raises StreamError when the stream ends before, ChannelError when it breaks; *what* names the place.
        """
        cdef bytearray parts = bytearray()
        cdef size_t part
        cdef int status
        while True:
            part = min(length - len(parts), <size_t> READ_AHEAD)
            with nogil:
                status = self.ensure(part)
            self.raise_on(status, what)
            data = (<char *> self.buffer)[self.position:self.position + part]
            self.position += part
            if not parts and part == length:
                return data
            parts += data
            if <size_t> len(parts) == length:
                return bytes(parts)

    def fill(self, uint8_t[::1] target not None, str what="a field"):
        """Fill *target*; see stream.pyi."""
        cdef int status = STREAM_OK
        if target.shape[0]:
            with nogil:
                status = self.read_into(&target[0], target.shape[0])
        self.raise_on(status, what)

    def give_back(self, const uint8_t[::1] data not None):
        """Let *data*, which somebody has read from the channel before, come first; see stream.pyi."""
        if self.end or <size_t> data.shape[0] > self.capacity:
            raise ValueError(f"{data.shape[0]} bytes cannot be given back any more")
        memcpy(self.buffer, &data[0], data.shape[0])
        self.end = data.shape[0]

    def peek(self, size_t length) -> bytes:
        """Up to *length* bytes (at most 4096) without consuming them; fewer only at the end of the stream."""
        cdef int status
        if length > 4096:
            raise ValueError(f"cannot peek {length} bytes, at most 4096")
        with nogil:
            status = self.ensure(length)
        if status != STREAM_OK and status != STREAM_END:
            self.raise_on(status, "a field")
        length = min(length, self.end - self.position)
        return (<char *> self.buffer)[self.position:self.position + length]

    def read_u8(self, str what="a field") -> int:
        return self.read(1, what)[0]

    def read_be16(self, str what="a field") -> int:
        return int.from_bytes(self.read(2, what), "big")

    def read_be32(self, str what="a field") -> int:
        return int.from_bytes(self.read(4, what), "big")

    def read_be64(self, str what="a field") -> int:
        return int.from_bytes(self.read(8, what), "big")
