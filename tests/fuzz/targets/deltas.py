"""Deltas of XBZRLE, by all twins: what they make of a page, and of two pages that they encode (xbzrle.md §2).

    input    split be16 · limit be16 · bytes, folded

The bytes are split: the first part, repeated, is a page, the second a delta for it.  The same two are then, as far as they
reach, an old page and a new one.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

from qemumig.encode import xbzrle
from qemumig.errors import StreamError
from tests.fuzz.folding import fold, taken_apart
from tests.fuzz.oracle import PAGE, REFUSED, TAKEN, Fault
from tests.support.deltas import plain_delta
from tests.support.fuzz_ram import random_delta
from tests.support.plain_stream import PlainStreamError, patched

ROOM = 2 * PAGE
LONGEST = 1500  # of two pages to encode: the plain encoder is slow


def run(data: bytes) -> str:
    head, wire = taken_apart(data, 4, ROOM)
    split, limit = int.from_bytes(head[:2], "big"), int.from_bytes(head[2:], "big")
    seed, rest = wire[:split], wire[split:]
    page = ((seed or b"\0") * (PAGE // max(len(seed), 1) + 1))[:PAGE]
    encode(seed[:LONGEST], rest[:LONGEST], limit)
    return decode(page, rest)


def decode(page: bytes, delta: bytes) -> str:
    """All twins must say the same of *delta*, and what the plain decoder says."""
    said = {twin: decode_with(page, delta, twin) for twin in xbzrle.IMPLEMENTATIONS}
    first = said[xbzrle.IMPLEMENTATIONS[0]]
    if any(other != first for other in said.values()):
        raise Fault(f"the twins differ: {[(twin, text or len(made)) for twin, (text, made) in said.items()]}")
    try:
        plain = patched(page, delta)
    except PlainStreamError as error:
        if not first[0]:
            raise Fault(f"taken, although {error}") from error
        return REFUSED
    if first[0]:
        raise Fault(f"refused, although it is well-formed: {first[0]}")
    if first[1] != plain:
        raise Fault("the page is not what the delta says")
    return TAKEN


def decode_with(page: bytes, delta: bytes, twin: str) -> tuple[str, bytes]:
    target = bytearray(page)
    try:
        xbzrle.decode(target, delta, twin)
    except StreamError as error:
        if error.offset is None:
            raise Fault(f"a refusal without a place: {error}") from error
        return str(error), b""
    return "", bytes(target)


def encode(old: bytes, new: bytes, limit: int) -> None:
    """All twins must make the delta that the plain encoder makes, and it must lead back."""
    length = min(len(old), len(new))
    if length == 0:
        return
    old, new, limit = old[:length], new[:length], min(max(limit, 2), 2 * PAGE)
    wanted = plain_delta(old, new, limit)
    for twin in xbzrle.IMPLEMENTATIONS:
        made = xbzrle.encode(old, new, limit, twin)
        if made != wanted:
            raise Fault(f"{twin}: the delta is {made!r}, expected {wanted!r}")
        target, seen = bytearray(limit), bytearray(old)
        updated = xbzrle.update(seen, new, target, twin)
        if seen != new:
            raise Fault(f"{twin}: the page seen was not brought up to date")
        if updated >= 0 and bytes(target[:updated]) != wanted:
            raise Fault(f"{twin}: updating made {bytes(target[:updated])!r}, expected {wanted!r}")
        if made:
            back = bytearray(old)
            xbzrle.decode(back, made, twin)
            if back != new:
                raise Fault(f"{twin}: the delta does not lead to the new page")


def seeds() -> Iterator[bytes]:
    for seed in range(60):
        chance = random.Random(seed)
        delta = random_delta(chance)
        yield (4).to_bytes(2, "big") + (PAGE).to_bytes(2, "big") + fold(chance.randbytes(4) + delta)
    for length, step in itertools.product((1, 15, 64, 200, 1500), (1, 2, 7, 64)):
        old = bytes(length)
        new = bytes(n % 251 + 1 if n // step % 2 else 0 for n in range(length))
        yield length.to_bytes(2, "big") + min(2 * length + 8, 4096).to_bytes(2, "big") + fold(old + new)
