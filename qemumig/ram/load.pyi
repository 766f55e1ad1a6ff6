from collections.abc import Callable

from ..wire.stream import InputStream
from .block import RAMBlock
from .landing import Landing

class RamLoader:
    """Loads the records of section `ram` from *stream* to *landing*; one a channel and migration.

    *on_flush* is called at a sync point of multifd (MULTIFD_FLUSH); None: there is no multifd, and the mark no meaning.

    The loader remembers the block that CONTINUE refers to across sections.  Counts are in target pages.
    """

    stream: InputStream
    landing: Landing
    @property
    def blocks(self) -> list[RAMBlock]: ...
    zero_pages: int
    normal_pages: int
    encoded_pages: int
    """Patched with a delta."""
    compressed_pages: int
    load_pages: Callable[[int], int] | None
    """Loads the pages of the block with that index, for the stream has come to what follows its entry in the list, and
    returns how many came: mapped-ram.  None: pages come as records."""
    wrong_guesses: int
    """How often the pages read ahead were not the ones that came."""
    def __init__(self, stream: InputStream, landing: Landing, on_flush: Callable[[], None] | None = None) -> None: ...
    def load_body(self, look_round: Callable[[], None] | None = None) -> None:
        """Load records up to the end of the section's body.

        *look_round* is called after every 32768 records.  Raises StreamError for a record that is refused: unknown
        flags or block, an offset past the block's end, a block list that does not fit this machine, an early end.
        """
