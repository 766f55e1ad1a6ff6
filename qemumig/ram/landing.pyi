from collections.abc import Iterable

from .bitmap import Bitmap
from .block import RAMBlock

class Landing:
    """Where the pages of *blocks* go, and which have come; one a migration."""

    blocks: list[RAMBlock]
    received: list[Bitmap]
    """Which pages of each block a record has come for."""
    names: list[bytes]
    listed: set[int]
    """Indices of the blocks that the source has listed."""
    postcopy_advised: bool
    """The list of blocks tells page sizes that are not the usual one."""
    ignore_shared: bool
    def __init__(self, blocks: Iterable[RAMBlock], *, ignore_shared: bool = False) -> None:
        """*ignore_shared*: memory that the source has, too, is left as it is, and a page for it is refused (ram.md §9)."""
    def is_ignored(self, block: RAMBlock) -> bool:
        """Whether no page of *block* may come."""
    def forgotten(self) -> RAMBlock | None:
        """With *ignore_shared*, a shared block of which no page has come although it is not left out; None without one.

        A source that leaves out whatever is shared, as QEMU before 10.0 does, believed that this side has the memory.
        """
    def share(self) -> None:
        """Several threads load pages from now on: none may read ahead into pages that are not its own."""
