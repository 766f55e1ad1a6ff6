"""The walk over recorded RAM records: counts, entries, memory given back (ram.md §2, xbzrle.md)."""

from __future__ import annotations

import struct
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qemumig.errors import StreamError
from qemumig.ram.scan import RamScan
from qemumig.ram.scan_pages import ScannedPages
from tests.support.plain_stream import patched

PAGE = 4096
EOS = struct.pack(">Q", 0x10)
PAGES = 300  # more than one write takes


def record(page: int, flag: int, rest: bytes, name: bytes = b"r") -> bytes:
    return struct.pack(">Q", page * PAGE | flag) + bytes([len(name)]) + name + rest


def plain(page: int, content: bytes) -> bytes:
    return record(page, 0x008, content)


def zero(page: int) -> bytes:
    return record(page, 0x002, b"\0")


def compressed(page: int, content: bytes, name: bytes = b"r") -> bytes:
    data = zlib.compress(content)
    return record(page, 0x100, struct.pack(">I", len(data)) + data, name)


def delta(page: int, patch: bytes) -> bytes:
    return record(page, 0x040, struct.pack(">BH", 1, len(patch)) + patch)


@pytest.fixture
def scratch() -> Iterator[int]:
    with tempfile.TemporaryFile() as file:
        yield file.fileno()


def walked(data: bytes, scratch: int, pages: int = PAGES) -> RamScan:
    """A scan that has walked *data* and its EOS, with one block `r`."""
    scan = RamScan(data + EOS, PAGE, True, scratch)
    scan.add_block(b"r", pages)
    assert scan.walk_body(0) == "eos"
    assert scan.offset == len(data) + len(EOS)
    return scan


contents = st.sampled_from([bytes(PAGE), b"a" * PAGE, bytes(range(256)) * 16])
records = st.one_of(
    st.tuples(st.just("plain"), st.integers(0, 3), contents),
    st.tuples(st.just("compressed"), st.integers(0, 3), contents),
    st.tuples(st.just("zero"), st.integers(0, 3), st.just(b"")),
    st.tuples(st.just("delta"), st.integers(0, 3), st.sampled_from([b"", b"\0\1x", b"\x85\3\4abcd", b"\xff\x1f\1z"])),
)


@given(st.lists(records, max_size=30))
def test_memory_is_what_the_records_leave_one_after_the_other(several: list[tuple[str, int, bytes]]) -> None:
    memory, data = [bytes(PAGE)] * 4, b""
    for kind, page, content in several:
        if kind == "delta":
            data += delta(page, content)
            memory[page] = patched(memory[page], content)
        else:
            data += {"plain": plain, "compressed": compressed}[kind](page, content) if content else zero(page)
            memory[page] = content or bytes(PAGE)
    with tempfile.TemporaryFile() as file:
        scan = walked(data, file.fileno(), 4)
        assert ScannedPages(scan).read(0, 0, 4) == b"".join(memory)
    assert sum(scan.counts(0).values()) == len(several)


def test_export_writes_every_page_that_is_not_zero_at_its_place(directory: Path, scratch: int) -> None:
    pages = [page for page in range(PAGES) if page % 67]
    data = b"".join(plain(page, bytes([page % 255 + 1]) * PAGE) for page in pages)
    data += zero(5) + plain(6, bytes(PAGE)) + delta(7, b"\0\1x") + compressed(8, b"c" * PAGE) + delta(9, b"\0\1y")
    scanned = ScannedPages(walked(data, scratch))
    out = directory / "out"
    with open(out, "w+b") as file:
        written = scanned.export(0, file.fileno(), 0, PAGES)
    assert written == len(pages) - 2
    assert out.read_bytes() == scanned.read(0, 0, PAGES)


def test_next_difference_gives_runs(scratch: int) -> None:
    data = b"".join(plain(page, b"x" * PAGE) for page in (1, 2, 9))
    left, right = (ScannedPages(walked(each, scratch)) for each in (data, zero(0) + plain(9, b"x" * PAGE)))
    assert left.next_difference(0, right, 0, 0, PAGES) == (1, 3)
    assert right.next_difference(0, left, 0, 2, PAGES) == (2, 3)
    assert left.next_difference(0, right, 0, 3, PAGES) == (PAGES, PAGES)


def test_pages_of_one_scan_can_be_compared_with_each_other(scratch: int) -> None:
    scan = RamScan(compressed(0, b"a" * PAGE) + compressed(0, b"b" * PAGE, b"s") + EOS, PAGE, True, scratch)
    for name in (b"r", b"s"):
        scan.add_block(name, 1)
    scan.walk_body(0)
    pages = ScannedPages(scan)
    assert pages.next_difference(0, pages, 1, 0, 1) == (0, 1)
    assert pages.next_difference(0, pages, 0, 0, 1) == (1, 1)


def test_blocks_are_taken_up_until_a_list_is_known() -> None:
    data = record(7, 0x002, b"\0", b"new") + EOS
    scan = RamScan(data, PAGE)
    assert (scan.walk_body(0), scan.names) == ("eos", [b"new"])
    closed = RamScan(data, PAGE)
    closed.add_block(b"r", 8)
    with pytest.raises(StreamError, match="block 'new' is not on the stream's list"):
        closed.walk_body(0)


def test_the_walk_says_where_it_looks_round() -> None:
    data = b"".join(zero(page % PAGES) for page in range(20000)) + EOS
    scan, seen = RamScan(data, PAGE), []
    scan.walk_body(0, seen.append)
    assert seen == sorted(seen)
    assert len(seen) == 2


def test_the_caller_is_told_of_its_own_mistakes(scratch: int) -> None:
    with pytest.raises(ValueError, match="page size 100"):
        RamScan(b"", 100)
    scan = walked(zero(0), scratch)
    with pytest.raises(IndexError, match="block 1 of 1"):
        scan.counts(1)
    with pytest.raises(ValueError, match="lies behind the end"):
        scan.walk_body(1 << 40)
    with pytest.raises(ValueError, match="reaches past the end"):
        scan.map_block(0, 1 << 62, 0)
    with pytest.raises(ValueError, match="without keeping pages"):
        without = RamScan(zero(0) + EOS, PAGE)
        without.add_block(b"r", 1)
        without.walk_body(0)
        ScannedPages(without).read(0, 0, 1)
