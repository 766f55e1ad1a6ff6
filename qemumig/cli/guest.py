"""The tiny guest: firmware and program in one image of 64 KiB, which checks itself while it runs.

Every vCPU walks over its share of a range of pages, adds one to the first word of each and compares it with the
number of walks ("passes") so far: a lost or stale page shows within one pass.  After `print_every` passes it
prints a letter (`B` for vCPU 0, `C` for vCPU 1, …); the first failed check prints a character of `FAILURES`
and parks that vCPU.  One block of 64 bytes per vCPU at guest-physical 0x1000 tells how it fares.

In    `GuestParameters` → the image with these parameters
Out   status blocks and serial output → what they say, in words
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, fields
from importlib import resources

IMAGE_SIZE = 65536
PAGE_SIZE = 4096
STATUS_ADDRESS = 0x1000
STATUS_SIZE = 64
CLOCK_PAGE = 0x5000  # the paravirtual clock of all vCPUs: the host's kernel writes it, also on a stopped guest

CHECK_TIMER, CHECK_FPU, CHECK_CLOCK, CHECK_REGISTERS = 1, 2, 4, 8
ALL_CHECKS = CHECK_TIMER | CHECK_FPU | CHECK_CLOCK | CHECK_REGISTERS

FILL_NOTHING, FILL_RANDOM, FILL_REPEATED, FILL_HALF_RANDOM = 0, 1, 2, 3

COLD_START = "A"
FAILURES = {
    "#": "a page has wrong contents",
    "%": "the FPU registers have changed",
    "<": "the paravirtual clock went backwards",
    "$": "a privileged register has changed",
    "?": "the disk failed or holds a wrong block",
    "!": "an unexpected exception came",
}

LAYOUT = {  # field of GuestParameters: offset in the image, format
    "dirty_base": (0x08, "<Q"),
    "dirty_pages": (0x10, "<Q"),
    "print_every": (0x18, "<Q"),
    "spin": (0x20, "<Q"),
    "fill_base": (0x28, "<Q"),
    "fill_pages": (0x30, "<Q"),
    "fill_mode": (0x38, "<I"),
    "flags": (0x3C, "<I"),
    "cpus": (0x40, "<I"),
    "map_gib": (0x44, "<I"),
    "xcr0_mask": (0x48, "<Q"),
    "apic_count": (0x50, "<I"),
}


@dataclass(frozen=True)
class GuestParameters:
    """What the guest does; addresses are guest-physical, in bytes."""

    dirty_base: int = 0x1000000
    dirty_pages: int = 1024  # written again and again, split evenly among the vCPUs
    print_every: int = 1000  # passes per letter
    spin: int = 0  # iterations of a delay loop per page
    fill_base: int = 0x2000000
    fill_pages: int = 0  # filled once, at the start
    fill_mode: int = FILL_NOTHING
    flags: int = 0
    cpus: int = 1
    map_gib: int = 4
    xcr0_mask: int = 3
    apic_count: int = 10_000_000

    def image(self) -> bytes:
        """The guest image with these parameters.  ValueError when one does not fit its field."""
        image = bytearray(resources.files(__package__).joinpath("tinyguest.bin").read_bytes())
        if len(image) != IMAGE_SIZE or image[:8] != b"QMIGTG01":
            raise ValueError(f"guest image: {len(image)} bytes that begin with {bytes(image[:8])!r}, expected {IMAGE_SIZE}")
        for parameter in fields(self):
            offset, form = LAYOUT[parameter.name]
            value = getattr(self, parameter.name)
            try:
                struct.pack_into(form, image, offset, value)
            except struct.error as error:
                raise ValueError(f"guest parameter {parameter.name}: {value} does not fit") from error
        return bytes(image)


@dataclass(frozen=True)
class GuestStatus:
    """One vCPU's own report."""

    passes: int
    ticks: int
    error: str  # "" or a character of FAILURES
    address: int  # of the bad page
    value: int  # found there
    clock: int  # last paravirtual clock reading, ns
    checksum: int
    letters: int

    @property
    def complaint(self) -> str:
        """What is wrong, or "" when nothing is."""
        if not self.error:
            return ""
        what = FAILURES.get(self.error, "an unknown failure")
        return f"{self.error!r} after {self.passes} passes: {what} (address {self.address:#x}, {self.value:#x})"


def parse_status(data: bytes, cpus: int) -> list[GuestStatus]:
    """The status blocks of *cpus* vCPUs out of the bytes at STATUS_ADDRESS."""
    if len(data) != STATUS_SIZE * cpus:
        raise ValueError(f"guest status: {len(data)} bytes, expected {STATUS_SIZE * cpus} for {cpus} vCPUs")
    blocks = struct.iter_unpack("<8Q", data)
    return [GuestStatus(p, t, chr(e & 0xFF) if e else "", *rest) for p, t, e, *rest in blocks]


def failures_in(output: bytes) -> list[str]:
    """The error characters in the guest's serial output, each once."""
    return sorted({chr(c) for c in output} & FAILURES.keys())
