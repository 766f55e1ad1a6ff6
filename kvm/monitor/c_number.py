"""Numbers as C writes them: decimal, 0x hexadecimal, 0 octal; the largest is 2^64 - 1."""

from __future__ import annotations

import re

DIGITS = re.compile(r"0[xX][0-9a-fA-F]+|0[0-7]*|[1-9][0-9]*")
LIMIT = 1 << 64
_LONGEST_DECIMAL = 20  # digits of the largest; Python does not even try to read thousands of them


def magnitude(digits: str) -> int | None:
    """The value of *digits*, which DIGITS has matched; None when it is too large."""
    if digits[:2] in ("0x", "0X"):
        value = int(digits, 16)
    elif digits[0] == "0":
        value = int(digits, 8)
    elif len(digits) > _LONGEST_DECIMAL:
        return None
    else:
        value = int(digits)
    return value if value < LIMIT else None
