"""A disk without a machine: plain guest memory, an image in a file, and a driver to steer it with."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

from kvm.block import RawImage
from kvm.devices.virtio_blk import DiskEvents, OnError, VirtioBlk
from kvm.devices.virtio_mmio import Transport
from kvm.errors import KvmError
from tests.kvm.devices.virtio_driver import Driver

RAM_SIZE = 1 << 20


class PlainMemory:
    """RAM from guest address 0 on, and nothing else; `writes` are (address, length)."""

    def __init__(self, size: int = RAM_SIZE) -> None:
        self.bytes = bytearray(size)
        self.writes: list[tuple[int, int]] = []

    def holds(self, guest_address: int, length: int) -> bool:
        return guest_address >= 0 and guest_address + length <= len(self.bytes)

    def read(self, guest_address: int, length: int) -> bytes:
        if not self.holds(guest_address, length):
            raise KvmError(errno.EFAULT, "read outside RAM")
        return bytes(self.bytes[guest_address : guest_address + length])

    def write(self, guest_address: int, data: bytes) -> None:
        if not self.holds(guest_address, len(data)):
            raise KvmError(errno.EFAULT, "write outside RAM")
        self.bytes[guest_address : guest_address + len(data)] = data
        self.writes.append((guest_address, len(data)))


class Bench:
    """A disk on the bench: `disk`, `transport`, `memory`, `image`, `driver`; it runs from the start.

    levels     of the interrupt line, in order          warnings, events, stops     what it had to say
    """

    def __init__(self, path: Path, *, modern: bool, image: Any = None, running: bool = True, **options: Any) -> None:
        if not path.exists():
            path.write_bytes(bytes(1 << 20))
        self.modern = modern
        self.memory = PlainMemory()
        self.image = image or RawImage(str(path))
        self.levels: list[bool] = []
        self.warnings: list[str] = []
        self.events: list[tuple[str, dict | None]] = []
        self.stops = 0
        self.transport = Transport("disk 'd0'", self.memory, self.levels.append, self.warnings.append, legacy=not modern)
        events = DiskEvents(lambda name, data: self.events.append((name, data)), self._stop_asked)
        self.disk = VirtioBlk("d0", self.image, self.transport, self.memory, events, self.warnings.append, **options)
        self.driver = Driver(self, modern=modern)
        if running:
            self.disk.start()

    def _stop_asked(self) -> None:
        self.stops += 1

    def read(self, offset: int, size: int = 4) -> int:
        return self.transport.read(offset, size)

    def write(self, offset: int, value: int, size: int = 4) -> None:
        self.transport.write(offset, size, value)

    def get(self, address: int, length: int) -> bytes:
        return self.memory.read(address, length)

    def put(self, address: int, data: bytes) -> None:
        self.memory.bytes[address : address + len(data)] = data

    def close(self) -> None:
        self.disk.close()
        self.image.close()


__all__ = ["Bench", "OnError", "PlainMemory"]
