"""The firmware image: read once from its file, and put into guest memory at a cold start and at every reset.

The image is mapped so that it ends at 4 GiB, and its end again below 1 MiB (machine.md §2); a vCPU out of reset
starts 16 bytes before its end.
"""

from __future__ import annotations

from pathlib import Path

from qemumig.errors import MachineError

FIRMWARE_GRANULE = 64 << 10  # bytes; an image is a whole number of these
FIRMWARE_LIMIT = 16 << 20  # bytes; more would run into the interrupt controllers below 4 GiB


class FirmwareError(MachineError):
    """The firmware image is missing or of no usable size; the text is the whole diagnostic, program name included."""


def load_firmware(path: str) -> bytes:
    """The bytes of the image at *path*; FirmwareError when there is none, or none that can be mapped."""
    try:
        with Path(path).open("rb") as file:
            image = file.read(FIRMWARE_LIMIT + 1)
    except OSError as error:
        raise _refused(path) from error
    if not image or len(image) % FIRMWARE_GRANULE or len(image) > FIRMWARE_LIMIT:
        raise _refused(path)
    return image


def _refused(path: str) -> FirmwareError:
    return FirmwareError(f"qemu: could not load PC BIOS '{path}'")
