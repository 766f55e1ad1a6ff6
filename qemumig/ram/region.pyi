from .bitmap import Bitmap
from .block import RAMBlock
from .dirty import DirtyPages
from .landing import Landing

class Region:
    """The pages of *block* at their places in a file; offsets are those of the file, counts are in target pages.

    A range begins at a multiple of 64 pages; ranges that do not overlap may be worked on by several threads at once.
    ValueError when a range does not lie in the block.
    """

    bitmap: Bitmap
    """Which pages the file has."""
    bitmap_offset: int
    pages_offset: int
    idstr: str
    def __init__(self, block: RAMBlock, bitmap_offset: int, pages_offset: int) -> None: ...
    def write(self, fd: int, dirty: DirtyPages, block_index: int, first: int, count: int) -> tuple[int, int]:
        """Write the dirty ones of *count* pages from *first* on, which are dirty no longer; returns (zero, normal).

        ChannelError when the file does not take them.
        """
    def read(self, fd: int, landing: Landing, block_index: int, first: int, count: int) -> int:
        """Read what the file has of *count* pages from *first* on; returns how many came.

        StreamError when the file ends before, ChannelError when it cannot be read.
        """
    def is_empty(self, first: int, count: int) -> bool:
        """True when the file has none of *count* pages from *first* on."""
