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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from qemumig.savevm.devices.fw_cfg import AcpiBlobs, FwCfgState

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


class Item(Protocol):
    """What a key holds, when that may change; `size` in bytes."""

    @property
    def size(self) -> int: ...

    def read(self, offset: int, length: int) -> bytes: ...


class _Fixed:
    """What a key holds for good."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self.size = len(content)

    def read(self, offset: int, length: int) -> bytes:
        return self._content[offset : offset + length]


class _Directory:
    """The list of files, big-endian: how many; of each length, key, and name in 56 bytes."""

    def __init__(self, entries: Sequence[tuple[int, str, Item]]) -> None:
        self._entries = entries
        self.size = 4 + (8 + _NAME_SIZE) * len(entries)

    def read(self, offset: int, length: int) -> bytes:
        """Lengths are those of now: a migration may have changed them."""
        data = struct.pack(">I", len(self._entries))
        for key, name, item in self._entries:
            data += struct.pack(f">IHH{_NAME_SIZE}s", item.size, key, 0, name.encode())
        return data[offset : offset + length]


_NOTHING = _Fixed(b"")


class AcpiFiles(Protocol):
    """The lengths of the ACPI files, which travel with this device."""

    def save(self) -> AcpiBlobs | None: ...

    def load(self, record: AcpiBlobs | None) -> None: ...


class FwCfg:
    """The device behind both port ranges: registers are numbered from port 0x510."""

    def __init__(
        self,
        ram_size: int,
        cpus: int,
        max_cpus: int,
        memory: GuestAccess,
        files: Mapping[str, Item | bytes] | None = None,
        acpi: AcpiFiles | None = None,
    ) -> None:
        """*files* are offered beside those that every machine has."""
        # Set before the guest runs.
        self._memory = memory
        self._acpi = acpi
        self._items = _numbers(ram_size, cpus, max_cpus) | _files(ram_size, files or {})
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
        data = self._items.get(self._key, _NOTHING).read(self._offset, length)
        self._skip(length)
        return data + bytes(length - len(data))

    def _skip(self, length: int) -> None:
        """Move on, but not past the end of the data."""
        self._offset = min(self._offset + length, self._items.get(self._key, _NOTHING).size)

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
            blobs = self._acpi.save() if self._acpi is not None else None
            return FwCfgState(self._key, self._offset, self._dma_address, blobs)

    def load(self, record: FwCfgState) -> None:
        """Go on where the source's guest was; keys that only its machine has read as zeroes."""
        with self._lock:
            if self._acpi is not None:
                self._acpi.load(record.acpi_mr)
            self._key, self._offset = record.cur_entry, record.cur_offset
            self._dma_address = record.dma_addr or 0


class DmaPorts:
    """The ports 0x514-0x51B as a device of their own."""

    def __init__(self, fw_cfg: FwCfg) -> None:
        self.read = fw_cfg.read_signature
        self.write = fw_cfg.write_address


def _numbers(ram_size: int, cpus: int, max_cpus: int) -> dict[int, Item]:
    """The keys that every firmware knows; numbers little-endian."""
    return {
        KEY_SIGNATURE: _Fixed(b"QEMU"),
        KEY_FEATURES: _Fixed(struct.pack("<I", _FEATURES)),
        KEY_RAM_SIZE: _Fixed(struct.pack("<Q", ram_size)),
        KEY_CPUS: _Fixed(struct.pack("<H", cpus)),
        KEY_MAX_CPUS: _Fixed(struct.pack("<H", max_cpus)),
    }


def _files(ram_size: int, more: Mapping[str, Item | bytes]) -> dict[int, Item]:
    """The keys of files, in the order of their names, and the directory that says which is which."""
    files: dict[str, Item | bytes] = {
        "bios-geometry": b"",
        "bootorder": b"",
        "etc/boot-fail-wait": b"\xff\xff\xff\xff",  # wait for ever
        "etc/e820": _e820(ram_size),
        **more,
    }
    items = {name: _Fixed(content) if isinstance(content, bytes) else content for name, content in files.items()}
    entries = list(enumerate(sorted(items), FIRST_FILE_KEY))
    by_key: dict[int, Item] = {key: items[name] for key, name in entries}
    return by_key | {KEY_DIRECTORY: _Directory([(key, name, items[name]) for key, name in entries])}


def _e820(ram_size: int) -> bytes:
    """The memory map for an operating system: start, length, type."""
    ranges = [(*_KVM_PAGES, _E820_RESERVED), (0, min(ram_size, HOLE_START), _E820_RAM)]
    if ram_size > HOLE_START:
        ranges.append((HOLE_END, ram_size - HOLE_START, _E820_RAM))
    return b"".join(struct.pack("<QQI", *one) for one in ranges)
