"""The live section `ram` of the source: START, PART, END (ram.md §1, §3, §7).

START   the list of blocks, before any page
PART    pages, for 50 ms or as long as the rate limit allows
END     the guest is stopped: the last sync, then everything that is left
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from ..machine import DirtyLog
from ..wire.format import RAM_SECTION_VERSION, TARGET_PAGE_SIZE, RamSaveFlag
from ..wire.stream import OutputStream
from .block import RAMBlock
from .dirty import DirtyPages
from .save import PageSender

IDSTR = "ram"
INSTANCE_ID = 0
VERSION_ID = RAM_SECTION_VERSION

PART_DURATION_S = 0.05
STEP_BYTES = 8 << 20  # at a time, before the clock is looked at
STEP_PAGES = 1 << 15
UNLIMITED = 1 << 62


class RamSource:
    """All of RAM on its way into one stream.  Sizes in bytes."""

    def __init__(self, blocks: Sequence[RAMBlock], log: DirtyLog, out: OutputStream, chunk_shift: int) -> None:
        # by descending length, as QEMU lists and walks them
        self.blocks = sorted(blocks, key=lambda block: -block.used_length)
        self._out = out
        self.dirty = DirtyPages(self.blocks, log, chunk_shift)
        self.sender = PageSender(self.dirty, out)
        self.total = sum(block.used_length for block in self.blocks)

    @property
    def remaining(self) -> int:
        """Bytes of dirty pages."""
        return self.dirty.remaining * TARGET_PAGE_SIZE

    @property
    def sent_pages(self) -> int:
        return self.sender.zero_pages + self.sender.normal_pages

    def write_block_list(self) -> None:
        """START's body."""
        self._out.write_be64(self.total | RamSaveFlag.RAM_SAVE_FLAG_MEM_SIZE)
        for block in self.blocks:
            name = block.idstr.encode()
            self._out.write(bytes([len(name)]) + name + block.used_length.to_bytes(8, "big"))
        self._out.write_be64(RamSaveFlag.RAM_SAVE_FLAG_EOS)

    def write_part(self, allowance: int) -> None:
        """PART's body: dirty pages, about *allowance* bytes of them, for no longer than 50 ms."""
        deadline = time.monotonic() + PART_DURATION_S
        end = self._out.offset + allowance
        while self._out.offset < end and not self.sender.send(min(STEP_BYTES, end - self._out.offset), STEP_PAGES):
            if time.monotonic() > deadline:
                break
        self._out.write_be64(RamSaveFlag.RAM_SAVE_FLAG_EOS)

    def close(self) -> None:
        """Give the descriptors back; the figures stay."""
        self.dirty.close()

    def write_rest(self) -> None:
        """END's body: the guest is stopped and the last sync done; everything that is left."""
        while not self.sender.send(UNLIMITED, STEP_PAGES):
            pass
        self._out.write_be64(RamSaveFlag.RAM_SAVE_FLAG_EOS)
