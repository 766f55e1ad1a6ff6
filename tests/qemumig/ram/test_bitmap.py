"""Bitmaps against the plainest possible model: a Python integer."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qemumig.ram.bitmap import Bitmap, merge


def value_of(bitmap: Bitmap) -> int:
    return int.from_bytes(memoryview(bitmap).tobytes(), "little")


def bitmap_of(value: int, bits: int) -> Bitmap:
    bitmap = Bitmap(bits)
    for bit in range(bits):
        if value >> bit & 1:
            bitmap.set(bit)
    return bitmap


@given(st.data())
def test_merge_ors_the_source_in_and_counts_what_is_new(data: st.DataObject) -> None:
    target_bits = data.draw(st.integers(1, 400))
    first = data.draw(st.integers(0, target_bits))
    count = data.draw(st.integers(0, target_bits - first))
    before = data.draw(st.integers(0, (1 << target_bits) - 1))
    source_bits = data.draw(st.integers(max(count, 1), max(count, 1) + 100))
    source_value = data.draw(st.integers(0, (1 << source_bits) - 1))
    target, source = bitmap_of(before, target_bits), bitmap_of(source_value, source_bits)
    added = merge(memoryview(target), first, memoryview(source), count)
    expected = before | (source_value & ((1 << count) - 1)) << first
    assert value_of(target) == expected
    assert added == (expected ^ before).bit_count()


@given(st.integers(1, 300), st.data())
def test_search_and_count_agree_with_the_model(bits: int, data: st.DataObject) -> None:
    value = data.draw(st.integers(0, (1 << bits) - 1))
    bitmap = bitmap_of(value, bits)
    assert bitmap.count() == value.bit_count()
    start = data.draw(st.integers(0, bits))
    expected = next((bit for bit in range(start, bits) if value >> bit & 1), bits)
    assert bitmap.next_set(start) == expected


@pytest.mark.parametrize("bits", [1, 63, 64, 65, 1000])
def test_set_all_leaves_the_bits_past_the_end_clear(bits: int) -> None:
    bitmap = Bitmap(bits)
    bitmap.set_all()
    assert value_of(bitmap) == (1 << bits) - 1
    assert bitmap.count() == bits
    bitmap.clear_all()
    assert bitmap.count() == 0


def test_a_bit_outside_is_refused() -> None:
    bitmap = Bitmap(64)
    for method in (bitmap.set, bitmap.clear, bitmap.test):
        with pytest.raises(IndexError, match="bit 64 of a bitmap of 64 bits"):
            method(64)


def test_merge_refuses_what_does_not_fit() -> None:
    target, source = memoryview(Bitmap(128)), memoryview(Bitmap(64))
    with pytest.raises(ValueError, match="65 bits asked for, the source has 64"):
        merge(target, 0, source, 65)
    with pytest.raises(ValueError, match="do not fit a target of 128"):
        merge(target, 100, source, 29)
    with pytest.raises(ValueError, match="do not fit"):
        merge(target, 2**64 - 1, source, 2)
