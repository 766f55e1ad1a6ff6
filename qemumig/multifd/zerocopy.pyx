"""Pages that the network takes from where they lie: MSG_ZEROCOPY (multifd.md §11).

    sendmsg ─▶ the pages are locked, and listed behind the connection      every call that took something has a number
    …
    error queue of the socket ─▶ "calls 7 to 12 are through", "… but were copied"           until then nothing is reused

The guest may write to a page that is under way: its log tells, and the page goes once more behind the next sync point, which
is where all completions are collected.  So what leaves may be torn, and never is what stays.  Nothing but guest memory is
sent this way; headers are copied.

Over the loopback device, and wherever else the kernel cannot do it, it copies after all: then this costs more than it saves,
which is what `dirty-sync-missed-zero-copy` says.

Threads   the channel's; no GIL but at the door.
Holds     (1) after `flush` the network reads no page of this channel any more
          (2) room that runs out (locked memory, notes of the error queue) is waited for as long as something is under way
"""

import os

cimport cython
from libc.errno cimport EAGAIN, EINTR, ENOBUFS, EPIPE, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memset

from ..errors import ChannelError, MigrationCancelled
from ..wire.stream cimport STREAM_CANCELLED, STREAM_FAILED, STREAM_OK, iovec, wait_for

cdef extern from "<sys/socket.h>" nogil:
    cdef struct msghdr:
        iovec *msg_iov
        size_t msg_iovlen
        void *msg_control
        size_t msg_controllen
    cdef struct cmsghdr:
        int cmsg_level
        int cmsg_type
    ssize_t sendmsg(int fd, const msghdr *message, int flags)
    ssize_t recvmsg(int fd, msghdr *message, int flags)
    int getsockopt(int fd, int level, int name, void *value, unsigned int *length)
    int setsockopt(int fd, int level, int name, const void *value, unsigned int length)
    cmsghdr *CMSG_FIRSTHDR(msghdr *message)
    cmsghdr *CMSG_NXTHDR(msghdr *message, cmsghdr *part)
    uint8_t *CMSG_DATA(cmsghdr *part)
    enum: MSG_ZEROCOPY
    enum: MSG_ERRQUEUE
    enum: MSG_DONTWAIT
    enum: MSG_NOSIGNAL
    enum: SOL_SOCKET
    enum: SO_ZEROCOPY
    enum: SO_ERROR

cdef extern from "<netinet/in.h>" nogil:
    enum: SOL_IP
    enum: SOL_IPV6
    enum: IP_RECVERR
    enum: IPV6_RECVERR

cdef extern from "<linux/errqueue.h>" nogil:
    enum: SO_EE_ORIGIN_ZEROCOPY
    enum: SO_EE_CODE_ZEROCOPY_COPIED

cdef extern from "<poll.h>" nogil:
    enum: POLLOUT

cdef enum:
    CONTROL_WORDS = 32                # of one note of the error queue, with the address that comes with it


cdef class ZeroCopy:
    """Sends memory without a copy; see zerocopy.pyi."""

    def __cinit__(self, channel):
        cdef int on = 1
        self.channel = channel
        self.fd = channel.write_fd
        self.quit_fd = channel.quit_fd
        if setsockopt(self.fd, SOL_SOCKET, SO_ZEROCOPY, &on, sizeof(on)) < 0:
            number = errno
            raise ChannelError(
                f"Zero copy send feature not detected in host kernel for {channel.kind} '{channel.name}': {os.strerror(number)}",
                channel=channel.name,
                errno=number,
            )

    # ---- the engine ----

    cdef int send(self, iovec *iov, int count) noexcept nogil:
        """Send all of the list, which is used up by that."""
        cdef msghdr message
        cdef ssize_t taken
        cdef int status
        memset(&message, 0, sizeof(message))
        while count:
            message.msg_iov = iov
            message.msg_iovlen = count
            taken = sendmsg(self.fd, &message, MSG_ZEROCOPY | MSG_NOSIGNAL)
            if taken < 0:
                status = self.make_room(errno)
                if status != STREAM_OK:
                    return status
                continue
            self.sent += 1
            while count and <size_t> taken >= iov.iov_len:
                taken -= iov.iov_len
                iov += 1
                count -= 1
            if count:
                iov.iov_base = <uint8_t *> iov.iov_base + taken
                iov.iov_len -= taken
        return self.collect()

    cdef int make_room(self, int reason) noexcept nogil:
        """After a call that failed for *reason*: wait until it may be tried again."""
        cdef int status
        if reason == EINTR:
            return STREAM_OK
        if reason == ENOBUFS and self.completed < self.sent:
            return self.wait_completion()
        if reason != EAGAIN:
            return self.fail(reason)
        status = self.collect()  # as long as there are notes, no wait is one
        if status != STREAM_OK:
            return status
        status = wait_for(self.fd, POLLOUT, self.quit_fd)
        return self.fail(errno) if status == STREAM_FAILED else status

    cdef int flush(self) noexcept nogil:
        """Wait until everything is through."""
        cdef int status = self.collect()
        while status == STREAM_OK and self.completed < self.sent:
            status = self.wait_completion()
        if status == STREAM_OK:
            if self.sent > self.flushed and self.copied - self.copied_then == self.sent - self.flushed:
                self.missed += 1
            self.flushed = self.sent
            self.copied_then = self.copied
        return status

    cdef int wait_completion(self) noexcept nogil:
        """Wait for a note, at least one, and take it."""
        cdef uint64_t before = self.completed
        cdef int status, pending = 0
        cdef unsigned int length = sizeof(pending)
        status = self.collect()
        if status != STREAM_OK or self.completed > before:
            return status
        status = wait_for(self.fd, 0, self.quit_fd)  # a note, or an error, or a connection that is no more
        if status == STREAM_FAILED:
            return self.fail(errno)
        if status == STREAM_OK:
            status = self.collect()
        if status != STREAM_OK or self.completed > before:
            return status
        getsockopt(self.fd, SOL_SOCKET, SO_ERROR, &pending, &length)
        return self.fail(pending if pending else EPIPE)

    cdef int collect(self) noexcept nogil:
        """Take all notes that are there."""
        cdef msghdr message
        cdef cmsghdr *part
        cdef uint64_t control[CONTROL_WORDS]
        cdef ssize_t length
        while True:
            memset(&message, 0, sizeof(message))
            message.msg_control = control
            message.msg_controllen = sizeof(control)
            length = recvmsg(self.fd, &message, MSG_ERRQUEUE | MSG_DONTWAIT)
            if length < 0:
                if errno == EINTR:
                    continue
                return STREAM_OK if errno == EAGAIN else self.fail(errno)
            part = CMSG_FIRSTHDR(&message)
            while part != NULL:
                if (part.cmsg_level == SOL_IP and part.cmsg_type == IP_RECVERR) or (
                    part.cmsg_level == SOL_IPV6 and part.cmsg_type == IPV6_RECVERR
                ):
                    self.count(<sock_extended_err *> CMSG_DATA(part))
                part = CMSG_NXTHDR(&message, part)

    @cython.overflowcheck(False)  # numbers of calls wrap
    cdef void count(self, const sock_extended_err *note) noexcept nogil:
        cdef uint64_t calls
        if note.ee_origin != SO_EE_ORIGIN_ZEROCOPY:
            return
        calls = <uint64_t> <uint32_t> (note.ee_data - note.ee_info) + 1
        self.completed += calls
        if note.ee_code & SO_EE_CODE_ZEROCOPY_COPIED:
            self.copied += calls

    cdef int fail(self, int error) noexcept nogil:
        self.error = error
        return STREAM_FAILED

    cdef str failure(self):
        """Why it failed, as a sentence."""
        if self.error == ENOBUFS:
            return f"Process can't lock enough memory for using MSG_ZEROCOPY: {os.strerror(ENOBUFS)}"
        return f"Unable to write to {self.channel.kind}: {os.strerror(self.error)}"

    # ---- the door ----

    cdef int raise_on(self, int status) except -1:
        if status == STREAM_OK:
            return 0
        if status == STREAM_CANCELLED:
            raise MigrationCancelled("the migration was cancelled")
        raise ChannelError(self.failure(), channel=self.channel.name, errno=self.error)

    def send_pages(self, uint8_t[::1] memory not None):
        """Send *memory*; see zerocopy.pyi."""
        cdef iovec iov
        cdef int status = STREAM_OK
        if memory.shape[0]:
            iov.iov_base, iov.iov_len = &memory[0], memory.shape[0]
            with nogil:
                status = self.send(&iov, 1)
        self.raise_on(status)

    def wait_sent(self):
        """Wait until nothing is under way; see zerocopy.pyi."""
        cdef int status
        with nogil:
            status = self.flush()
        self.raise_on(status)
