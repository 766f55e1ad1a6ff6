"""Small ELF files for loaders."""

from __future__ import annotations

import struct
from collections.abc import Sequence

X86_64 = 62


def elf_file(segments: Sequence[tuple[int, int, bytes, int]], *, entry: int, bits: int = 64, order: str = "<") -> bytes:
    """One with these loadable *segments* (virtual and physical address, bytes, size in memory), contents behind headers."""
    wide = bits == 64
    header_size, segment_size = (64, 56) if wide else (52, 32)
    table, contents = b"", b""
    for virtual, physical, data, size in segments:
        offset = header_size + segment_size * len(segments) + len(contents)
        if wide:
            table += struct.pack(order + "2I6Q", 1, 7, offset, virtual, physical, len(data), size, 4096)
        else:
            table += struct.pack(order + "8I", 1, offset, virtual, physical, len(data), size, 7, 4096)
        contents += data
    identity = b"\x7fELF" + bytes([2 if wide else 1, 1 if order == "<" else 2, 1, *bytes(9)])
    word = "Q" if wide else "I"
    numbers = (2, X86_64, 1, entry, header_size, 0, 0, header_size, segment_size, len(segments), 0, 0, 0)
    return identity + struct.pack(f"{order}HHI3{word}I6H", *numbers) + table + contents
