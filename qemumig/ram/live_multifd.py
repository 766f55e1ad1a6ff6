"""The live section `ram` of a source whose pages travel on the channels of multifd (multifd.md §6, §8).

    once a round         a mark in START and at the end of END, and whenever the walk has passed the last block
    after every section  the end of a section's body is the mark (QEMU before 8.1; `multifd-flush-after-each-section`)

Before a switch to postcopy there is one more, in a PART of its own: the channels have nothing to carry behind it.

A QEMU that knows only the second way does not know zero pages in packets either, and would lose them: then they are
records of the main stream, whatever `zero-page-detection` says.
"""

from __future__ import annotations

from collections.abc import Sequence

from .. import trace
from ..machine import DirtyLog
from ..multifd.senders import Senders
from ..options import MigrationOptions
from ..wire.format import TARGET_PAGE_SIZE
from ..wire.stream import OutputStream
from .block import RAMBlock
from .live import STEP_BYTES, RamSource
from .save import PageSender
from .save_multifd import MultifdPageSender


class MultifdRamSource(RamSource):
    """All of RAM on its way: pages to *senders*, the sections themselves to *out*."""

    sender: MultifdPageSender

    def __init__(
        self, blocks: Sequence[RAMBlock], log: DirtyLog, out: OutputStream, options: MigrationOptions, senders: Senders
    ) -> None:
        self._senders = senders
        self._per_section = options.migration_property("multifd-flush-after-each-section")
        self._is_started = False
        super().__init__(blocks, log, out, options)

    def _new_sender(self) -> PageSender:
        return MultifdPageSender(
            self.dirty,
            self._out,
            self._senders.dispatch,
            zero_page_detection=zero_page_detection(self._options),
            sync_each_round=not self._per_section,
        )

    @property
    def remaining(self) -> int:
        """Bytes of pages that are dirty or wait for their channel."""
        return super().remaining + self._senders.waiting_pages * TARGET_PAGE_SIZE

    @property
    def sent_bytes(self) -> int:
        return self._out.offset + self._senders.sent_bytes

    @property
    def zero_pages(self) -> int:
        return self.sender.zero_pages + self._senders.zero_pages

    @property
    def normal_pages(self) -> int:
        return self._senders.normal_pages

    @property
    def data_pages(self) -> int:
        return self._senders.normal_pages

    @property
    def multifd_bytes(self) -> int:
        return self._senders.sent_bytes

    @property
    def missed_zero_copy(self) -> int:
        return self._senders.missed_zero_copy

    def start_scout(self) -> None:
        """None: the channels look for zeroes."""

    def write_rest(self) -> None:
        super().write_rest()
        self._senders.dispatch.drain()  # nothing may be in doubt when the devices follow

    def write_sync(self) -> None:
        """A PART's body without pages: whatever was sent is in memory there when it has been loaded."""
        if not self._per_section:
            self.sender.write_mark()
        self._end_body()
        self._senders.dispatch.drain()

    def _send_step(self, limit: int) -> bool:
        is_clean = self.sender.send(limit, STEP_BYTES // TARGET_PAGE_SIZE)
        if is_clean or limit < STEP_BYTES:
            self._senders.dispatch.drain()  # the end of a round, or of what the rate limit allows: count what has left
        return is_clean

    def _end_body(self) -> None:
        if self._per_section:
            self._senders.dispatch.sync()
        elif not self._is_started or self.sender.last_stage:
            self.sender.write_mark()
        trace.multifd_send_section_end(self._senders.dispatch.queued_pages)
        self._is_started = True
        super()._end_body()


def zero_page_detection(options: MigrationOptions) -> str:
    """Who looks for zero pages, and where they go: `none`, `legacy` or `multifd`."""
    wanted: str = options.parameter("zero-page-detection")
    if wanted == "multifd" and options.migration_property("multifd-flush-after-each-section"):
        return "legacy"
    return wanted
