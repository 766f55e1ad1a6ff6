from collections.abc import Callable
from typing import NoReturn

from ..encode.compress import Compressor
from ..errors import MigrationError
from ..wire.stream import OutputStream
from .splice import Splice
from .zerocopy import ZeroCopy

class Dispatch:
    """The queues of *count* channels, and the batch that the migration thread fills.

    *on_failure* is called once, in the thread of the channel that failed first: it has to wake the migration thread,
    wherever that waits but here.
    """

    count: int
    queued_pages: int
    """Handed over so far; those of the batch at hand are not among them."""
    error: MigrationError | None
    """What the first channel failed of."""
    def __init__(self, count: int, on_failure: Callable[[], None]) -> None: ...
    def sync(self) -> None:
        """A sync point on every channel, behind all pages so far; raises what a channel failed of."""
    def drain(self) -> None:
        """Hand over what there is and wait until everything has left; raises what a channel failed of."""
    def raise_failure(self) -> NoReturn:
        """Raise what the first channel failed of, MigrationCancelled when none did."""
    def fail(self, error: MigrationError) -> None:
        """A channel failed of *error*; all others end, too."""
    def close(self) -> None:
        """The channels end; what is queued is dropped."""

class Sender:
    """Sends the batches of channel *channel_id*, whose init packet has been sent.  Counts are in target pages.

    *detects_zero*: look for zero pages here, in the channel's thread, and say so in the packets.
    """

    channel_id: int
    out: OutputStream
    normal_pages: int
    zero_pages: int
    def __init__(self, channel_id: int, out: OutputStream, dispatch: Dispatch, *, detects_zero: bool) -> None: ...
    def compress_with(self, method: int, compressor: Compressor) -> None:
        """Send packets of compression *method* (a MultifdFlag), made by *compressor*."""
    def send_uncopied_by(self, zero_copy: ZeroCopy) -> None:
        """Let the network take pages from where they lie, through *zero_copy* over the same channel."""
    def send_references_by(self, splice: Splice) -> None:
        """Let the kernel hand pages on by reference, through *splice* over the same channel."""
    @property
    def missed_zero_copy(self) -> int:
        """Sync points before which the kernel had copied all pages all the same."""
    def run(self) -> None:
        """Send batches until there will be no more; a failure goes to the dispatch."""
