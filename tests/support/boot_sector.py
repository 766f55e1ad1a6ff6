"""The guest that is a boot sector (tests/guests/bootsector.S): its image, and whether its pages are whole.

A pass adds one to the first byte of each page in turn, so at any moment the bytes along the pages step down by one, once
at most.  A page that was lost, or came twice, breaks that.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

CODE = Path(__file__).parents[1] / "guests" / "bootsector.bin"
PAGES_FROM = 0x100000
PAGE_SIZE = 4096
_PARAMETERS_AT = 4


def write_disk(path: Path, pages: int, *, suspends: bool = False) -> Path:
    """A disk of one sector with the guest, which works on *pages* pages."""
    sector = bytearray(CODE.read_bytes())
    struct.pack_into("<II", sector, _PARAMETERS_AT, pages, suspends)
    path.write_bytes(sector)
    return path


def page_addresses(pages: int) -> range:
    """Where the bytes are that a pass counts up."""
    return range(PAGES_FROM, PAGES_FROM + pages * PAGE_SIZE, PAGE_SIZE)


def complaint(counts: Sequence[int]) -> str:
    """What is wrong with the first bytes of the pages, in order; "" when they are whole."""
    steps = [(before - after) % 256 for before, after in pairwise(counts)]
    wrong = [index for index, step in enumerate(steps, 1) if step]
    if not wrong or (len(wrong) == 1 and steps[wrong[0] - 1] == 1):
        return ""
    return (
        f"pages {wrong[:8]} of {len(counts)} do not follow the ones before: {[counts[at - 1 : at + 1] for at in wrong[:8]]}"
    )
