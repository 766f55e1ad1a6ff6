"""The guest that counts interrupts (tests/guests/ticker.S): its image, and what it says of itself.

letters on the serial port: A cold start, p ten ticks of the PIT, r eight of the RTC, v an interrupt of a virtio slot, X one
that nobody expects
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

CODE = Path(__file__).parents[1] / "guests" / "ticker.bin"
IMAGE_SIZE = 64 << 10

USE_PIT, USE_RTC, USE_VIRTIO = 1, 2, 4
PIT_HZ, RTC_HZ = 100, 64

_FLAGS_AT = 4
_RESET_VECTOR = b"\xea\x00\x00\x00\xf0"  # jmp 0xF000:0, where the code is
_STATUS = 0x500


def image(flags: int) -> bytes:
    """The firmware, with the interrupts of *flags* in use."""
    code = bytearray(CODE.read_bytes())
    struct.pack_into("<I", code, _FLAGS_AT, flags)
    return bytes(code).ljust(IMAGE_SIZE - 16, b"\0") + _RESET_VECTOR.ljust(16, b"\0")


def write_image(folder: Path, flags: int) -> Path:
    """The firmware as a file in *folder*."""
    path = folder / "ticker.bin"
    path.write_bytes(image(flags))
    return path


@dataclass(frozen=True)
class Ticks:
    """How many interrupts came; *time*: hour, minute and second of the RTC at its last; *no_cause*: of the RTC, idly."""

    pit: int
    rtc: int
    virtio: int
    time: tuple[int, int, int]
    no_cause: int


def ticks(read: Callable[[int, int], bytes]) -> Ticks:
    """The status; *read* gives guest-physical memory."""
    pit, rtc, virtio, packed, no_cause = struct.unpack("<5I", read(_STATUS, 20))
    digits = packed.to_bytes(4, "big")[1:]
    hour, minute, second = ((byte >> 4) * 10 + byte % 16 for byte in digits)
    return Ticks(pit, rtc, virtio, (hour, minute, second), no_cause)
