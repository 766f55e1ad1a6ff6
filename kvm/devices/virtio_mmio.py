"""An empty virtio-mmio slot: it says what it is, and that no device is behind it (machine.md §3).

    0x00   magic "virt"        0x04   version 1 (legacy)        0x08   device id 0: nobody here
    0x0C   vendor "QEMU"       all else reads as zero, writes are lost

A driver that finds device id 0 turns away.  The slot has no state, in the machine or on the wire.
"""

from __future__ import annotations

SLOT_SIZE = 0x200  # bytes
_MAGIC = 0x74726976
_LEGACY_VERSION = 1
_VENDOR = 0x554D4551

_REGISTERS = b"".join(word.to_bytes(4, "little") for word in (_MAGIC, _LEGACY_VERSION, 0, _VENDOR))


class EmptySlot:
    """A transport without a device; one object may serve any number of slots."""

    def read(self, offset: int, size: int) -> int:
        return int.from_bytes(_REGISTERS[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        """Nobody listens."""
