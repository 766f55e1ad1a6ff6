"""The same walk, but pages leave on the channels of multifd (multifd.md §3, §6; zero pages: ram.md §6).

    page ─▶ legacy: is it zero? ─▶ a ZERO record on the main stream
        └─▶ multifd: is it known to be zero without a look? ─▶ batch, as a zero page
        └─▶ batch of pages of one block ─▶ some channel, which may look whether they are zero

Once a round, before the first page of the next one, a sync point goes to every channel and its mark to the main stream; a
source that syncs after every section leaves that to whoever writes the sections.

Threads   the migration thread; no GIL inside.
Holds     (1) between two sync points no page is put into two batches
          (2) the mark reaches the kernel at once: the destination's channels stand still until it is there
"""

from libc.stdint cimport uint8_t, uint64_t

from ..encode.zero cimport is_zero
from ..multifd.send cimport Dispatch
from ..wire.format cimport RAM_SAVE_FLAG_MULTIFD_FLUSH, TARGET_PAGE_SIZE
from ..wire.stream cimport STREAM_FAILED, STREAM_OK, put_be64
from .bitmap cimport test_bit
from .save cimport PageSender


cdef class MultifdPageSender(PageSender):
    """Sends pages through *dispatch*; see save_multifd.pyi."""

    cdef Dispatch dispatch
    cdef bint zero_on_main            # zero pages are looked for here, and are records of the main stream
    cdef bint zero_in_packets         # the channels look for them
    cdef bint sync_each_round
    cdef int block                    # of the batch at hand; −1: none yet
    cdef uint64_t synced_rounds       # what the walk had behind it at the last sync point
    cdef uint64_t queued_bytes        # of pages that were put into batches
    cdef bint has_failed              # a channel

    def __init__(self, dirty, out, Dispatch dispatch not None, *, zero_page_detection, bint sync_each_round):
        self.dispatch = dispatch
        self.zero_on_main = zero_page_detection == "legacy"
        self.zero_in_packets = zero_page_detection == "multifd"
        self.sync_each_round = sync_each_round
        self.block = -1

    cdef uint64_t sent_bytes(self) noexcept nogil:
        return self.out.offset + self.queued_bytes

    cdef uint64_t send_zeroes(self, uint64_t limit) noexcept nogil:
        """None in one piece: the channels are told of each."""
        return 0

    cdef int send_page(self) noexcept nogil:
        """Put the page at the walk's position, whose dirty bit is clear already, on its way."""
        cdef const uint8_t *page = self.dirty.table[self.walk.block].host + self.walk.page * TARGET_PAGE_SIZE
        cdef bint is_known = not test_bit(self.dirty.table[self.walk.block].populated, self.walk.page)
        cdef int status
        if self.sync_each_round and self.walk.rounds != self.synced_rounds:
            status = self.mark_sync()
            if status != STREAM_OK:
                return status
        if self.zero_on_main and (is_known or is_zero(page, TARGET_PAGE_SIZE)):
            return self.send_zero()
        if self.walk.block != self.block:
            if not self.dispatch.hand_over():
                return self.channel_failed()
            self.block = self.walk.block
            self.dispatch.choose_block(
                self.dirty.table[self.block].host, self.name_table[self.block] + 1, self.name_length[self.block] - 1
            )
        is_known = is_known and self.zero_in_packets
        if not is_known:
            self.queued_bytes += TARGET_PAGE_SIZE
        if self.dispatch.add_page(self.walk.page * TARGET_PAGE_SIZE, is_known) and not self.dispatch.hand_over():
            return self.channel_failed()
        return STREAM_OK

    cdef int channel_failed(self) noexcept nogil:
        self.has_failed = True
        return STREAM_FAILED

    cdef int mark_sync(self) noexcept nogil:
        """A sync point on the channels, and its mark on the main stream."""
        cdef uint8_t mark[8]
        cdef int status
        if not self.dispatch.put_sync():
            return self.channel_failed()
        self.synced_rounds = self.walk.rounds
        put_be64(mark, RAM_SAVE_FLAG_MULTIFD_FLUSH)
        status = self.out.put(mark, 8)
        return self.out.flush_pending() if status == STREAM_OK else status

    def write_mark(self):
        """A sync point here and now; see save_multifd.pyi."""
        with nogil:
            self.stream_status = self.mark_sync()
        if self.stream_status != STREAM_OK:
            self.raise_failure()

    def raise_failure(self):
        if self.has_failed:
            self.dispatch.raise_failure()
        self.out.raise_on(self.stream_status)
