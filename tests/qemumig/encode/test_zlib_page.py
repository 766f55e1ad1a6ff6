"""A page as a zlib stream of its own (compress.md): ours and the standard library's understand each other."""

from __future__ import annotations

import random
import zlib

import pytest

from qemumig.encode import zlib_page

PAGE = 4096


@pytest.mark.parametrize("level", range(10))
def test_a_page_becomes_a_stream_that_others_read(level: int) -> None:
    chance = random.Random(level)
    for page in (bytes(PAGE), chance.randbytes(PAGE), chance.randbytes(100) + bytes(PAGE - 100)):
        data = zlib_page.compress(page, level)
        assert zlib.decompress(data) == page == zlib_page.decompress(data)
        assert 0 < len(data) <= 4110
        assert zlib_page.decompress(zlib.compress(page, level)) == page
    assert zlib_page.compress(bytes(PAGE), 1)[:2] == b"\x78\x01"


def test_a_damaged_stream_is_refused_wherever_the_damage_is() -> None:
    page = random.Random(1).randbytes(64) * 64
    data = zlib.compress(page)
    for at in range(len(data)):
        damaged = bytearray(data)
        damaged[at] ^= 0x41
        try:
            assert zlib_page.decompress(damaged) == page  # a bit that means nothing
        except ValueError:
            continue
        assert zlib.decompress(damaged) == page
    for length in range(len(data)):
        with pytest.raises(ValueError, match=r"no whole zlib stream|ends early"):
            zlib_page.decompress(data[:length])


def test_arguments_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="a page of 4095 bytes at level 1"):
        zlib_page.compress(bytes(4095))
    with pytest.raises(ValueError, match="at level 10, expected 4096 and 0 to 9"):
        zlib_page.compress(bytes(PAGE), 10)
