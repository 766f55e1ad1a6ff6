"""The table loader's script: what a firmware does with the ACPI files before a guest may look at them.

    128 bytes a command    0  u32 what    4  names of 56 bytes and numbers, little-endian

    1 allocate    file, alignment, zone (1: anywhere, 2: below 1 MiB, where the RSDP is looked for)
    2 add pointer file, file pointed to, offset, size: add the address of the second to the field in the first
    3 checksum    file, offset of the sum's byte, start, length: make the bytes' sum zero

Files are those of fw_cfg, offsets and lengths are in bytes.
"""

from __future__ import annotations

import struct

COMMAND_SIZE = 128
ALLOCATE, ADD_POINTER, ADD_CHECKSUM = 1, 2, 3
ZONE_HIGH, ZONE_LOW = 1, 2

_FORMS = {ALLOCATE: "<I56sIB", ADD_POINTER: "<I56s56sIB", ADD_CHECKSUM: "<I56sIII"}


def allocate(file: str, alignment: int, zone: int) -> bytes:
    """Find a place for *file* and copy it there."""
    return _command(ALLOCATE, file.encode(), alignment, zone)


def add_pointer(file: str, target: str, offset: int, size: int) -> bytes:
    """The field of *size* bytes at *offset* in *file* is an offset in *target*: make it an address."""
    return _command(ADD_POINTER, file.encode(), target.encode(), offset, size)


def add_checksum(file: str, sum_offset: int, start: int, length: int) -> bytes:
    """Let the *length* bytes from *start* add up to zero, by the byte at *sum_offset*."""
    return _command(ADD_CHECKSUM, file.encode(), sum_offset, start, length)


def _command(kind: int, *fields: bytes | int) -> bytes:
    return struct.pack(_FORMS[kind], kind, *fields).ljust(COMMAND_SIZE, b"\0")
