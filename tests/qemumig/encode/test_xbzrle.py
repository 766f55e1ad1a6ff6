"""The delta codec: QEMU's bytes, the twins against each other and a plain one, deltas that lie (xbzrle.md §2, §3)."""

from __future__ import annotations

import json
import mmap
import random
from array import array
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from qemumig.encode.xbzrle import IMPLEMENTATION, IMPLEMENTATIONS, decode, encode, update
from qemumig.errors import StreamError
from tests.support.deltas import page_records, plain_delta
from tests.support.plain_stream import PlainStreamError, patched

PAGE = 4096
STREAMS = Path(__file__).parents[2] / "streams"
RECORDED = sorted(
    path.relative_to(STREAMS).as_posix()
    for path in [*(STREAMS / "ram").glob("*xbzrle.mig.zst"), *(STREAMS / "xbzrle").glob("*.mig.zst")]
)
twins = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)

ZEROES = bytes(PAGE)
RAMP = bytes((7 * i + 3) % 256 for i in range(PAGE))


def with_bytes(page: bytes, offset: int, content: bytes) -> bytes:
    return page[:offset] + content + page[offset + len(content) :]


def inverted(page: bytes, *offsets: int) -> bytes:
    result = bytearray(page)
    for offset in offsets:
        result[offset] ^= 0xFF
    return bytes(result)


VECTORS: list[tuple[bytes, bytes, bytes | None]] = [
    (ZEROES, with_bytes(ZEROES, 0, b"\x41"), b"\0\1\x41"),
    (ZEROES, with_bytes(ZEROES, 4095, b"\xff"), b"\xff\x1f\1\xff"),
    (ZEROES, with_bytes(ZEROES, 127, b"\1"), b"\x7f\1\1"),
    (ZEROES, with_bytes(ZEROES, 128, b"\1"), b"\x80\1\1\1"),
    (ZEROES, with_bytes(ZEROES, 0, b"\xaa" * 127), b"\0\x7f" + b"\xaa" * 127),
    (ZEROES, with_bytes(ZEROES, 0, b"\xaa" * 128), b"\0\x80\1" + b"\xaa" * 128),
    (ZEROES, with_bytes(ZEROES, 16, b"\x11\x22\0\x33"), b"\x10\2\x11\x22\1\1\x33"),
    (RAMP, inverted(RAMP, 6, 7, 8, 9), b"\6\4\xd2\xcb\xc4\xbd"),
    (RAMP, with_bytes(RAMP, 100, b"\0"), b"\x64\1\0"),
    (RAMP, inverted(RAMP, 0, 2048, 2049, 4094, 4095), bytes.fromhex("0001fcff0f02fcf5fc0f020a03")),
    (ZEROES, with_bytes(ZEROES, 0, b"\x5a" * 4091), b"\0\xfb\x1f" + b"\x5a" * 4091),
    (ZEROES, with_bytes(ZEROES, 0, b"\x5a" * 4092), None),
    (ZEROES, with_bytes(ZEROES, 3, b"\x5a" * 4093), b"\3\xfd\x1f" + b"\x5a" * 4093),
    (ZEROES, b"\0\0\1\2" * 1024, b"\2\2\1\2" * 1024),
    (RAMP, RAMP, b""),
    (ZEROES, b"\1" * PAGE, None),
    (ZEROES, b"\1\0" * 2048, None),
]


@twins
@pytest.mark.parametrize(("old", "new", "delta"), VECTORS)
def test_known_pages_give_the_known_deltas(old: bytes, new: bytes, delta: bytes | None, implementation: str) -> None:
    assert encode(old, new, PAGE, implementation) == delta == plain_delta(old, new)
    if delta is not None:
        page = bytearray(old)
        decode(page, delta, implementation)
        assert page == new


@pytest.mark.parametrize("name", RECORDED)
def test_every_recorded_delta_is_made_again_byte_for_byte(name: str) -> None:
    data = zstandard.ZstdDecompressor().decompressobj().decompress((STREAMS / name).read_bytes())
    deltas = [record for record in page_records(data) if record.kind == "delta"]
    assert len(deltas) >= 50
    for record in deltas:
        for implementation in IMPLEMENTATIONS:
            assert encode(record.before, record.after, PAGE, implementation) == record.delta
            page = bytearray(record.before)
            decode(page, record.delta, implementation)
            assert page == record.after


@twins
def test_a_delta_is_taken_or_refused_as_by_real_qemus(implementation: str) -> None:
    verdicts = json.loads((STREAMS / "xbzrle" / "deltas.json").read_text())
    for text, taken in verdicts.items():
        page = bytearray(PAGE)
        if taken:
            decode(page, bytes.fromhex(text), implementation)
            assert page == patched(ZEROES, bytes.fromhex(text))
        else:
            with pytest.raises(StreamError, match="of the delta"):
                decode(page, bytes.fromhex(text), implementation)
    assert {*verdicts.values()} == {True, False}


# ---- the twins ----


@st.composite
def versions(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """Two versions of a page of any length, which differ in some runs of bytes."""
    length = draw(st.one_of(st.integers(1, 200), st.sampled_from([PAGE, PAGE - 1, PAGE + 1, 0x3FFF])))
    old = random.Random(draw(st.integers(0, 1 << 30))).randbytes(length)
    new = bytearray(old)
    for start, run, step in draw(
        st.lists(st.tuples(st.integers(0, length - 1), st.integers(1, 140), st.sampled_from([1, 1, 2, 3, 64])), max_size=40)
    ):
        for i in range(start, min(length, start + run * step), step):
            new[i] ^= 0x5A
    return old, bytes(new)


@given(versions(), st.integers(0, 300) | st.integers(3900, 0x4100))
def test_the_twins_encode_what_the_plain_encoder_does(pages: tuple[bytes, bytes], limit: int) -> None:
    old, new = pages
    expected = plain_delta(old, new, limit) if old != new else b""
    for implementation in IMPLEMENTATIONS:
        assert encode(old, new, limit, implementation) == expected


@given(versions(), st.integers(0, 63), st.integers(0, 63), st.integers(0, 63))
def test_alignment_does_not_matter_and_nothing_around_is_touched(
    pages: tuple[bytes, bytes], seen_shift: int, page_shift: int, delta_shift: int
) -> None:
    old, new = pages
    size = len(old)
    expected = plain_delta(old, new, PAGE)
    for implementation in IMPLEMENTATIONS:
        seen = bytearray(b"\xee" * (size + 192))
        seen[seen_shift : seen_shift + size] = old
        page = b"\xdd" * page_shift + new + b"\xdd" * 64
        delta = bytearray(b"\xcc" * (PAGE + 192))
        length = update(
            memoryview(seen)[seen_shift : seen_shift + size],
            memoryview(page)[page_shift : page_shift + size],
            memoryview(delta)[delta_shift : delta_shift + PAGE],
            implementation,
        )
        assert seen == b"\xee" * seen_shift + new + b"\xee" * (192 - seen_shift)
        assert delta[:delta_shift] == b"\xcc" * delta_shift
        assert delta[delta_shift + PAGE :] == b"\xcc" * (192 - delta_shift)
        if expected is None:
            assert length == -1
            continue
        assert delta[delta_shift : delta_shift + length] == expected
        target = bytearray(b"\xee" * (size + 192))
        target[seen_shift : seen_shift + size] = old
        decode(memoryview(target)[seen_shift : seen_shift + size], expected, implementation)
        assert target == seen


@twins
@pytest.mark.parametrize("length", [*range(1, 70), 127, 128, 129, 191, 192, 193, 255, 256, 257])
def test_a_run_of_any_length_is_found_and_written_wherever_it_lies(length: int, implementation: str) -> None:
    old = RAMP[:512]
    for start in range(0, 512 - length, 13):
        new = inverted(old, *range(start, start + length))
        delta = encode(old, new, PAGE, implementation)
        assert delta is not None
        assert delta == plain_delta(old, new)
        page = bytearray(old)
        decode(page, delta, implementation)
        assert page == new


@twins
@pytest.mark.parametrize("changed", range(4088, 4097))
@pytest.mark.parametrize("first", range(4))
def test_the_last_bytes_before_the_limit_are_as_qemus(changed: int, first: int, implementation: str) -> None:
    new = inverted(RAMP, *range(first, min(PAGE, first + changed)))
    assert encode(RAMP, new, PAGE, implementation) == plain_delta(RAMP, new)


@twins
def test_the_copy_is_brought_up_to_date_also_when_the_delta_is_too_long(implementation: str) -> None:
    seen, delta = bytearray(ZEROES), bytearray(PAGE)
    new = bytes(range(1, 256)) * 16 + b"x" * 16
    assert update(seen, new, delta, implementation) == -1
    assert seen == new
    assert update(seen, new, delta, implementation) == 0
    assert seen == new


BLOCK = 64
KNOW_NOTHING = [(1 << 64) - 1] * 4


def filled_blocks(page: bytes) -> list[bool]:
    return [any(page[at : at + BLOCK]) for at in range(0, len(page) - BLOCK + 1, BLOCK)]


def bits_of(filled: array[int], count: int) -> list[bool]:
    return [bool(filled[block // 64] >> block % 64 & 1) for block in range(count)]


@st.composite
def sparse_pages(draw: st.DrawFn) -> list[bytes]:
    """Versions of a page of any length, each block of which is zero, one byte or noise."""
    length = draw(st.one_of(st.integers(1, 200), st.sampled_from([PAGE, PAGE + 70, 0x3FFF])))
    rng = random.Random(draw(st.integers(0, 1 << 30)))
    kinds = [bytes(BLOCK), bytes(BLOCK), b"\1" + bytes(BLOCK - 1), bytes(BLOCK - 1) + b"\x80", rng.randbytes(BLOCK)]
    return [b"".join(rng.choice(kinds) for _ in range(length // BLOCK + 1))[:length] for _ in range(4)]


@given(sparse_pages(), st.booleans())
def test_zero_blocks_are_known_and_change_no_delta(several: list[bytes], known: bool) -> None:
    first, *later = several
    for implementation in IMPLEMENTATIONS:
        seen, delta = bytearray(first), bytearray(0x4000)
        filled = array("Q", KNOW_NOTHING)
        if known:
            bits = sum(1 << block for block, is_filled in enumerate(filled_blocks(first)) if is_filled)
            filled = array("Q", bits.to_bytes(32, "little"))
        for page in later:
            expected = plain_delta(bytes(seen), page, len(delta)) if seen != page else b""
            length = update(seen, page, delta, implementation, filled)
            assert expected is not None
            assert delta[:length] == expected
            assert seen == page
            exact = filled_blocks(page)
            told = bits_of(filled, len(exact))
            assert all(bit for bit, is_filled in zip(told, exact, strict=True) if is_filled)
            assert told == exact or not known


@twins
def test_a_block_that_is_known_to_be_zero_is_not_read(implementation: str) -> None:
    seen, delta = bytearray(b"\x77" * PAGE), bytearray(PAGE)
    assert update(seen, ZEROES, delta, implementation, array("Q", [0] * 4)) == 0
    assert seen == b"\x77" * PAGE


@twins
def test_nothing_is_read_or_written_past_the_end_of_a_mapping(implementation: str) -> None:
    with mmap.mmap(-1, PAGE) as seen, mmap.mmap(-1, PAGE) as page, mmap.mmap(-1, PAGE) as delta:
        page[3:] = b"\x5a" * 4093
        length = update(memoryview(seen), memoryview(page), memoryview(delta), implementation)
        assert length == PAGE
        seen[:] = ZEROES
        decode(memoryview(seen), memoryview(delta), implementation)
        assert seen[:] == page[:]


# ---- deltas that lie ----


@twins
@pytest.mark.parametrize(
    ("delta", "message", "offset"),
    [
        ("00017700 0178", "byte 3 of the delta keeps 0 bytes, expected at least 1 after the first pair", 3),
        ("0500", "byte 1 of the delta, of 2 bytes, should open a number and what it counts, and 1 is left", 1),
        ("050077", "byte 1 of the delta changes 0 bytes, expected at least 1", 1),
        ("ff1f027778", "byte 2 of the delta changes 2 bytes from 4095 on, the page has 4096", 2),
        ("80800101 77", "byte 0 of the delta opens a number of more than two bytes", 0),
        ("0580800177", "byte 1 of the delta opens a number of more than two bytes", 1),
        ("050177 10", "byte 3 of the delta, of 4 bytes, should open a number and what it counts, and 1 is left", 3),
        ("81200177", "byte 0 of the delta keeps 4097 bytes from 0 on, the page has 4096", 0),
        ("000177ff1f0177", "byte 5 of the delta changes 1 bytes from 4096 on, the page has 4096", 5),
        ("00017780200177", "byte 3 of the delta keeps 4096 bytes from 1 on, the page has 4096", 3),
        ("00057777", "byte 1 of the delta changes 5 bytes, and fewer follow it in the delta's 4", 1),
    ],
)
def test_a_delta_that_lies_is_refused_by_the_place_of_its_lie(
    delta: str, message: str, offset: int, implementation: str
) -> None:
    with pytest.raises(StreamError) as refusal:
        decode(bytearray(PAGE), bytes.fromhex(delta), implementation)
    assert str(refusal.value) == message
    assert refusal.value.offset == offset


pairs = st.tuples(st.integers(0, 4200) | st.integers(0, 40), st.integers(0, 40) | st.integers(0, 4200), st.booleans())


def pair_bytes(equal: int, changed: int, cut: bool) -> bytes:
    numbers = b"".join(bytes([n]) if n < 0x80 else bytes([0x80 | n & 0x7F, n >> 7]) for n in (equal, changed))
    return numbers + bytes(range(256)) * 17 if cut else numbers + (bytes(range(256)) * 17)[:changed]


hostile = st.binary(max_size=80) | st.lists(pairs, max_size=4).map(
    lambda several: b"".join(pair_bytes(*p) for p in several)
)


@given(hostile, st.sampled_from([1, 40, 64, PAGE]))
def test_hostile_deltas_write_nothing_outside_and_the_twins_refuse_alike(delta: bytes, size: int) -> None:
    refusals: set[str | None] = set()
    pages: set[bytes] = set()
    for implementation in IMPLEMENTATIONS:
        memory = bytearray(b"\xee" * 64 + bytes(size) + b"\xee" * 192)
        try:
            decode(memoryview(memory)[64 : 64 + size], delta, implementation)
            refusals.add(None)
        except StreamError as refusal:
            assert refusal.offset is not None
            assert refusal.offset < len(delta)
            refusals.add(str(refusal))
        assert memory[:64] == b"\xee" * 64
        assert memory[64 + size :] == b"\xee" * 192
        pages.add(bytes(memory))
    assert len(refusals) == len(pages) == 1
    if size == PAGE:
        try:
            assert (refusals, bytes(memory[64 : 64 + PAGE])) == ({None}, patched(ZEROES, delta))
        except PlainStreamError:
            assert None not in refusals


# ---- the door ----


def test_the_widest_twin_is_in_use() -> None:
    assert IMPLEMENTATIONS[0] == "plain"
    assert IMPLEMENTATIONS[-1] == IMPLEMENTATION


def test_arguments_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="pages of 4095 and 4096 bytes, expected one length from 1 to 16383"):
        encode(bytes(4095), ZEROES)
    with pytest.raises(ValueError, match="pages of 16384 and 16384 bytes"):
        encode(bytes(16384), bytes(16384))
    with pytest.raises(ValueError, match="pages of 0 and 0 bytes"):
        decode(bytearray(), b"\0\1x")
    with pytest.raises(ValueError, match="3 words of bits, expected 4"):
        update(bytearray(PAGE), ZEROES, bytearray(PAGE), None, array("Q", [0] * 3))
    with pytest.raises(ValueError, match="no delta codec 'mmx'"):
        encode(ZEROES, ZEROES, 4096, "mmx")
