"""The plainest XBZRLE encoder, and recorded streams taken apart page by page (xbzrle.md §2, §5)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.support.plain_stream import COMPRESS, FULL_PAGE, PAGE, XBZRLE, ZERO, Reader

KINDS = {ZERO: "zero", FULL_PAGE: "page", XBZRLE: "delta", COMPRESS: "compressed"}


def plain_delta(old: bytes, new: bytes, limit: int = PAGE) -> bytes | None:
    """The delta as QEMU makes it, byte by byte; None when it would not fit."""
    delta, i = b"", 0
    while i < len(old):
        if limit - len(delta) < 2:
            return None
        start = i
        while i < len(old) and old[i] == new[i]:
            i += 1
        if i == len(old):
            break
        equal, start = i - start, i
        while i < len(old) and old[i] != new[i]:
            i += 1
        delta += number(equal) + number(i - start) + new[start:i]
        if len(delta) > limit:
            return None
    return delta


def number(value: int) -> bytes:
    return bytes([value]) if value < 0x80 else bytes([0x80 | value & 0x7F, value >> 7])


@dataclass(frozen=True)
class PageRecord:
    """One record of a page: what it was on the destination before, and what it is after."""

    kind: str  # zero, page, delta, compressed
    round: int  # 1: the first walk over all of RAM
    page: int  # its number in all of RAM
    before: bytes
    after: bytes
    delta: bytes
    length: int  # of the record, head and name included


class PageReader(Reader):
    """Hands every record to *see* after it has taken effect."""

    def __init__(self, data: bytes, see: Callable[[PageRecord], None]) -> None:
        super().__init__(data, background_snapshot=False)
        self.see = see
        self.round = 1
        self.last_page = -1
        self.contents: dict[int, bytes] = {}

    def read_page(self, kind: int, offset: int, same_block: bool) -> None:
        start = self.at.offset
        super().read_page(kind, offset, same_block)
        assert self.block is not None
        blocks = list(self.stream.blocks.values())
        page = (
            offset + sum(block.length for block in blocks[: [one.name for one in blocks].index(self.block.name)])
        ) // PAGE
        if page <= self.last_page:
            self.round += 1
        self.last_page = page
        after = bytes(self.block.memory[offset : offset + PAGE])
        delta = b""
        if kind == XBZRLE:
            payload = start + (0 if same_block else 1 + len(self.block.name)) + 3
            delta = bytes(self.at.data[payload : self.at.offset])
        length = 8 + self.at.offset - start
        before = self.contents.get(page, bytes(PAGE))
        self.contents[page] = after
        self.see(PageRecord(KINDS[kind], self.round, page, before, after, delta, length))


def page_records(data: bytes) -> list[PageRecord]:
    """The records of all pages in the order of the stream *data*."""
    records: list[PageRecord] = []
    PageReader(data, records.append).run()
    return records
