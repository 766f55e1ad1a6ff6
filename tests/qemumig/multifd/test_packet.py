"""Packets of multifd: their bytes, and what is refused."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qemumig.errors import StreamError
from qemumig.multifd.packet import decode_header, decode_init, encode_header, encode_init
from qemumig.wire.format import MULTIFD_HEADER_SIZE, MULTIFD_INIT_SIZE, MULTIFD_PACKET_PAGES

UUID = bytes(range(16))


def test_the_init_packet_is_laid_out_as_drawn() -> None:
    expected = struct.pack(">II16sB39x", 0x11223344, 1, UUID, 7)
    assert len(expected) == MULTIFD_INIT_SIZE == 64
    assert encode_init(UUID, 7) == expected
    assert decode_init(expected) == (UUID, 7)


def test_a_header_is_laid_out_as_drawn() -> None:
    offsets = [0x3000, 0x1000, 0x2000]
    expected = struct.pack(
        ">IIIIIIQI28x256s128Q", 0x11223344, 1, 2, 128, 2, 8192, 99, 1, b"microvm.ram", *offsets, *[0] * 125
    )
    assert len(expected) == MULTIFD_HEADER_SIZE == 1344
    found = encode_header(flags=2, normal=offsets[:2], zero=offsets[2:], data_size=8192, number=99, name=b"microvm.ram")
    assert found == expected
    assert decode_header(expected) == {
        "flags": 2,
        "slots": 128,
        "normal": offsets[:2],
        "zero": offsets[2:],
        "data_size": 8192,
        "number": 99,
        "name": b"microvm.ram",
    }


@pytest.mark.parametrize(
    ("wrong", "finding"),
    [
        ({"magic": 0x5145564D}, "magic 0x5145564d found, expected 0x11223344"),
        ({"version": 2}, "version 2 found, expected 1"),
        ({"flags": 0x40}, "announce device state"),
        ({"flags": 0x80}, "flags 0x80 found, expected none besides 0x3f"),
        ({"slots": 129}, "129 slots for pages, expected at most 128"),
        ({"slots": 3, "normal_pages": 4}, "4 normal and 0 zero pages in 3 slots"),
        ({"normal_pages": 100, "zero_pages": 29}, "100 normal and 29 zero pages in 128 slots"),
        ({"zero_pages": 0xFFFFFFFF}, "0 normal and 4294967295 zero pages in 128 slots"),
        ({"normal_pages": 0xFFFFFFFF, "zero_pages": 1}, "4294967295 normal and 1 zero pages in 128 slots"),
    ],
)
def test_a_header_that_no_sender_sends_is_refused(wrong: dict[str, int], finding: str) -> None:
    with pytest.raises(StreamError, match=finding):
        decode_header(encode_header(**wrong))


def test_a_header_without_pages_may_hold_old_values() -> None:
    """7.2 leaves size, name and offsets as they were."""
    stale = bytearray(encode_header(normal=[1, 2], data_size=8192, name=b"x" * 256))
    stale[16:20] = bytes(4)
    found = decode_header(bytes(stale))
    assert (found["normal"], found["zero"], found["name"]) == ([], [], b"")


def test_the_last_byte_of_the_name_ends_it() -> None:
    assert decode_header(encode_header(normal=[0], name=b"n" * 256))["name"] == b"n" * 255


@pytest.mark.parametrize(("magic", "version", "finding"), [(1, 1, "magic 0x00000001"), (0x11223344, 0, "version 0")])
def test_an_init_packet_of_something_else_is_refused(magic: int, version: int, finding: str) -> None:
    with pytest.raises(StreamError, match=finding):
        decode_init(struct.pack(">II", magic, version) + bytes(56))


@settings(max_examples=300, deadline=None)
@given(
    start=st.sampled_from([b"", struct.pack(">II", 0x11223344, 1)]),
    data=st.binary(max_size=400),
)
def test_any_bytes_are_a_header_within_its_bounds_or_refused(start: bytes, data: bytes) -> None:
    header = (start + data).ljust(MULTIFD_HEADER_SIZE, b"\xff")[:MULTIFD_HEADER_SIZE]
    try:
        found = decode_header(header)
    except StreamError:
        return
    assert len(found["normal"]) + len(found["zero"]) <= MULTIFD_PACKET_PAGES
    assert len(found["name"]) < 256 and b"\0" not in found["name"]
