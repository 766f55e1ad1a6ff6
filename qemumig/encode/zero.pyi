IMPLEMENTATIONS: tuple[str, ...]
"""Names of the twins that this processor can run, the widest last."""
IMPLEMENTATION: str
"""The one in use."""

def buffer_is_zero(page: bytes | bytearray | memoryview, implementation: str | None = None) -> bool:
    """True when *page* holds only zeroes; its length is a positive multiple of 256.

    *implementation* picks one of IMPLEMENTATIONS; ValueError when it is not there or the length does not fit.
    """
