from collections.abc import Callable, Iterable

from ..wire.stream import InputStream
from .bitmap import Bitmap
from .block import RAMBlock

class RamLoader:
    """Loads the records of section `ram` from *stream* into *blocks*; one a channel and migration.

    The loader remembers the block that CONTINUE refers to across sections.  Counts are in target pages.
    """

    stream: InputStream
    blocks: list[RAMBlock]
    received: list[Bitmap]
    """Which pages of each block a record has come for."""
    zero_pages: int
    normal_pages: int
    wrong_guesses: int
    """How often the pages read ahead were not the ones that came."""
    def __init__(self, stream: InputStream, blocks: Iterable[RAMBlock]) -> None: ...
    def load_body(self, look_round: Callable[[], None] | None = None) -> None:
        """Load records up to the end of the section's body.

        *look_round* is called after every 32768 records.  Raises StreamError for a record that is refused: unknown
        flags or block, an offset past the block's end, a block list that does not fit this machine, an early end.
        """
