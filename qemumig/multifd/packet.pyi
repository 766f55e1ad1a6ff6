from collections.abc import Sequence
from typing import Any

def encode_init(uuid: bytes, channel_id: int) -> bytes:
    """The packet that opens channel *channel_id* of the machine with *uuid* (16 bytes, zeroes when it has none)."""

def decode_init(packet: bytes) -> tuple[bytes, int]:
    """UUID and channel id of an init packet of 64 bytes; StreamError for another magic or version."""

def encode_header(
    *,
    flags: int = 0,
    slots: int = 128,
    normal: Sequence[int] = (),
    zero: Sequence[int] = (),
    data_size: int = 0,
    number: int = 0,
    name: bytes = b"",
    magic: int = 0x11223344,
    version: int = 1,
    normal_pages: int | None = None,
    zero_pages: int | None = None,
) -> bytes:
    """A header as bytes: for tests and tools, which also want some that no sender would send.

    *normal* and *zero* are offsets of pages; *normal_pages* and *zero_pages* say that there are others than those.
    """

def decode_header(header: bytes) -> dict[str, Any]:
    """The fields of a header of 1344 bytes, by the names that `encode_header` has; StreamError when it is refused."""
