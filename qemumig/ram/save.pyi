from ..wire.stream import OutputStream
from .cache import PageCache
from .dirty import DirtyPages

class PageSender:
    """Sends the pages of *dirty* to *out*, in the order of the walk; one a channel.

    Protects chunks of the machine's RAM again as it reaches them.  Counts are in target pages.
    """

    dirty: DirtyPages
    out: OutputStream
    zero_pages: int
    normal_pages: int
    """Sent whole; those that went out as a delta are in neither of the two."""
    compressed_pages: int
    handled_pages: int
    """All that were dealt with, those that the destination had already included."""
    last_stage: bool
    """Set when the guest is stopped: nothing enters the cache any more."""
    def __init__(self, dirty: DirtyPages, out: OutputStream) -> None: ...
    def encode_with(self, cache: PageCache | None) -> None:
        """Send pages through *cache* from the second round on; None: send them whole, from now on and for good."""
    def compress_at(self, level: int) -> None:
        """Send pages as zlib streams of their own, at *level* 0 to 9, where no delta is sent: for QEMU before 9.1, with its
        capability `compress`.  OptionError when the library is missing."""
    @property
    def rounds(self) -> int:
        """How often the walk has passed the last block."""
    def send(self, byte_limit: int, page_limit: int) -> bool:
        """Send dirty pages, about *byte_limit* bytes and at most *page_limit* pages; True when none is left.

        Raises ChannelError when the channel breaks, MigrationCancelled when it was told to quit.
        """
