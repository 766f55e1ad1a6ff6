from ..multifd.send import Dispatch
from ..wire.stream import OutputStream
from .dirty import DirtyPages
from .save import PageSender

class MultifdPageSender(PageSender):
    """Sends the pages of *dirty* through *dispatch*, marks and zero records to *out*.

    *zero_page_detection*: `none`, `legacy` (here, as records of the main stream) or `multifd` (by the channels, in their
    packets).  *sync_each_round*: sync whenever the walk has passed the last block.  Its counts are of the main stream.
    """

    def __init__(
        self, dirty: DirtyPages, out: OutputStream, dispatch: Dispatch, *, zero_page_detection: str, sync_each_round: bool
    ) -> None: ...
    def write_mark(self) -> None:
        """A sync point on the channels and its mark, MULTIFD_FLUSH, on the main stream, which is flushed."""
