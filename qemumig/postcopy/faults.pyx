"""FaultServer: a page is touched and not here; it is asked for, once (postcopy.md §4).

    userfaultfd ─▶ which block, which host page
                     ├─ received already: zero, and nobody has touched it yet ─▶ placed at once
                     ├─ asked for already ─▶ nothing: one request a page, however many wait
                     └─ else ─▶ noted, then asked for

What cannot be sent is noted all the same; `ask_again` sends all that is noted and not here, after a recovery.

Threads   `mig/dst/fault` runs `serve`, without the GIL from beginning to end; `ask_again` may come from any thread.
Holds     (1) a request is noted before it is sent: a recovery that begins in between sends it again
          (2) no guest memory is touched here
"""

from libc.errno cimport EINTR, errno
from libc.stdint cimport uint64_t

from ..ram.bitmap cimport find_next_set, set_bit_shared, test_bit_shared
from ..wire.format cimport TARGET_PAGE_SIZE
from .answers cimport Answers
from .place cimport MissingBlock, MissingMemory
from .uffd cimport FaultMessage

import os

from ..errors import MachineError

cdef extern from "<poll.h>" nogil:
    cdef struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd *fds, unsigned long count, int timeout)
    enum: POLLIN

cdef enum:
    FAULTS_AT_A_TIME = 32


cdef class FaultServer:
    """Asks for what is missing of *memory*, by *answers*; see faults.pyi."""

    cdef readonly MissingMemory memory
    cdef readonly Answers answers
    cdef int quit_fd
    cdef readonly uint64_t faults     # that the kernel told of
    cdef readonly uint64_t merged     # of pages that had been asked for already
    cdef readonly uint64_t zeroes     # of pages that precopy had said to be zero

    def __cinit__(self, MissingMemory memory not None, Answers answers not None, int quit_fd):
        self.memory = memory
        self.answers = answers
        self.quit_fd = quit_fd

    # ---- the engine ----

    cdef void ask(self, int index, uint64_t page) noexcept nogil:
        cdef MissingBlock *block = &self.memory.table[index]
        self.answers.request(index, block.name, block.name_length, page * TARGET_PAGE_SIZE, block.host_page)

    cdef int take_fault(self, const FaultMessage *fault) noexcept nogil:
        cdef int index = self.memory.find_address(fault.address)
        cdef MissingBlock *block
        cdef uint64_t offset, page
        if index < 0:
            return 0  # not guest memory of ours: nothing of it was registered
        block = &self.memory.table[index]
        offset = fault.address - <uint64_t> block.host
        page = (offset - offset % block.host_page) // TARGET_PAGE_SIZE
        self.faults += 1
        if test_bit_shared(block.received, page):
            self.zeroes += 1
            return self.memory.place(index, page, 1, NULL)
        self.memory.times.begin(<uint64_t> block.host + page * TARGET_PAGE_SIZE, fault.thread_id)
        if set_bit_shared(block.requested, page):
            self.merged += 1
        else:
            self.ask(index, page)
        if test_bit_shared(block.received, page):  # it was placed meanwhile, before the wait was noted
            self.memory.times.end(<uint64_t> block.host + page * TARGET_PAGE_SIZE, block.host_page)
        return 0

    cdef int serve_some(self) noexcept nogil:
        """Sleep until something is touched, and serve that; −1 when told to quit, else 0 or an errno."""
        cdef FaultMessage faults[FAULTS_AT_A_TIME]
        cdef pollfd fds[2]
        cdef int count, index, status
        fds[0].fd = self.memory.uffd.fd
        fds[1].fd = self.quit_fd
        fds[0].events = fds[1].events = POLLIN
        fds[0].revents = fds[1].revents = 0
        if poll(fds, 2, -1) < 0:
            return 0 if errno == EINTR else errno
        if fds[1].revents:
            return -1
        status = self.memory.uffd.read_faults(faults, FAULTS_AT_A_TIME, &count)
        for index in range(count):
            if status == 0:
                status = self.take_fault(&faults[index])
        return status

    # ---- the door ----

    def serve(self) -> None:
        """Serve faults until the quit event; MachineError when the kernel refuses to go on."""
        cdef int status = 0
        with nogil:
            while status == 0:
                status = self.serve_some()
        if status > 0:
            raise MachineError(f"userfaultfd: page faults cannot be served any more: {os.strerror(status)}")

    def ask_again(self) -> int:
        """Ask for every page that was asked for and is not here; how many those are."""
        cdef uint64_t page, count = 0
        cdef MissingBlock *block
        cdef int index
        for index in range(self.memory.block_count):
            block = &self.memory.table[index]
            with nogil:
                page = find_next_set(block.requested, 0, block.pages)
                while page < block.pages:
                    if not test_bit_shared(block.received, page):
                        self.ask(index, page)
                        count += 1
                    page = find_next_set(block.requested, page + 1, block.pages)
        return count
