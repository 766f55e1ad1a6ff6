"""From a virtual address of the guest to a physical one: the walk that the processor does, done again over its tables.

    CR0.PG off                  virtual = physical, 32 bits
    CR4.PAE off                 2 levels of 4-byte entries, pages of 4 KiB and 4 MiB
    CR4.PAE, EFER.LMA off       3 levels of 8-byte entries, pages of 4 KiB and 2 MiB
    EFER.LMA                    4 levels, 5 with CR4.LA57, pages of 4 KiB, 2 MiB and 1 GiB

Rights are not looked at: who asks is a debugger, not the guest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

PAGE_SIZE = 4096
CR0_PG = 1 << 31
CR4_PSE, CR4_PAE, CR4_LA57 = 1 << 4, 1 << 5, 1 << 12
EFER_LMA = 1 << 10
PRESENT, LARGE = 1 << 0, 1 << 7
FRAME = ((1 << 52) - 1) & ~0xFFF  # the address bits of an 8-byte entry

Read = Callable[[int, int], bytes]  # guest-physical address, bytes; zeroes where there is no memory


@dataclass(frozen=True)
class ControlRegisters:
    """What says how a vCPU translates addresses."""

    cr0: int
    cr3: int
    cr4: int
    efer: int


def translate(registers: ControlRegisters, read: Read, address: int) -> int | None:
    """The guest-physical address behind virtual *address*; None where nothing is mapped."""
    if not registers.cr0 & CR0_PG:
        return address & 0xFFFFFFFF
    if not registers.cr4 & CR4_PAE:
        return _walk_short(registers, read, address & 0xFFFFFFFF)
    if not registers.efer & EFER_LMA:
        return _walk(read, registers.cr3 & 0xFFFFFFE0, address & 0xFFFFFFFF, levels=3)
    levels = 5 if registers.cr4 & CR4_LA57 else 4
    if not _is_canonical(address, 12 + 9 * levels):
        return None
    return _walk(read, registers.cr3 & FRAME, address, levels)


def _is_canonical(address: int, bits: int) -> bool:
    """True when the bits above *bits* repeat the highest of them."""
    high = address >> (bits - 1)
    return high in (0, (1 << (65 - bits)) - 1)


def _walk(read: Read, table: int, address: int, levels: int) -> int | None:
    """Tables of 512 entries of 8 bytes, from the top level down."""
    for level in range(levels, 0, -1):
        shift = 12 + 9 * (level - 1)
        entry = int.from_bytes(read(table + (address >> shift & 0x1FF) * 8, 8), "little")
        if not entry & PRESENT:
            return None
        if level == 1 or (entry & LARGE and level in (2, 3) and not (levels == 3 and level == 3)):
            within = (1 << shift) - 1
            return (entry & FRAME & ~within) | (address & within)
        table = entry & FRAME
    return None


def _walk_short(registers: ControlRegisters, read: Read, address: int) -> int | None:
    """Two tables of 1024 entries of 4 bytes."""
    entry = int.from_bytes(read((registers.cr3 & 0xFFFFF000) + (address >> 22) * 4, 4), "little")
    if not entry & PRESENT:
        return None
    if entry & LARGE and registers.cr4 & CR4_PSE:
        high = (entry >> 13 & 0xFF) << 32  # address bits 32 … 39
        return high | (entry & 0xFFC00000) | (address & 0x3FFFFF)
    entry = int.from_bytes(read((entry & 0xFFFFF000) + (address >> 12 & 0x3FF) * 4, 4), "little")
    if not entry & PRESENT:
        return None
    return (entry & 0xFFFFF000) | (address & 0xFFF)
