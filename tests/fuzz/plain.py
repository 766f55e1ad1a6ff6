"""The plain reader of streams, for records that come without the stream around them."""

from __future__ import annotations

from array import array

from tests.fuzz.oracle import PAGE, Guarded
from tests.support.plain_stream import PlainBlock, PlainStreamError, Reader


def plain_block(name: str, memory: Guarded, pages: int, filled: int = 0) -> PlainBlock:
    """What *memory* is when nothing has come yet, *pages* of it in use."""
    contents = bytearray([filled]) * memory.size
    return PlainBlock(name, pages * PAGE, memory=contents, times_sent=array("I", bytes(4 * (memory.size // PAGE))))


class PlainRecords(Reader):
    """Records for *blocks* that are there already; their list may come more than once, and changes their lengths.

    *address_size*: how many bytes follow each entry of the list; *page_sizes*: how many follow that of a block.
    """

    def __init__(
        self, data: bytes, blocks: list[PlainBlock], *, address_size: int = 0, page_sizes: dict[str, int] | None = None
    ) -> None:
        super().__init__(data, background_snapshot=False)
        self.stream.blocks = {block.name: block for block in blocks}
        self._address_size = address_size
        self._page_sizes = page_sizes or {}

    def read_block_list(self, total: int) -> None:
        while total > 0:
            name, length = self.at.name(), self.at.number(8)
            if name not in self.stream.blocks:
                raise PlainStreamError(f"block {name!r} is not here")
            self.stream.blocks[name].length = length
            self.at.take(self._address_size + self._page_sizes.get(name, 0))
            total -= length
