from collections.abc import Callable

from ..ram.bitmap import Bitmap
from ..ram.block import RAMBlock
from ..ram.landing import Landing
from ..wire.stream import InputStream
from .blocktime import FaultTimes
from .uffd import Userfaultfd

class MissingMemory:
    """Guest RAM of which pages are missing, shared by the fault thread and all receivers; of *landing*, what it lists."""

    landing: Landing
    blocks: list[RAMBlock]
    received: list[Bitmap]
    """Which target pages of each block are here."""
    uffd: Userfaultfd
    times: FaultTimes
    block_count: int
    def __init__(self, landing: Landing, uffd: Userfaultfd, times: FaultTimes) -> None: ...
    def register(self) -> None:
        """Have the kernel tell of missing pages in every block that the source sends; MachineError when it cannot."""
    def unregister(self) -> None:
        """All of it is ordinary memory again."""
    @property
    def placed_pages(self) -> int:
        """Host pages placed so far."""
    @property
    def times_placed(self) -> int:
        """How often pages were placed; neighbours that were placed at once count as one."""
    def missing_pages(self) -> int:
        """Target pages that the source has still to send."""
    def outstanding_pages(self) -> int:
        """Host pages that were asked for and are not here."""

class PageReceiver:
    """Places the pages that arrive on *stream*; one a channel.

    It remembers the block that CONTINUE refers to, and a large host page that is half here, across sections.  The source
    *forgets*, at times, to name the block at the head of a section when an urgent page of another block went before
    (QEMU 7.2 with `x-preempt-pre-7-2`, by experiment); what is missing tells which it can be.
    """

    stream: InputStream
    memory: MissingMemory
    zero_pages: int
    normal_pages: int
    def __init__(self, stream: InputStream, memory: MissingMemory, *, forgets: bool = False) -> None: ...
    def load_body(self, look_round: Callable[[], None] | None = None) -> None:
        """Place records up to the end of the section's body.

        *look_round* is called after every 32768 records.  Raises StreamError for a record that is refused, MachineError
        when the kernel does not take a page.
        """
    def load_channel(self) -> bool:
        """Place the records of a channel that holds nothing else; True when a mark ended it, False when it was closed."""
