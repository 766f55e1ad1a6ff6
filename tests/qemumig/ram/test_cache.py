"""The page cache: which page gets a slot, how a page goes out, what is counted (xbzrle.md §4 to §6)."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from qemumig.errors import OptionError
from qemumig.ram.cache import PageCache
from tests.support.deltas import page_records, plain_delta
from tests.support.plain_stream import patched

PAGE = 4096
STREAMS = Path(__file__).parents[2] / "streams" / "xbzrle"
COUNTERS = json.loads((STREAMS / "counters.json").read_text())

A, B, C = b"a" * PAGE, b"a" * 100 + b"b" + b"a" * 3995, b"c" * PAGE


# ---- as in real QEMUs ----


@pytest.mark.parametrize("name", COUNTERS)
def test_every_page_of_a_recording_goes_out_as_it_did(name: str) -> None:
    """The generation is the round: these recordings have one bitmap sync a round."""
    counters = COUNTERS[name]
    data = zstandard.ZstdDecompressor().decompressobj().decompress((STREAMS / f"{name}.mig.zst").read_bytes())
    cache = PageCache(counters["cache-size"])
    for record in page_records(data):
        if record.round == 1:
            continue
        if record.kind == "zero":
            cache.decide_zero(record.page, record.round)
            continue
        sent = ("delta", record.delta) if record.kind == "delta" else ("page", record.after)
        assert cache.decide(record.page, record.after, record.round) == sent, f"page {record.page}, round {record.round}"
        if record.kind == "delta":
            cache.add_record(record.length)
    assert cache.sent_bytes == counters["bytes"]
    assert cache.overflows == counters["overflow"]
    assert cache.misses == counters["cache-miss"]
    assert cache.hits <= counters["pages"]  # pages that had not changed left no record


# ---- slots ----


def test_a_page_keeps_its_slot_for_two_generations() -> None:
    cache = PageCache(2 * PAGE)
    assert cache.slot_count == 2
    assert cache.decide(4, A, 2) == ("page", A)
    assert cache.decide(6, C, 2) == ("page", C)
    assert cache.decide(6, C, 3) == ("page", C)
    assert (cache.held(4), cache.held(6)) == (A, None)
    assert cache.decide(6, C, 4) == ("page", C)
    assert (cache.held(4), cache.held(6)) == (None, C)


def test_a_hit_makes_a_page_young_again() -> None:
    cache = PageCache(PAGE)
    cache.decide(1, A, 2)
    assert cache.decide(1, A, 3) == ("nothing", b"")
    cache.decide(2, C, 4)
    assert cache.held(1) == A
    cache.decide(2, C, 5)
    assert cache.held(2) == C


def test_pages_in_different_slots_do_not_meet() -> None:
    cache = PageCache(4 * PAGE)
    for page in range(4):
        cache.decide(page, bytes([page + 1]) * PAGE, 2)
    assert [cache.held(page) for page in range(8)] == [bytes([page + 1]) * PAGE for page in range(4)] + [None] * 4


# ---- how a page goes out ----


def test_a_changed_page_goes_out_as_its_delta_and_the_next_one_builds_on_it() -> None:
    cache = PageCache(PAGE)
    cache.decide(0, A, 2)
    assert cache.decide(0, B, 3) == ("delta", b"\x64\1b")
    assert cache.held(0) == B
    assert cache.decide(0, A, 4) == ("delta", b"\x64\1a")


def test_a_page_that_changed_too_much_goes_out_whole_and_stays_held() -> None:
    cache = PageCache(PAGE)
    cache.decide(0, A, 2)
    assert cache.decide(0, C, 3) == ("page", C)
    assert cache.held(0) == C
    assert (cache.hits, cache.misses, cache.overflows, cache.sent_bytes) == (1, 1, 1, 4096)


def test_nothing_is_inserted_in_the_last_stage_but_deltas_are_made() -> None:
    cache = PageCache(2 * PAGE)
    cache.decide(0, A, 2)
    assert cache.decide(1, C, 9, True) == ("page", C)
    assert cache.decide(2, C, 9, True) == ("page", C)
    assert (cache.held(0), cache.held(1), cache.held(2)) == (A, None, None)
    assert cache.decide(0, B, 9, True) == ("delta", b"\x64\1b")


def test_a_zero_page_replaces_what_was_held_of_it_and_old_pages_only() -> None:
    cache = PageCache(2 * PAGE)
    assert cache.decide_zero(0, 2)
    assert cache.held(0) == bytes(PAGE)
    cache.decide(1, A, 2)
    assert cache.decide_zero(1, 2)
    assert cache.held(1) == bytes(PAGE)
    assert not cache.decide_zero(3, 3)
    assert cache.held(1) == bytes(PAGE)
    assert cache.decide_zero(3, 4)
    assert (cache.held(1), cache.held(3)) == (None, bytes(PAGE))
    assert cache.decide(3, bytes(5) + b"x" + bytes(4090), 5) == ("delta", b"\5\1x")


actions = st.lists(
    st.tuples(
        st.integers(0, 9), st.integers(0, 8), st.sampled_from(["page", "page", "page", "zero", "sync", "grow", "shrink"])
    ),
    max_size=120,
)


@given(actions, st.integers(0, 1 << 30))
def test_the_destination_ends_with_the_source_memory_whatever_happens(
    several: list[tuple[int, int, str]], seed: int
) -> None:
    rng = random.Random(seed)
    contents = [rng.randbytes(PAGE), bytes(PAGE)]
    contents += [contents[0][:i] + b"zz" + contents[0][i + 2 :] for i in (0, 100, 4094)] + [rng.randbytes(PAGE)]
    contents += [bytes(i) + contents[0][i : i + 200] + bytes(PAGE - i - 200) for i in (0, 640, 3896)]
    cache, generation, destination = PageCache(4 * PAGE), 2, {page: bytes(PAGE) for page in range(10)}
    for page, version, action in several:
        content = contents[version]
        if action == "sync":
            generation += 1
        elif action in ("grow", "shrink"):
            cache.resize(8 * PAGE if action == "grow" else 2 * PAGE)
        elif action == "zero":
            cache.decide_zero(page, generation)
            destination[page] = bytes(PAGE)
        else:
            verdict, data = cache.decide(page, content, generation)
            if verdict == "delta":
                assert data == plain_delta(destination[page], content)
                destination[page] = patched(destination[page], data)
            elif verdict == "page":
                destination[page] = data
            assert destination[page] == content
        for number, copy in destination.items():
            assert cache.held(number) in (None, copy)


# ---- size ----


def test_resizing_keeps_what_still_fits_and_the_younger_of_two() -> None:
    cache = PageCache(4 * PAGE)
    for page, generation in ((0, 5), (2, 3), (1, 4), (7, 6)):
        cache.decide(page, bytes([page + 1]) * PAGE, generation)
    cache.resize(2 * PAGE)
    assert (cache.size, cache.slot_count) == (2 * PAGE, 2)
    assert [page for page in range(8) if cache.held(page) is not None] == [0, 7]
    assert (cache.held(0), cache.held(7)) == (b"\1" * PAGE, b"\x08" * PAGE)
    cache.resize(1024 * PAGE)
    assert (cache.held(0), cache.held(7)) == (b"\1" * PAGE, b"\x08" * PAGE)
    assert cache.decide(2, A, 6) == ("page", A)
    assert cache.decide(0, b"\1" * PAGE, 6) == ("nothing", b"")
    assert cache.misses == 5


@pytest.mark.parametrize("size", [0, 1, 4095, 6144, 3 * PAGE, -PAGE, 1 << 63, 1 << 80])
def test_a_size_that_does_not_fit_is_refused_by_its_name(size: int) -> None:
    cache = PageCache(PAGE)
    cache.decide(0, A, 2)
    for attempt in (PageCache, cache.resize):
        with pytest.raises(OptionError, match=f"xbzrle-cache-size {size}: expected a power of two no less than") as refusal:
            attempt(size)
        assert (refusal.value.name, refusal.value.value) == ("xbzrle-cache-size", size)
    assert cache.held(0) == A


def test_a_size_beyond_the_address_space_is_refused_and_the_old_cache_stays() -> None:
    cache = PageCache(PAGE)
    cache.decide(0, A, 2)
    with pytest.raises(MemoryError, match=f"no memory for .* a page cache of {1 << 60} bytes"):
        cache.resize(1 << 60)
    assert (cache.size, cache.held(0)) == (PAGE, A)


def test_memory_exists_as_far_as_it_is_used() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = resident()
    cache = PageCache(1 << 30)
    cache.decide(5, A, 2)
    assert cache.held(5) == A
    assert resident() - before < 64 << 20


# ---- rates ----


def test_rates_cover_a_period_and_stay_when_no_page_was_handled() -> None:
    cache = PageCache(4 * PAGE)
    cache.end_period(0)
    assert (cache.miss_rate, cache.encoding_rate) == (0, 0)
    cache.decide(0, A, 2)
    cache.decide(1, A, 2)
    cache.end_period(8)
    assert (cache.miss_rate, cache.encoding_rate) == (0.25, 0)
    cache.decide(0, B, 3)
    cache.add_record(8 + 3 + 3)
    cache.decide(1, A, 3)
    cache.end_period(12)
    assert (cache.miss_rate, cache.encoding_rate) == (0, 2 * 4096 / 6)
    cache.end_period(12)
    assert (cache.miss_rate, cache.encoding_rate) == (0, 2 * 4096 / 6)


def test_arguments_that_do_not_fit_are_refused() -> None:
    cache = PageCache(PAGE)
    with pytest.raises(ValueError, match="a page of 4095 bytes, expected 4096"):
        cache.decide(0, bytes(4095), 2)
    for attempt in (cache.held, lambda page: cache.decide(page, A, 2), lambda page: cache.decide_zero(page, 2)):
        with pytest.raises(ValueError, match="marks an empty slot"):
            attempt((1 << 64) - 1)
    with pytest.raises(ValueError, match="a record of 7 bytes, expected at least 8"):
        cache.add_record(7)
