from collections.abc import Iterable

from .bitmap import Bitmap
from .block import RAMBlock

class Landing:
    """Where the pages of *blocks* go, and which have come; one a migration."""

    blocks: list[RAMBlock]
    received: list[Bitmap]
    """Which pages of each block a record has come for."""
    names: list[bytes]
    def __init__(self, blocks: Iterable[RAMBlock]) -> None: ...
    def share(self) -> None:
        """Several threads load pages from now on: none may read ahead into pages that are not its own."""
