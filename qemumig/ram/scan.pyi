from collections.abc import Callable
from mmap import mmap
from typing import Literal

class RamScan:
    """The RAM records of the stream in *data*; one a stream.

    With *keep_pages* it remembers where the newest content of every page lies (8 bytes a page); deltas are then
    applied, and the pages they change are kept in the file *scratch_fd*.  *page_size* is the target page's.
    ValueError for a page size that no target has.
    """

    page_size: int
    names: list[bytes]
    """Of the blocks, in the order in which they were added."""
    flushes: int
    """MULTIFD_FLUSH records so far."""
    def __init__(
        self, data: bytes | memoryview | mmap, page_size: int, keep_pages: bool = False, scratch_fd: int = -1
    ) -> None: ...
    @property
    def offset(self) -> int:
        """Where the walk stands."""
    @property
    def list_total(self) -> int:
        """What the block list at hand says its lengths add up to, in bytes."""
    def add_block(self, name: bytes, pages: int | None = None) -> int:
        """Announce a block of that many pages and return its index; a name that is known keeps its own.

        Until a block of known length was announced, blocks are taken up as records name them.  StreamError when there
        are too many, or when there is no room for the entries of so many pages.
        """
    def walk_body(self, offset: int, look_round: Callable[[int], object] | None = None) -> Literal["eos", "list", "end"]:
        """Walk the records from *offset* on and say why it stopped: behind the end of the section's body, behind the
        head of a block list, or where the stream ends between two records.

        *look_round* gets the offset after every 8192 records.  Raises StreamError for a record that is refused,
        OSError when the scratch file fails.
        """
    def map_block(self, index: int, bitmap_offset: int, pages_offset: int) -> None:
        """Take the pages of a mapped-ram file: those whose bit is set lie at *pages_offset* + number × page size.

        ValueError when either reaches past the end of the data.
        """
    def counts(self, index: int) -> dict[str, int]:
        """Records of that block by kind: `zero`, `normal`, `xbzrle`, `compressed`."""
    def end(self, index: int) -> int:
        """One past the highest page of that block of which a record came; 0 when none did."""
