"""How the pages of a packet are compressed: parameter `multifd-compression` and its levels (multifd.md §7)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..encode.compress import Compressor, Decompressor, ZlibCompressor, ZlibDecompressor, ZstdCompressor, ZstdDecompressor
from ..options import MigrationOptions
from ..wire.format import MultifdFlag

PARAMETER = "multifd-compression"


@dataclass(frozen=True)
class Method:
    """One method: its *flag* in packets, its *level* parameter, and what makes the two ends of a stream."""

    flag: MultifdFlag
    level: str
    compressor: Callable[[int], Compressor]
    decompressor: Callable[[], Decompressor]


METHODS = {
    "zlib": Method(MultifdFlag.MULTIFD_FLAG_ZLIB, "multifd-zlib-level", ZlibCompressor, ZlibDecompressor),
    "zstd": Method(MultifdFlag.MULTIFD_FLAG_ZSTD, "multifd-zstd-level", ZstdCompressor, ZstdDecompressor),
}


def method_of(options: MigrationOptions) -> Method | None:
    """What the parameters ask for; None: pages go as they are."""
    return METHODS.get(options.parameter(PARAMETER))
