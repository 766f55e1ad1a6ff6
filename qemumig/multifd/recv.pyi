from collections.abc import Callable

from ..encode.compress import Decompressor
from ..errors import MigrationError
from ..ram.landing import Landing
from ..wire.stream import InputStream

METHODS: dict[int, str]
"""Compression flag of a packet: the name that parameter `multifd-compression` has for it."""

class Meeting:
    """Where *count* channels and the main loader meet.

    *on_failure* is called once, in the thread of the channel that failed first: it has to wake the main loader, wherever
    that waits but in `sync`.
    """

    count: int
    error: MigrationError | None
    """What the first channel failed of."""
    def __init__(self, count: int, on_failure: Callable[[], None]) -> None: ...
    def sync(self, quit_fd: int) -> None:
        """Wait until every channel has loaded a SYNC, and let them go.

        Raises what a channel failed of; StreamError when one has ended and cannot come any more, MigrationCancelled when
        told to quit.
        """
    def fail(self, error: MigrationError) -> None:
        """A channel failed of *error*; all others end, too."""
    def raise_failure(self) -> None:
        """Raise what a channel failed of, if one did."""
    def release(self) -> None:
        """Give the descriptor back: the channels' threads have ended, and nobody waits any more."""
    def close(self, *, is_complete: bool) -> None:
        """Nothing is loaded any more, and nobody waits.

        *is_complete*: the load ends well; raises then what a channel failed of, and StreamError when one has loaded pages
        that no sync point covers.
        """

class Receiver:
    """Loads the packets of channel *channel_id*, whose init packet has been read.  Counts are in target pages."""

    channel_id: int
    stream: InputStream
    normal_pages: int
    zero_pages: int
    def __init__(self, channel_id: int, stream: InputStream, meeting: Meeting, landing: Landing) -> None: ...
    def decompress_with(self, method: int, decompressor: Decompressor) -> None:
        """Expect packets of compression *method* (a MultifdFlag) and decompress them with *decompressor*."""
    def run(self) -> None:
        """Load packets until the stream or the load is over; a failure goes to the meeting."""
