"""TlsSession: one TLS connection as a carrier of streams (channels.md §3).

    OutputStream ─▶ send:    up to 16 KiB gathered from the list ─▶ [record] ─▶ descriptor
    InputStream  ◀─ receive: each record deciphered straight into the caller's list ◀─ descriptor

The library is the libssl that Python's own `_ssl` uses; `openssl.py` finds it and hands its functions over by address,
so nothing here needs its headers, and nothing here needs the GIL.

Threads   one writer and one reader at once, which QEMU's return path and page requests ask for.  The library allows one
          call at a time per session: a mutex is held for one record, never while waiting.
Holds     (1) a record that could not be written whole is kept and continued: the library would refuse another one
          (2) after a failure nothing goes in or out any more, and `failure` says what the first one was
          (3) the end of a connection that was not announced is a failure, never an end
"""

cimport libc.errno
from libc.stdint cimport uint8_t, uintptr_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

from ..wire.stream cimport (
    STREAM_END,
    STREAM_FAILED,
    STREAM_OK,
    Carrier,
    iovec,
    wait_for,
)

import os

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    int pthread_mutex_init(pthread_mutex_t *mutex, const void *attributes)
    int pthread_mutex_destroy(pthread_mutex_t *mutex)
    int pthread_mutex_lock(pthread_mutex_t *mutex)
    int pthread_mutex_unlock(pthread_mutex_t *mutex)

cdef extern from "<poll.h>" nogil:
    enum: POLLIN
    enum: POLLOUT

cdef enum:
    RECORD = 16384                # the most bytes that one TLS record holds

# the library's, from its stable interface
cdef enum:
    SSL_ERROR_WANT_READ = 2
    SSL_ERROR_WANT_WRITE = 3
    SSL_ERROR_SYSCALL = 5
    SSL_ERROR_ZERO_RETURN = 6
    SSL_R_UNEXPECTED_EOF_WHILE_READING = 294
    REASON_MASK = 0x7FFFFF        # of an error code

cdef enum:
    WANT_READ = 16                # beside the StreamStatus of `attempt_*`: call again when it is readable …
    WANT_WRITE = 17               # … or writable

CUT_OFF = "the TLS connection was cut off, its end was not announced"

cdef struct Library:
    int (*read)(void *ssl, void *buffer, size_t length, size_t *done) noexcept nogil
    int (*peek)(void *ssl, void *buffer, size_t length, size_t *done) noexcept nogil
    int (*write)(void *ssl, const void *buffer, size_t length, size_t *done) noexcept nogil
    int (*shutdown)(void *ssl) noexcept nogil
    int (*get_error)(void *ssl, int result) noexcept nogil
    unsigned long (*peek_error)() noexcept nogil
    void (*clear_error)() noexcept nogil


cdef class TlsSession(Carrier):
    """A connection whose handshake is done; see session.pyi."""

    cdef object owner             # what frees the library's object
    cdef object describe          # an error code of the library → text
    cdef void *ssl
    cdef Library library
    cdef pthread_mutex_t mutex
    cdef int read_fd
    cdef int write_fd
    cdef int quit_fd
    cdef uint8_t *record          # what `send` has gathered …
    cdef size_t gathered          # … and how much of it; not 0 while a record waits to be continued
    # under the mutex
    cdef int failed_call          # 0, or the library's word for what went wrong first
    cdef unsigned long failed_code
    cdef int failed_errno

    def __cinit__(self, owner, ssl, functions, describe, int read_fd, int write_fd, int quit_fd):
        self.owner = owner
        self.describe = describe
        self.ssl = <void *> <uintptr_t> ssl
        self.read_fd = read_fd
        self.write_fd = write_fd
        self.quit_fd = quit_fd
        self.library.read = <int (*)(void *, void *, size_t, size_t *) noexcept nogil> <uintptr_t> functions["SSL_read_ex"]
        self.library.peek = <int (*)(void *, void *, size_t, size_t *) noexcept nogil> <uintptr_t> functions["SSL_peek_ex"]
        self.library.write = (
            <int (*)(void *, const void *, size_t, size_t *) noexcept nogil> <uintptr_t> functions["SSL_write_ex"]
        )
        self.library.shutdown = <int (*)(void *) noexcept nogil> <uintptr_t> functions["SSL_shutdown"]
        self.library.get_error = <int (*)(void *, int) noexcept nogil> <uintptr_t> functions["SSL_get_error"]
        self.library.peek_error = <unsigned long (*)() noexcept nogil> <uintptr_t> functions["ERR_peek_error"]
        self.library.clear_error = <void (*)() noexcept nogil> <uintptr_t> functions["ERR_clear_error"]
        pthread_mutex_init(&self.mutex, NULL)
        self.record = <uint8_t *> malloc(RECORD)
        if self.record == NULL:
            raise MemoryError("no memory for a TLS record")

    def __dealloc__(self):
        free(self.record)
        pthread_mutex_destroy(&self.mutex)

    # ---- one call of the library; the mutex is held ----

    cdef int judge(self, int result) noexcept nogil:
        """What a call that did not succeed means; the first failure is noted."""
        cdef int number = libc.errno.errno
        cdef int kind = self.library.get_error(self.ssl, result)
        if kind == SSL_ERROR_WANT_READ:
            return WANT_READ
        if kind == SSL_ERROR_WANT_WRITE:
            return WANT_WRITE
        if kind == SSL_ERROR_ZERO_RETURN:
            return STREAM_END
        self.failed_call = kind
        self.failed_code = self.library.peek_error()
        self.failed_errno = number
        return STREAM_FAILED

    cdef int attempt_read(self, void *target, size_t length, size_t *done) noexcept nogil:
        cdef int result, status = STREAM_OK
        pthread_mutex_lock(&self.mutex)
        if self.failed_call:
            status = STREAM_FAILED
        else:
            self.library.clear_error()
            libc.errno.errno = 0
            result = self.library.read(self.ssl, target, length, done)
            if result <= 0:
                status = self.judge(result)
        pthread_mutex_unlock(&self.mutex)
        return status

    cdef int attempt_write(self, const void *source, size_t length, size_t *done) noexcept nogil:
        cdef int result, status = STREAM_OK
        pthread_mutex_lock(&self.mutex)
        if self.failed_call:
            status = STREAM_FAILED
        else:
            self.library.clear_error()
            libc.errno.errno = 0
            result = self.library.write(self.ssl, source, length, done)
            if result <= 0:
                status = self.judge(result)
        pthread_mutex_unlock(&self.mutex)
        return status

    cdef int wait(self, int want) noexcept nogil:
        cdef int status
        if want == WANT_READ:
            status = wait_for(self.read_fd, POLLIN, self.quit_fd)
        else:
            status = wait_for(self.write_fd, POLLOUT, self.quit_fd)
        if status == STREAM_FAILED:
            pthread_mutex_lock(&self.mutex)
            self.failed_call = SSL_ERROR_SYSCALL
            self.failed_errno = libc.errno.errno
            pthread_mutex_unlock(&self.mutex)
        return status

    # ---- for the streams ----

    cdef void gather(self, const iovec *iov, int count) noexcept nogil:
        cdef size_t part
        cdef int index = 0
        while index < count and self.gathered < RECORD:
            part = min(iov[index].iov_len, RECORD - self.gathered)
            memcpy(self.record + self.gathered, iov[index].iov_base, part)
            self.gathered += part
            index += 1

    cdef int send(self, const iovec *iov, int count, size_t *sent) noexcept nogil:
        """Write one record of what the list begins with."""
        cdef size_t done = 0
        cdef int status
        if self.gathered == 0:
            self.gather(iov, count)
        while True:
            status = self.attempt_write(self.record, self.gathered, &done)
            if status == STREAM_OK:
                sent[0] = self.gathered
                self.gathered = 0
                return STREAM_OK
            if status != WANT_READ and status != WANT_WRITE:
                return STREAM_FAILED  # an end, too, is one for a writer
            status = self.wait(status)
            if status != STREAM_OK:
                return status

    cdef int receive(self, const iovec *iov, int count, size_t *received) noexcept nogil:
        """Fill the list with what is there; waits only for the first bytes."""
        cdef size_t total = 0, filled = 0, done
        cdef int index = 0, status
        while index < count:
            done = 0
            status = self.attempt_read(<uint8_t *> iov[index].iov_base + filled, iov[index].iov_len - filled, &done)
            if status == STREAM_OK:
                total += done
                filled += done
                if filled == iov[index].iov_len:
                    index += 1
                    filled = 0
            elif total:
                break  # an end or a failure shows itself again at the next call
            elif status != WANT_READ and status != WANT_WRITE:
                return status
            else:
                status = self.wait(status)
                if status != STREAM_OK:
                    return status
        received[0] = total
        return STREAM_OK

    cdef bint is_cut_off(self) noexcept nogil:
        if self.failed_call == SSL_ERROR_SYSCALL:
            return self.failed_errno == 0
        return self.failed_call != 0 and self.failed_code & REASON_MASK == SSL_R_UNEXPECTED_EOF_WHILE_READING

    cdef str failure(self):
        cdef unsigned long reason
        if self.failed_call == SSL_ERROR_SYSCALL and self.failed_errno:
            return os.strerror(self.failed_errno)
        reason = self.failed_code & REASON_MASK
        if self.failed_call == SSL_ERROR_SYSCALL or reason == SSL_R_UNEXPECTED_EOF_WHILE_READING:
            return CUT_OFF
        if self.failed_call == 0:
            return "the peer has ended the TLS connection"
        return self.describe(self.failed_code)

    # ---- the door ----

    def try_read(self, uint8_t[::1] target not None):
        """Read what is there into *target*; see session.pyi."""
        cdef size_t done = 0, length = target.shape[0]
        cdef int status
        if length == 0:
            return 0
        with nogil:
            status = self.attempt_read(&target[0], length, &done)
        if status == STREAM_END:
            return 0
        return self.settle(status, done)

    def try_write(self, const uint8_t[::1] source not None):
        """Write the first record of *source*; see session.pyi."""
        cdef size_t done = 0, length = source.shape[0]
        cdef iovec piece
        cdef int status
        if length == 0:
            return 0
        piece.iov_base = <void *> &source[0]
        piece.iov_len = length
        with nogil:
            if self.gathered == 0:
                self.gather(&piece, 1)
            status = self.attempt_write(self.record, self.gathered, &done)
        if status == STREAM_OK:
            self.gathered = 0
        elif status == STREAM_END:
            status = STREAM_FAILED
        return self.settle(status, done)

    cdef settle(self, int status, size_t done):
        if status == STREAM_OK:
            return done
        if status == WANT_READ:
            return -POLLIN
        if status == WANT_WRITE:
            return -POLLOUT
        raise OSError(self.failure())

    def is_silent(self) -> int:
        """What must happen before the peer's first byte can be read; see session.pyi."""
        cdef uint8_t byte
        cdef size_t done = 0
        cdef int result, status = STREAM_OK
        with nogil:
            pthread_mutex_lock(&self.mutex)
            self.library.clear_error()
            libc.errno.errno = 0
            result = self.library.peek(self.ssl, &byte, 1, &done)
            if result <= 0:
                status = self.judge(result)
            pthread_mutex_unlock(&self.mutex)
        if status == STREAM_OK:
            return 0
        if status == STREAM_END:
            raise OSError("the peer ended the connection before it had sent anything")
        return -self.settle(status, 0)

    def announce_end(self) -> int:
        """Tell the peer that nothing more will be written; see session.pyi."""
        cdef int result, status = STREAM_OK
        if self.gathered:
            return 0  # half a record is on the wire: there is no clean end any more
        with nogil:
            pthread_mutex_lock(&self.mutex)
            if not self.failed_call:
                self.library.clear_error()
                libc.errno.errno = 0
                result = self.library.shutdown(self.ssl)
                if result < 0:
                    status = self.judge(result)
            pthread_mutex_unlock(&self.mutex)
        if status == WANT_WRITE:
            return POLLOUT
        return 0
