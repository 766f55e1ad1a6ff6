from collections.abc import Iterable

from ..machine import DirtyLog
from .bitmap import Bitmap
from .block import RAMBlock
from .scout import Scout

CHUNK_SHIFT: int
"""log2 of the target pages that are protected again at once, unless told otherwise."""

class DirtyPages:
    """What still has to be sent of *blocks*: every page at first.

    *chunk_shift*: log2 of the target pages that are protected again at once, clamped to 6 … 31
    (`x-clear-bitmap-shift`, ram.md §5).  Counts are in target pages.
    """

    blocks: list[RAMBlock]
    bitmaps: list[Bitmap]
    log: DirtyLog
    chunk_shift: int
    block_count: int
    remaining: int
    sync_count: int
    synced_pages: int
    new_pages: int
    def __init__(self, blocks: Iterable[RAMBlock], log: DirtyLog, chunk_shift: int = ...) -> None: ...
    def sync(self) -> int:
        """Fetch the machine's log into the bitmaps; returns how many pages are newly dirty."""
    def visit_chunk(self, block_index: int, page: int) -> None:
        """Protect the chunk around *page* again, and learn which of its pages exist at all."""
    def tell(self, scout: Scout | None) -> None:
        """Let *scout* know of each chunk that is visited from now on; None: nobody goes ahead."""
    def look_ahead(self, block_index: int, page: int) -> None:
        """What `visit_chunk` would do, before the sender comes there; then look which of the pages are zero.

        For another thread than the one that sends, which is not kept waiting for longer than a look at 64 pages or a
        call to the kernel takes.
        """
    def unknown_pages(self, block_index: int, page: int) -> int:
        """How many pages of the chunk around *page* must be sent and exist, and were not looked at."""
    def next_chunk(self, block_index: int, page: int) -> int | None:
        """The first dirty page behind the chunk around *page*, None when the block has no more."""
    def visit_if_new(self, block_index: int, page: int) -> None:
        """`visit_chunk`, unless that was done since the last sync."""
    def close(self) -> None:
        """Give the descriptors back; nothing is sent any more."""
