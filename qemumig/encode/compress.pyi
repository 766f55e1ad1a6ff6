class Compressor:
    """One stream of compressed data, as long as the migration."""

    def compress(self, data: bytes, capacity: int = 0x100000) -> bytes:
        """One packet of *data*, at most *capacity* bytes of it; ValueError when it has no room."""

class Decompressor:
    """The other end of such a stream."""

    def decompress(self, data: bytes, length: int) -> bytes:
        """The *length* bytes that one packet, *data*, holds; ValueError when it holds more, fewer, or nonsense."""

class ZlibCompressor(Compressor):
    """zlib at *level*, 0 to 9; OptionError when the library is missing."""

    def __init__(self, level: int) -> None: ...

class ZlibDecompressor(Decompressor):
    """The other end of a zlib stream; OptionError when the library is missing."""

    def __init__(self) -> None: ...

class ZstdCompressor(Compressor):
    """zstd at *level*, 0 (its default) to 20; OptionError when the library is missing."""

    def __init__(self, level: int) -> None: ...

class ZstdDecompressor(Decompressor):
    """The other end of a zstd stream; OptionError when the library is missing."""

    def __init__(self) -> None: ...
