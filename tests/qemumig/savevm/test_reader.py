"""BytesReader: exact reads, and peeks that leave everything where it was."""

from __future__ import annotations

import pytest

from qemumig.errors import StreamError
from qemumig.savevm.reader import BytesReader, counted_string, read_counted_string


def test_numbers_are_big_endian_and_consumed_in_order() -> None:
    reader = BytesReader(bytes(range(1, 16)))
    assert reader.read_u8() == 0x01
    assert reader.read_be16() == 0x0203
    assert reader.read_be32() == 0x04050607
    assert reader.read_be64() == 0x08090A0B0C0D0E0F
    assert reader.offset == 15
    assert reader.remaining == 0


def test_offset_counts_from_the_base() -> None:
    reader = BytesReader(b"abcd", 0x1000)
    reader.read(3)
    assert reader.offset == 0x1003


def test_peek_consumes_nothing_and_ends_with_the_data() -> None:
    reader = BytesReader(b"abc")
    assert reader.peek(2) == b"ab"
    assert reader.peek(9) == b"abc"
    assert reader.offset == 0


def test_a_short_read_names_what_was_read_and_consumes_nothing() -> None:
    reader = BytesReader(b"abc", 16)
    with pytest.raises(StreamError, match=r"ends inside a moon at offset 0x10: 3 bytes left, 4 expected") as caught:
        reader.read(4, "a moon")
    assert caught.value.offset == 16
    assert reader.read(3) == b"abc"


def test_a_negative_length_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match="-1"):
        BytesReader(b"abc").read(-1)


def test_counted_strings_go_there_and_back() -> None:
    assert counted_string("pc.bios") == b"\x07pc.bios"
    assert read_counted_string(BytesReader(b"\x07pc.biosX"), "a name") == "pc.bios"
    assert read_counted_string(BytesReader(b"\x00"), "a name") == ""


def test_a_string_that_is_no_text_is_refused() -> None:
    with pytest.raises(StreamError, match=r"a name at offset 0x0 is b'\\xff', expected UTF-8"):
        read_counted_string(BytesReader(b"\x01\xff"), "a name")


def test_a_string_of_256_bytes_cannot_be_counted() -> None:
    assert len(counted_string("x" * 255)) == 256
    with pytest.raises(ValueError, match="256 bytes long"):
        counted_string("x" * 256)
