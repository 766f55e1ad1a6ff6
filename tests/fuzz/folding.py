"""Bytes with runs in them, folded: a whole page is a few bytes of an input, and a mutation of one byte changes all of it.

F7 n v    64 × n bytes v; n = 0: the byte F7 itself, and v is no part of it
else      as it is
"""

from __future__ import annotations

import re

MARK = 0xF7
UNIT = 64
SPECIAL = re.compile(rb"(.)\1{63,}|\xf7", re.DOTALL)  # a run that is worth it, or the mark itself


def fold(data: bytes) -> bytes:
    """*data* as an input; `unfold` gives it back."""
    return SPECIAL.sub(_fold_match, data)


def _fold_match(match: re.Match[bytes]) -> bytes:
    value, length = match[0][:1], len(match[0])
    if length < UNIT:
        return bytes([MARK, 0, 0])
    units, rest = divmod(length, UNIT)
    runs = [255] * (units // 255) + [units % 255] * bool(units % 255)
    return b"".join(bytes([MARK, count]) + value for count in runs) + fold(value * rest)


def unfold(folded: bytes, limit: int) -> bytes:
    """What *folded* means, cut to *limit* bytes."""
    data, at = bytearray(), 0
    while at < len(folded) and len(data) < limit:
        mark = folded.find(MARK, at)
        data += folded[at : mark if mark >= 0 else None]
        if mark < 0 or len(folded) < mark + 3:
            break
        units, value = folded[mark + 1], folded[mark + 2]
        data += bytes([value]) * (UNIT * units) if units else bytes([MARK])
        at = mark + 3
    return bytes(data[:limit])


def taken_apart(data: bytes, head: int, limit: int) -> tuple[bytes, bytes]:
    """The choices at the head of an input, and what the rest of it means."""
    return data[:head].ljust(head, b"\0"), unfold(data[head:], limit)
