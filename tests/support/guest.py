"""The self-checking guest: its image with parameters, and what it says of itself.

image   tests/guests/tinyguest.bin with a patched parameter block
status  64 bytes a vCPU from guest-physical 0x1000: passes, ticks, error character, …
letters on the serial port: A cold start, B, C, … another round of vCPU 0, 1, …; t the timer ticked; others are errors
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

IMAGE = Path(__file__).parents[1] / "guests" / "tinyguest.bin"
MAGIC = b"QMIGTG01"

TIMER, FPU, CLOCK, REGISTERS, DISK = 1, 2, 4, 8, 16
ALL_CHECKS = TIMER | FPU | CLOCK | REGISTERS
ERRORS = b"#%<$?!"

STATUS_ADDRESS, STATUS_SIZE = 0x1000, 64

_PARAMETERS = {  # offset and struct format
    "dirty_base": (0x08, "<Q"),
    "dirty_pages": (0x10, "<Q"),
    "print_every": (0x18, "<Q"),
    "spin": (0x20, "<Q"),
    "fill_base": (0x28, "<Q"),
    "fill_pages": (0x30, "<Q"),
    "fill_mode": (0x38, "<I"),
    "flags": (0x3C, "<I"),
    "ncpus": (0x40, "<I"),
    "map_gib": (0x44, "<I"),
    "xcr0_mask": (0x48, "<Q"),
    "apic_count": (0x50, "<I"),
}


def patched_image(**parameters: int) -> bytes:
    """The image with *parameters* by their names in the guest's README, lower case."""
    image = bytearray(IMAGE.read_bytes())
    assert image.startswith(MAGIC), f"{IMAGE} starts with {bytes(image[:8])!r}, expected {MAGIC!r}"
    for name, value in parameters.items():
        offset, form = _PARAMETERS[name]
        struct.pack_into(form, image, offset, value)
    return bytes(image)


def write_image(folder: Path, **parameters: int) -> str:
    """A patched image as a file in *folder*; its path."""
    path = folder / "guest.bin"
    path.write_bytes(patched_image(**parameters))
    return str(path)


@dataclass(frozen=True)
class Status:
    """A vCPU's status block."""

    passes: int
    ticks: int
    error: int  # ASCII code, 0 for none
    error_address: int
    error_value: int
    clock: int
    checksum: int
    prints: int


def status(read: Callable[[int, int], bytes], cpu: int = 0) -> Status:
    """The status block of vCPU *cpu*; *read* gives guest-physical memory."""
    return Status(*struct.unpack("<8Q", read(STATUS_ADDRESS + STATUS_SIZE * cpu, STATUS_SIZE)))


class Letters:
    """A back end for the serial port that remembers the letters and lets a test wait for them."""

    def __init__(self) -> None:
        self.text = b""
        self._more = threading.Condition()

    def write(self, data: bytes) -> int:
        """Called by the UART."""
        with self._more:
            self.text += data
            self._more.notify_all()
        return len(data)

    def set_receiver(self, receive: Callable[[bytes], None]) -> None:
        """Nobody types here."""

    def wait(self, count: int, letter: bytes = b"B", timeout: float = 60.0) -> bytes:
        """All letters, as soon as *letter* is among them *count* times more than now, or an error is."""
        wanted = self.text.count(letter) + count
        arrived = self.wait_for(lambda text: text.count(letter) >= wanted, timeout)
        assert arrived, f"no {count} more {letter!r} within {timeout} s; all that came is {self.text[-80:]!r}"
        return self.text

    def wait_for(self, holds: Callable[[bytes], bool], timeout: float = 60.0) -> bool:
        """Wait until *holds* of all letters, or an error is among them; False when *timeout* seconds passed."""
        with self._more:
            return self._more.wait_for(lambda: holds(self.text) or bool(self.errors), timeout)

    @property
    def errors(self) -> bytes:
        """The error characters that came."""
        return bytes(character for character in self.text if character in ERRORS)
