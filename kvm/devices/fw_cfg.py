"""fw_cfg: the machine tells the firmware what it is, through two ports or by DMA (machine.md §3).

    port 0x510   write 16 bits: select a key            port 0x511   read 8 bits: the key's data, byte by byte
    ports 0x514-0x51B   read: "QEMU CFG"   write: address of a request, big-endian, high half first;
                        the low half starts it

    request in guest memory, big-endian    0  u32 control    4  u32 length    8  u64 address
    control                                bit 0 error, 1 read, 2 skip, 3 select (key in the high half), 4 write

Data ends with zeroes for ever, a key that is nobody's is all zeroes.  No key is writable.  When a request is done its
control word is 0, or 1 when something in it was wrong.

Threads   vCPU threads; a migration saves and loads.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass

from qemumig.savevm.devices.fw_cfg import FwCfgState

from ..errors import KvmError
from .memory import HOLE_END, HOLE_START

PORTS = 0x510, 2
DMA_PORTS = 0x514, 8

INVALID_KEY = 0xFFFF
KEY_SIGNATURE, KEY_FEATURES, KEY_RAM_SIZE, KEY_CPUS, KEY_MAX_CPUS, KEY_DIRECTORY = 0, 1, 3, 5, 0xF, 0x19
FIRST_FILE_KEY = 0x20
_NAME_SIZE = 56  # bytes of a file's name in the directory

_FEATURES = 1 | 2  # ports, DMA
_DMA_SIGNATURE = b"QEMU CFG"

_ERROR, _READ, _SKIP, _SELECT, _WRITE = 1, 2, 4, 8, 16
_REQUEST = struct.Struct(">IIQ")
_PIECE = 64 << 10  # bytes moved at a time: a request may ask for 4 GiB of zeroes

_E820_RAM, _E820_RESERVED = 1, 2
_KVM_PAGES = 0xFEFFC000, 0x4000  # identity map page and TSS


@dataclass(frozen=True)
class GuestAccess:
    """How DMA reaches guest memory; both raise KvmError for what is not RAM."""

    read: Callable[[int, int], bytes]
    write: Callable[[int, bytes], None]


class FwCfg:
    """The device behind both port ranges: registers are numbered from port 0x510."""

    def __init__(self, ram_size: int, cpus: int, max_cpus: int, memory: GuestAccess) -> None:
        # Set before the guest runs.
        self._memory = memory
        self._items = _items(ram_size, cpus, max_cpus)
        # Under lock.
        self._lock = threading.Lock()
        self._key = 0
        self._offset = 0  # u32, as on the wire
        self._dma_address = 0

    def reset(self) -> None:
        """Select the signature again."""
        with self._lock:
            self._key = self._offset = self._dma_address = 0

    # -- ports 0x510, 0x511

    def read(self, offset: int, size: int) -> int:
        """Port 0x511 gives the next byte; the selector cannot be read."""
        with self._lock:
            return self._take(1)[0] if (offset, size) == (1, 1) else 0

    def write(self, offset: int, size: int, value: int) -> None:
        """A word at port 0x510 selects a key; nothing else is writable."""
        if (offset, size) == (0, 2):
            with self._lock:
                self._select(value)

    # -- what both ways share; under lock

    def _select(self, key: int) -> None:
        self._key = key if key in self._items else INVALID_KEY
        self._offset = 0

    def _take(self, length: int) -> bytes:
        data = self._items.get(self._key, b"")[self._offset : self._offset + length]
        self._skip(length)
        return data + bytes(length - len(data))

    def _skip(self, length: int) -> None:
        """Move on, but not past the end of the data."""
        self._offset = min(self._offset + length, len(self._items.get(self._key, b"")))

    # -- DMA

    def read_signature(self, offset: int, size: int) -> int:
        """The DMA ports read as text."""
        return int.from_bytes(_DMA_SIGNATURE[offset : offset + size], "little")

    def write_address(self, offset: int, size: int, value: int) -> None:
        """Half of a request's address, or all of it; the low half starts the request."""
        with self._lock:
            big_endian = int.from_bytes(value.to_bytes(size, "little"), "big")
            if (offset, size) == (0, 4):
                self._dma_address = big_endian << 32
            elif (offset, size) == (4, 4):
                self._dma_address |= big_endian
                self._run_request()
            elif (offset, size) == (0, 8):
                self._dma_address = big_endian
                self._run_request()

    def _run_request(self) -> None:
        address, self._dma_address = self._dma_address, 0
        try:
            control, length, target = _REQUEST.unpack(self._memory.read(address, _REQUEST.size))
            result = self._carry_out(control, length, target)
            self._memory.write(address, result.to_bytes(4, "big"))
        except KvmError:
            pass  # the request is not in RAM: there is nowhere to say so

    def _carry_out(self, control: int, length: int, target: int) -> int:
        """Do what the request says; the control word that tells how it went."""
        if control & _SELECT:
            self._select(control >> 16)
        if control & _READ:
            return self._read_into(target, length)
        if control & _WRITE:
            return _ERROR
        if control & _SKIP:
            self._skip(length)
        return 0

    def _read_into(self, target: int, length: int) -> int:
        end = target + length
        while target < end:
            data = self._take(min(_PIECE, end - target))
            try:
                self._memory.write(target, data)
            except KvmError:
                return _ERROR
            target += len(data)
        return 0

    # -- migration

    def save(self) -> FwCfgState:
        """The selected key and the position in it."""
        with self._lock:
            return FwCfgState(self._key, self._offset, self._dma_address)

    def load(self, record: FwCfgState) -> None:
        """Go on where the source's guest was; keys that only its machine has read as zeroes."""
        with self._lock:
            self._key, self._offset = record.cur_entry, record.cur_offset
            self._dma_address = record.dma_addr or 0


class DmaPorts:
    """The ports 0x514-0x51B as a device of their own."""

    def __init__(self, fw_cfg: FwCfg) -> None:
        self.read = fw_cfg.read_signature
        self.write = fw_cfg.write_address


def _items(ram_size: int, cpus: int, max_cpus: int) -> dict[int, bytes]:
    """What each key holds; numbers little-endian, the directory big-endian."""
    files = {
        "bios-geometry": b"",
        "bootorder": b"",
        "etc/boot-fail-wait": b"\xff\xff\xff\xff",  # wait for ever
        "etc/e820": _e820(ram_size),
    }
    items = {
        KEY_SIGNATURE: b"QEMU",
        KEY_FEATURES: struct.pack("<I", _FEATURES),
        KEY_RAM_SIZE: struct.pack("<Q", ram_size),
        KEY_CPUS: struct.pack("<H", cpus),
        KEY_MAX_CPUS: struct.pack("<H", max_cpus),
    }
    directory = struct.pack(">I", len(files))
    for key, (name, data) in enumerate(files.items(), FIRST_FILE_KEY):
        items[key] = data
        directory += struct.pack(f">IHH{_NAME_SIZE}s", len(data), key, 0, name.encode())
    items[KEY_DIRECTORY] = directory
    return items


def _e820(ram_size: int) -> bytes:
    """The memory map for an operating system: start, length, type."""
    ranges = [(*_KVM_PAGES, _E820_RESERVED), (0, min(ram_size, HOLE_START), _E820_RAM)]
    if ram_size > HOLE_START:
        ranges.append((HOLE_END, ram_size - HOLE_START, _E820_RAM))
    return b"".join(struct.pack("<QQI", *one) for one in ranges)
