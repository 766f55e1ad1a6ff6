"""The twins of the zero test agree, wherever the one byte is that is not zero."""

import mmap

import pytest

from qemumig.encode.zero import IMPLEMENTATION, IMPLEMENTATIONS, buffer_is_zero


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("length", [256, 512, 4096, 8192])
def test_every_single_byte_is_seen(implementation: str, length: int) -> None:
    page = bytearray(length)
    assert buffer_is_zero(page, implementation)
    for position in range(length):
        page[position] = 0x80
        assert not buffer_is_zero(page, implementation), f"byte {position}"
        page[position] = 0


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bytes_around_the_page_do_not_count(implementation: str) -> None:
    memory = memoryview(bytearray(b"\xff" * 4096 + bytes(4096) + b"\xff" * 4096))
    for shift in (-1, 0, 1):
        assert buffer_is_zero(memory[4096 + shift : 8192 + shift], implementation) == (shift == 0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nothing_is_read_past_the_end_of_a_mapping(implementation: str) -> None:
    with mmap.mmap(-1, 4096) as memory:
        assert buffer_is_zero(memoryview(memory), implementation)


def test_the_widest_twin_is_in_use() -> None:
    assert IMPLEMENTATIONS[0] == "plain"
    assert IMPLEMENTATIONS[-1] == IMPLEMENTATION


@pytest.mark.parametrize("length", [0, 1, 255, 4095])
def test_lengths_that_do_not_fit_are_refused(length: int) -> None:
    with pytest.raises(ValueError, match=f"page length {length} is not a positive multiple of 256"):
        buffer_is_zero(bytes(length))
    with pytest.raises(ValueError, match="no zero test 'mmx'"):
        buffer_is_zero(bytes(256), "mmx")
