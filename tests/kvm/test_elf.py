"""kvm.elf: what of an ELF file goes where, and which files are none."""

import random

import pytest

from kvm.elf import Elf, ElfError, Segment, take_apart
from tests.support.elf import elf_file

SEGMENTS = [(0x40010000, 0x10000, b"first", 16), (0x40020000, 0x20000, b"second", 6)]
TAKEN = [Segment(0x10000, b"first".ljust(16, b"\0")), Segment(0x20000, b"second")]


@pytest.mark.parametrize("bits", [32, 64])
def test_segments_go_to_their_physical_addresses(bits):
    assert take_apart(elf_file(SEGMENTS, entry=0x40020001, bits=bits)) == Elf(TAKEN, 0x20001)


def test_an_entry_outside_of_all_segments_is_physical_already():
    assert take_apart(elf_file(SEGMENTS, entry=0x999)).entry == 0x999
    assert take_apart(elf_file(SEGMENTS, entry=0x40010010)).entry == 0x40010010


@pytest.mark.parametrize("bits", [32, 64])
def test_a_file_that_is_not_whole_is_none(bits):
    whole = elf_file(SEGMENTS, entry=0, bits=bits)
    assert all(take_apart(whole[:length]) is None for length in range(len(whole)))


def test_another_byte_order_or_class_is_none():
    assert take_apart(elf_file(SEGMENTS, entry=0, order=">")) is None
    file = bytearray(elf_file(SEGMENTS, entry=0))
    file[4] = 3
    assert take_apart(bytes(file)) is None


@pytest.mark.parametrize(
    ("segment", "words"),
    [
        ((0, 0x10000, b"12345678", 4), "ELF segment 0 at 0x10000 has 0x8 bytes in the file, 0x4 in memory"),
        ((0, 0x10000, b"1", (1 << 30) + 1), "its ELF segments have 0x40000001 bytes, at most 0x40000000 are loaded"),
    ],
)
def test_what_no_memory_could_take_is_refused(segment, words):
    with pytest.raises(ElfError) as caught:
        take_apart(elf_file([segment], entry=0))
    assert str(caught.value) == words


def test_noise_in_the_headers_is_no_surprise():
    chance = random.Random(5)
    whole = elf_file(SEGMENTS, entry=0x40010000)
    for _ in range(300):
        noisy = bytearray(whole)
        for _ in range(chance.randrange(1, 5)):
            noisy[chance.randrange(len(whole))] = chance.randrange(256)
        try:
            found = take_apart(bytes(noisy))
        except ElfError:
            continue
        assert found is None or sum(len(segment.data) for segment in found.segments) <= 1 << 30
