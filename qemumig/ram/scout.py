"""A thread ahead of the one that sends, which prepares the next chunk and finds its pages of zeroes (ram.md §5, §6).

    sender   enters chunk k, and says so ──▶ pages upwards ───────▶╎◀─────── downwards, in chunk k, then in k + 1   scout

Memory that was touched and is zero, as that of guests whose memory was allocated beforehand, has to be read to be known;
the destination has next to nothing to do with it, so half of the time is saved.  Where few pages of a chunk are zero the
scout does not look at them: the sender, which copies them right away, does that for less.

Threads   `mig/src/scout` runs `_run`; everything else is the sender's.
"""

from __future__ import annotations

import threading

from ..errors import MachineError
from ..threads import start_thread
from .dirty import DirtyPages

LEAST_PAGES = 1 << 11  # of a chunk that must be looked at: with less the sender is through before a thread is awake


class Scout:
    """Goes ahead in *dirty*, in a thread that is started when there is something to do; `close` ends it."""

    def __init__(self, dirty: DirtyPages) -> None:
        self._dirty = dirty
        self._wake = threading.Event()
        self._place = 0, 0  # block and page where the sender has entered a chunk
        self._is_ended = False
        self._thread: threading.Thread | None = None

    def follow(self, block_index: int, page: int) -> None:
        """The sender has entered the chunk around *page*."""
        if self._dirty.unknown_pages(block_index, page) < LEAST_PAGES:
            return
        self._place = block_index, page
        self._wake.set()
        if self._thread is None:
            self._thread = start_thread("mig/src/scout", self._run)

    def close(self) -> None:
        """Return when nobody goes ahead any more."""
        self._is_ended = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while self._wake.wait() and not self._is_ended:
            self._wake.clear()
            block_index, page = self._place
            try:
                self._dirty.look_ahead(block_index, page)
                if (following := self._dirty.next_chunk(block_index, page)) is not None:
                    self._dirty.look_ahead(block_index, following)
            except MachineError:
                return  # the sender meets it where it can be told
