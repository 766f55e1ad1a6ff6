from array import array

IMPLEMENTATIONS: tuple[str, ...]
"""Names of the twins that this processor can run, the widest last."""
IMPLEMENTATION: str
"""The one in use."""

def encode(
    old: bytes | bytearray | memoryview,
    new: bytes | bytearray | memoryview,
    limit: int = 4096,
    implementation: str | None = None,
) -> bytes | None:
    """The delta that turns *old* into *new*: empty when they are equal, None when it would exceed *limit* bytes.

    Both have the same length, 1 to 16383 bytes.  *implementation* picks one of IMPLEMENTATIONS; ValueError when it is
    not there or a length does not fit.
    """

def update(
    seen: bytearray | memoryview,
    page: bytes | bytearray | memoryview,
    delta: bytearray | memoryview,
    implementation: str | None = None,
    filled: array[int] | None = None,
) -> int:
    """Bring *seen* up to *page*; returns the length of what was written into *delta*.

    0: no byte differed; −1: *delta* is too short, and holds nothing of use.  *seen* equals *page* in each case.
    *filled*: four words of 64 bits, one for each whole block of 64 bytes of *seen*; 0: the block is zero, and not read.
    Bits of blocks that change are brought up to date.
    """

def decode(
    page: bytearray | memoryview,
    delta: bytes | bytearray | memoryview,
    implementation: str | None = None,
) -> None:
    """Patch *page* with *delta*.

    Raises StreamError for a malformed delta, which may leave the page half patched; its `offset` is the one in the delta.
    """
