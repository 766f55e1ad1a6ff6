"""Streams of compressed packets: what goes in comes out, and nothing is written past its end."""

from __future__ import annotations

import random
import time
import zlib

import pytest
import zstandard

from qemumig.encode.compress import (
    Compressor,
    Decompressor,
    ZlibCompressor,
    ZlibDecompressor,
    ZstdCompressor,
    ZstdDecompressor,
)
from qemumig.encode.libraries import Library, functions_of
from qemumig.errors import OptionError

ENDS = {"zlib": (ZlibCompressor, ZlibDecompressor), "zstd": (ZstdCompressor, ZstdDecompressor)}
both = pytest.mark.parametrize("method", ENDS)


def ends(method: str, level: int = 1) -> tuple[Compressor, Decompressor]:
    compressor, decompressor = ENDS[method]
    return compressor(level), decompressor()


def pages(chance: random.Random, count: int) -> bytes:
    """Half of each page is noise."""
    return b"".join(chance.randbytes(2048) + bytes(2048) for _ in range(count))


@both
@pytest.mark.parametrize("level", [0, 1, 6, 9])
def test_packets_of_one_stream_come_out_as_they_went_in(method: str, level: int) -> None:
    chance = random.Random(level)
    compressor, decompressor = ends(method, level)
    for count in (1, 128, 3, 64, 128):
        data = pages(chance, count)
        packet = compressor.compress(data)
        assert level == 0 or len(packet) < 0.7 * len(data)
        assert decompressor.decompress(packet, len(data)) == data


@both
def test_a_page_that_came_before_costs_little(method: str) -> None:
    """It is one stream: what was sent in the packet before is still known."""
    compressor, _ = ends(method, level=3)  # at lower ones a frame of zstd may end
    data = random.Random(1).randbytes(4096)
    compressor.compress(data * 2)  # the repeat is seen, so that zlib goes on to search for more
    assert len(compressor.compress(data)) < 1000


def test_zstd_hurries_through_noise_and_comes_back_for_text() -> None:
    """Each change of mind ends a frame, which the other end does not notice and the lengths show."""
    chance = random.Random(7)
    text = b"".join(bytes(chance.choices(b"aaaaaaaabbbbccde", k=4096)) for _ in range(128))
    compressor, decompressor = ends("zstd")
    kinds = [text if number // 40 % 2 else pages(chance, 128) for number in range(120)]
    packets = [compressor.compress(data) for data in kinds]
    for packet, data in zip(packets, kinds, strict=True):
        assert decompressor.decompress(packet, len(data)) == data
    opened = [number for number, packet in enumerate(packets) if packet.startswith(b"\x28\xb5\x2f\xfd")]
    assert opened[:2] == [0, 1] and len(opened) == 4  # a trial counts from the next packet on
    assert 41 <= opened[2] <= 56 and 81 <= opened[3] <= 96  # … and comes after 16 packets at the latest
    assert len(packets[40]) > 1.2 * len(packets[79])  # the text at a run, and as it should be


def near_repeats(chance: random.Random, every: int) -> bytes:
    """Noise in which 48 bytes come again *every* so many."""
    again = chance.randbytes(48)
    return b"".join(chance.randbytes(every - 48) + again for _ in range(128 * 4096 // every))


@pytest.mark.parametrize("every", [64, 128, 256, 512, 1024, 2048, 4096])
def test_zstd_rushes_only_as_far_as_it_costs_next_to_nothing(every: int) -> None:
    """Between noise, through which it rushes, and text there is what needs a closer look."""
    chance = random.Random(every)
    compressor, decompressor = ends("zstd")
    packets = []
    for _ in range(20):
        data = near_repeats(chance, every)
        packets.append(compressor.compress(data))
        assert decompressor.decompress(packets[-1], len(data)) == data
    assert len(packets[19]) < 1.04 * len(packets[0])


def test_zstd_rushes_through_noise() -> None:
    """It then finds where the noise ends a little late, and only then."""
    chance = random.Random(10)
    compressor, _ = ends("zstd")
    lengths = [len(compressor.compress(pages(chance, 128))) for _ in range(20)]
    assert lengths[0] < lengths[19] < 1.01 * lengths[0]


def test_zlib_leaves_out_its_search_where_only_runs_repeat() -> None:
    """The stream goes on in the same way for the other end, and the lengths show it."""
    chance = random.Random(8)
    words = [chance.randbytes(40) for _ in range(100)]
    text = b"".join(chance.choices(words, k=128 * 4096 // 40))
    compressor, decompressor = ends("zlib")
    kinds = [text if number // 40 % 2 else pages(chance, 128) for number in range(120)]
    packets = [compressor.compress(data) for data in kinds]
    for packet, data in zip(packets, kinds, strict=True):
        assert decompressor.decompress(packet, len(data)) == data
    assert len(packets[40]) > 3 * len(packets[79])
    assert max(len(packet) for packet in packets[56:80]) < 1.1 * len(packets[79])  # a trial came within 16 packets


@pytest.mark.parametrize(("method", "words"), [("zlib", 100), ("zstd", 0)])
def test_on_a_slow_link_the_next_packet_but_one_is_compressed_as_its_content_asks_for(method: str, words: int) -> None:
    """zlib is to find words again, zstd to code letters of which some are frequent."""
    chance = random.Random(9)
    vocabulary = [chance.randbytes(40) for _ in range(words)] or [bytes([letter]) for letter in b"aaaaaaaabbbbccde"]
    text = b"".join(chance.choices(vocabulary, k=128 * 4096 // len(vocabulary[0])))
    compressor, _ = ends(method)
    compressor.compress(pages(chance, 128))
    time.sleep(0.06)
    assert len(compressor.compress(text)) > 1.2 * len(compressor.compress(text))


def test_others_understand_the_streams() -> None:
    data = pages(random.Random(2), 40)
    packet = ZlibCompressor(1).compress(data)
    assert packet[:1] == b"\x78" and packet.endswith(b"\0\0\xff\xff")
    assert zlib.decompressobj().decompress(packet) == data
    packet = ZstdCompressor(1).compress(data)
    assert packet.startswith(b"\x28\xb5\x2f\xfd")
    assert zstandard.ZstdDecompressor().decompressobj().decompress(packet) == data


@both
def test_noise_has_room_in_a_packet(method: str) -> None:
    data = random.Random(3).randbytes(128 * 4096)
    compressor, decompressor = ends(method)
    assert decompressor.decompress(compressor.compress(data), len(data)) == data


@both
def test_a_target_without_room_is_told(method: str) -> None:
    with pytest.raises(ValueError, match="no room"):
        ends(method)[0].compress(random.Random(4).randbytes(4096), capacity=4000)


@both
@pytest.mark.parametrize(("there", "wanted", "finding"), [(2, 3, "fewer"), (3, 2, "more")])
def test_more_or_less_than_announced_is_told(method: str, there: int, wanted: int, finding: str) -> None:
    compressor, decompressor = ends(method)
    packet = compressor.compress(pages(random.Random(5), there))
    with pytest.raises(ValueError, match=finding):
        decompressor.decompress(packet, wanted * 4096)


@both
def test_damaged_data_never_gets_past_the_target(method: str) -> None:
    """It fails, or makes what it was to make."""
    chance = random.Random(6)
    good = ends(method)[0].compress(pages(chance, 8))
    refused = 0
    for _ in range(300):
        damaged = bytearray(good)
        for _ in range(chance.randrange(1, 4)):
            damaged[chance.randrange(chance.choice((12, len(damaged))))] = chance.randrange(256)  # the head decides most
        try:
            assert len(ends(method)[1].decompress(bytes(damaged), 8 * 4096)) == 8 * 4096
        except ValueError:
            refused += 1
    assert refused > 20


def test_a_library_that_is_missing_is_named_with_its_package() -> None:
    with pytest.raises(OptionError, match=r"multifd-compression lost needs liblost\.so\.1 .*apt-get install liblost1"):
        functions_of(Library("lost", "liblost.so.1", "liblost1", ("lose",)))
