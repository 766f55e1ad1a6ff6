def load_library() -> None:
    """Find it; to be called once before any of its functions is used.  OptionError when the system has none."""

def finding(status: int) -> str:
    """What is wrong with a page's data, as a sentence."""

def compress(page: bytes | bytearray | memoryview, level: int = 1) -> bytes:
    """The zlib stream of *page*, 4096 bytes, at *level* 0 to 9."""

def decompress(data: bytes | bytearray | memoryview) -> bytes:
    """The 4096 bytes that *data* holds; ValueError when it does not hold exactly them, or is damaged."""
