from collections.abc import Iterable

from ..ram.dirty import DirtyPages
from ..wire.stream import OutputStream
from .uffd import Userfaultfd

class Lane:
    """One channel of pages."""

    out: OutputStream

class PageServer:
    """Sends the pages of *dirty* while the guest runs at the destination, each host page once."""

    dirty: DirtyPages
    main: Lane
    urgent: Lane | None
    wake_fd: int
    """An eventfd that is readable while requests wait in the queue."""
    requests: int
    """Page requests that came."""
    zero_pages: int
    normal_pages: int
    def __init__(self, dirty: DirtyPages) -> None: ...
    def close(self) -> None:
        """Give the eventfd back; the figures stay."""
    def connect(self, out: OutputStream, urgent: OutputStream | None = None) -> None:
        """Send to *out* from now on, urgent pages to *urgent* if there is one; nothing was sent on either before."""
    def unprotect_by(self, uffd: Userfaultfd) -> None:
        """Pages are protected, by *uffd*, until they have left."""
    def protect_all(self) -> None:
        """Protect all of memory: it stays as it is until it has left.  MachineError when the kernel refuses."""
    def serve(self, byte_limit: int, page_limit: int) -> bool:
        """Send what is asked for, and about *byte_limit* bytes and *page_limit* pages besides; True when all is clean."""
    def make_uniform(self) -> None:
        """A host page of which some target page is dirty is dirty as a whole; then count anew."""
    def send_first(self, places: Iterable[tuple[int, int]]) -> None:
        """Send those of the host pages at *places* (a block's index, an offset in it) that are dirty as if asked for.

        By the urgent channel they leave at once; on the main channel they are what the next `serve` begins with.
        """
    def put_discards(self) -> None:
        """Tell the destination of all that is dirty, block by block, on the main channel; but of each page only once."""
    def note_clean(self) -> None:
        """Remember what the destination has already: it is given back by `begin_release`."""
    def begin_release(self) -> None:
        """The guest is at the destination: give back what it had at the switch, and from now on what has left."""
    def bitmap_size(self, idstr: str) -> int:
        """Bytes of a block's received bitmap on the wire; KeyError for a block that does not exist."""
    def index_of(self, idstr: str) -> int: ...
    def take_received(self, idstr: str, bitmap: bytes) -> None:
        """The destination has these pages of a block: the others are to be sent.

        StreamError when it claims one that was never sent: what it has then is not the guest's.
        """
    def forget_requests(self) -> None:
        """The connection is lost: the destination will ask again for what it still needs."""
