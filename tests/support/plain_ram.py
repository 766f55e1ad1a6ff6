"""Skips the RAM records of a precopy stream, so that what lies behind them can be tested; written for clearness.

It shares no code with the product and keeps no page.  stream.md §6.1 has the layout: a list of be64 words whose low
bits are flags, each with its data, up to the word that says "end of this section".
"""

from __future__ import annotations

PAGE = 4096


class PlainRam:
    """What one stream's RAM sections have in common: the block list, and whether it carries addresses."""

    def __init__(self, ignore_shared: bool = False) -> None:
        self.ignore_shared = ignore_shared
        self.blocks: dict[str, int] = {}

    def skip_body(self, data: bytes, at: int) -> int:
        """Where the body of a `ram` section that begins at *at* ends."""
        while True:
            word = int.from_bytes(data[at : at + 8], "big")
            at += 8
            flags = word & (PAGE - 1)
            if flags == 0x010:  # EOS
                return at
            if flags == 0x004:  # MEM_SIZE
                at = self._skip_block_list(data, at, word - flags)
            elif flags == 0x200:  # MULTIFD_FLUSH
                continue
            else:
                at = self._skip_page(data, at, flags)

    def _skip_block_list(self, data: bytes, at: int, total: int) -> int:
        while total > 0:
            name_end = at + 1 + data[at]
            name = data[at + 1 : name_end].decode()
            length = int.from_bytes(data[name_end : name_end + 8], "big")
            self.blocks[name] = length
            total -= length
            at = name_end + 8 + (8 if self.ignore_shared else 0)
        return at

    def _skip_page(self, data: bytes, at: int, flags: int) -> int:
        if not flags & 0x020:  # no CONTINUE: the name of a block
            at += 1 + data[at]
        kind = flags & ~0x020
        if kind == 0x002:  # ZERO
            return at + 1
        if kind == 0x008:  # PAGE
            return at + PAGE
        if kind == 0x040:  # XBZRLE
            return at + 3 + int.from_bytes(data[at + 1 : at + 3], "big")
        if kind == 0x100:  # COMPRESS_PAGE
            return at + 4 + int.from_bytes(data[at : at + 4], "big")
        raise ValueError(f"RAM record with flags {flags:#x} before offset {at:#x}")
