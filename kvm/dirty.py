"""The machine's dirty log: KVM's log of memory slots, seen as a log of RAM blocks.

In    KVM's bitmap of each slot; marks of what we wrote to guest memory ourselves
Out   bits of a block, ORed into the caller's words

    block pc.bios    |00 01 … 0F|          one block may be seen in several slots: their bits are merged
    slot 1 ──────────▲          ▲          and a slot may start anywhere in its block, so the words are
    slot 3 ──────────┴──────────┘          shifted on their way

In manual mode KVM clears a page only when it is told to, and the caller may tell it only of pages that it has seen
dirty.  So the words of the last fetch are kept for each slot, and bits leave them when they are cleared: a second
clear of the same range then clears nothing, where it would have lost a write.

Marks are handed out once, by the next fetch.

Threads   One thread at a time starts, fetches, clears and stops; clears may come from another than the rest.  Any marks.
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qemumig.errors import MachineError
from qemumig.ram.bitmap import Bitmap, merge
from qemumig.ram.block import RAMBlock

from .dirty_log import DirtyLog
from .errors import KvmError

PAGE_SIZE = 4096
WORD_PAGES = 64
_ALL = (1 << WORD_PAGES) - 1


@dataclass(frozen=True, slots=True)
class LoggedSlot:
    """KVM's slot number, and the *page_count* pages of *block* from *first_page* on that it shows."""

    slot: int
    block: RAMBlock
    first_page: int
    page_count: int


class _SlotLog:
    """One slot's log, and the words that its last fetch gave."""

    def __init__(self, log: DirtyLog, where: LoggedSlot) -> None:
        self._log = log
        self.slot = where.slot
        self.first_page = where.first_page
        self.page_count = where.page_count
        words = (where.page_count + WORD_PAGES - 1) // WORD_PAGES
        self._reported = memoryview(array("Q", bytes(8 * words)))
        self._zeroes = memoryview(array("Q", bytes(8 * words)))

    def forget(self) -> None:
        """Nothing was reported yet."""
        self._reported[:] = self._zeroes

    def fetch(self, words: memoryview) -> None:
        """OR the slot's bits into *words* of its block."""
        self._log.fetch(self.slot, self._reported)
        merge(words, self.first_page, self._reported, self.page_count)

    def clear(self, first_page: int, page_count: int) -> None:
        """Clear what was reported in that range of the block, as far as this slot shows it."""
        start = max(first_page - self.first_page, 0)
        end = min(first_page + page_count - self.first_page, self.page_count)
        if start >= end:
            return
        whole_end = end % WORD_PAGES == 0 or end == self.page_count
        first, last = start // WORD_PAGES, (end + WORD_PAGES - 1) // WORD_PAGES
        if not any(self._reported[first:last]):
            return
        if start % WORD_PAGES == 0 and whole_end:
            self._log.clear(self.slot, self._reported[first:last], start, end - start)
            self._reported[first:last] = self._zeroes[first:last]
        else:
            self._clear_within_words(start, end, first, last)

    def _clear_within_words(self, start: int, end: int, first: int, last: int) -> None:
        """The same for a range that starts or ends inside a word: its neighbours' bits stay as they are."""
        words = array("Q", self._reported[first:last])
        words[0] &= _ALL << start % WORD_PAGES & _ALL
        words[-1] &= _ALL >> -end % WORD_PAGES
        page_count = min(last * WORD_PAGES, self.page_count) - first * WORD_PAGES
        self._log.clear(self.slot, words, first * WORD_PAGES, page_count)
        for index, word in enumerate(words, first):
            self._reported[index] &= ~word & _ALL


class MachineDirtyLog:
    """Fulfils qemumig.machine.DirtyLog; *slots* show all of the machine's RAM, whose guest *is_running* or not."""

    def __init__(self, log: DirtyLog, slots: Sequence[LoggedSlot], is_running: Callable[[], bool]) -> None:
        self.manual_clear = log.manual
        self._log = log
        self._is_running = is_running
        # Touched by whoever starts, fetches, clears or stops.
        self._slots: dict[str, list[_SlotLog]] = {}
        for slot in slots:
            self._slots.setdefault(slot.block.idstr, []).append(_SlotLog(log, slot))
        # Under lock.
        self._lock = threading.Lock()
        self._logging = False
        self._marks = {slot.block.idstr: Bitmap(slot.block.pages) for slot in slots}

    def start(self) -> None:
        """Begin to log writes to all of RAM; MachineError, and no logging, when KVM refuses."""
        with self._lock:
            for marks in self._marks.values():
                marks.clear_all()
            self._logging = True
        for slot in self._all_slots():
            slot.forget()
        try:
            self._log.start(*self._numbers(), at_once=not self._is_running())
        except KvmError as error:
            self.stop()
            raise MachineError(f"dirty logging cannot start: {error}") from error

    def stop(self) -> None:
        """End logging; what was logged is gone."""
        with self._lock:
            self._logging = False
        try:
            self._log.stop(*self._numbers())
        except KvmError as error:
            raise MachineError(f"dirty logging cannot stop: {error}") from error

    def fetch(self, block: RAMBlock, words: memoryview) -> None:
        """OR the pages of *block* written since they were last cleared into *words* (uint64, format "Q")."""
        try:
            for slot in self._slots[block.idstr]:
                slot.fetch(words)
        except KvmError as error:
            raise MachineError(f"RAM block {block.idstr!r}: its dirty log cannot be read: {error}") from error
        with self._lock:
            marks = self._marks[block.idstr]
            merge(words, 0, memoryview(marks), block.pages)
            marks.clear_all()

    def clear(self, block: RAMBlock, first_page: int, page_count: int) -> None:
        """Protect the pages that the last `fetch` reported in [first_page, first_page + page_count) again."""
        if not self.manual_clear:
            return
        if first_page < 0 or page_count < 0 or first_page + page_count > block.pages:
            raise ValueError(
                f"RAM block {block.idstr!r} has {block.pages} pages, cannot clear {page_count} from {first_page}"
            )
        try:
            for slot in self._slots[block.idstr]:
                slot.clear(first_page, page_count)
        except KvmError as error:
            raise MachineError(f"RAM block {block.idstr!r}: its dirty log cannot be cleared: {error}") from error

    def mark(self, block: RAMBlock, offset: int, length: int) -> None:
        """*length* bytes from *offset* were written by ourselves, and are there already."""
        with self._lock:
            if self._logging and length > 0:
                marks = self._marks[block.idstr]
                for page in range(offset // PAGE_SIZE, (offset + length - 1) // PAGE_SIZE + 1):
                    marks.set(page)

    def _all_slots(self) -> list[_SlotLog]:
        return [slot for slots in self._slots.values() for slot in slots]

    def _numbers(self) -> list[int]:
        return [slot.slot for slot in self._all_slots()]
