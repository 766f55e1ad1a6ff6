class PageCache:
    """What the destination has of the pages that were sent last; *size* bytes, a power of two from 4096 on.

    Belongs to the thread that sends.  Counts are in target pages.  OptionError when the size does not fit, MemoryError
    when there is no room for it.
    """

    size: int
    hits: int
    """Pages that were here: sent as a delta, not at all, or whole because the delta was too long (QAPI's `pages`)."""
    misses: int
    overflows: int
    sent_bytes: int
    """Sent for hits: records of deltas without their first 8 bytes, and 4096 for each overflow."""
    miss_rate: float
    """Misses per page handled in the last period."""
    encoding_rate: float
    """Bytes of guest memory per byte sent, hits of the last period; 0 when there were none."""

    def __init__(self, size: int) -> None: ...
    @property
    def slot_count(self) -> int: ...
    def held(self, page: int) -> bytes | None:
        """The copy of page number *page*, None when it is not here; its age stays."""
    def decide(
        self, page: int, content: bytes | bytearray | memoryview, generation: int, last_stage: bool = False
    ) -> tuple[str, bytes]:
        """How the page goes out: ("nothing", b""), ("delta", the delta) or ("page", its 4096 bytes).

        *page* is its number in all of RAM, *content* its 4096 bytes, *generation* the number of bitmap syncs so far.
        In the last stage nothing is inserted.
        """
    def decide_zero(self, page: int, generation: int) -> bool:
        """The page goes out as ZERO; True when the cache now holds it, False when its slot is another page's."""
    def add_record(self, record_bytes: int) -> None:
        """A record of a delta, *record_bytes* long with its head and name, was put on the stream."""
    def resize(self, size: int) -> None:
        """Make it *size* bytes; where two pages meet in a slot, the one used last stays.

        Nothing that refers to the old copies may be pending on a stream.  On an error the cache is as it was.
        """
    def end_period(self, handled: int) -> None:
        """A period is over; *handled* pages were sent or left out since the migration began: settle the rates."""
