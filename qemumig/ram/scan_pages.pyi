from .scan import RamScan

class ScannedPages:
    """The pages that *scan* has found; ValueError where it did not keep them, or does not know the block's length."""

    page_size: int
    def __init__(self, scan: RamScan) -> None: ...
    def read(self, index: int, first: int, count: int) -> bytearray:
        """The content of *count* pages; what was never sent reads as zeroes."""
    def export(self, index: int, fd: int, first: int, count: int) -> int:
        """Write those of *count* pages that are not zero to *fd*, each at its place; returns how many they were.

        OSError when writing fails.
        """
    def next_difference(self, index: int, other: ScannedPages, other_index: int, first: int, limit: int) -> tuple[int, int]:
        """The first run of pages, from *first* and below *limit*, in which two blocks differ: (begin, end); begin is
        *limit* when there is none."""
