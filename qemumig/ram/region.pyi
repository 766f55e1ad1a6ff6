from collections.abc import Iterable

from .bitmap import Bitmap
from .block import RAMBlock
from .dirty import DirtyPages
from .landing import Landing

class Ranges:
    """(first, count) of target pages of one block: any number of threads take them, each range goes to one.

    A range begins at a multiple of 64 pages, and no two overlap.  *in_turns*: only one thread at a time writes.
    """

    def __init__(self, ranges: Iterable[tuple[int, int]], *, in_turns: bool = False) -> None: ...

class Region:
    """The pages of *block* at their places in a file; offsets are those of the file, counts are in target pages.

    `write` and `read` work until no range is left, beside other threads that share the ranges; after an error of one none
    takes another.  ValueError when a range does not lie in the block.
    """

    bitmap: Bitmap
    """Which pages the file has."""
    bitmap_offset: int
    pages_offset: int
    idstr: str
    def __init__(self, block: RAMBlock, bitmap_offset: int, pages_offset: int) -> None: ...
    def write(self, fd: int, dirty: DirtyPages, block_index: int, ranges: Ranges) -> tuple[int, int]:
        """Write the dirty ones of *ranges*, which are dirty no longer; returns (zero, normal) of this thread.

        ChannelError when the file does not take them.
        """
    def read(self, fd: int, landing: Landing, block_index: int, ranges: Ranges) -> int:
        """Read what the file has of *ranges*; returns how many pages came to this thread.

        StreamError when the file ends before, ChannelError when it cannot be read.
        """
