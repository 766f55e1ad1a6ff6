from .bitmap import Bitmap

class PageMap:
    """The kernel's page map of this process; close it when done.

    *scan*: use PAGEMAP_SCAN where the kernel (6.7 or later) has it; without it the map is read entry by entry.
    """

    def __init__(self, *, scan: bool = True) -> None: ...
    def close(self) -> None: ...
    def populated(self, address: int, pages: int) -> Bitmap:
        """Which of *pages* pages (of 4096 bytes) from *address* on may hold something else than zeroes.

        Meaningful for private anonymous memory only.  Every page counts when the kernel does not say.
        """
