"""Guest memory of the machine: two RAM blocks, where the guest sees them, and the firmware in the second.

    block          guest-physical                                    machine.md §2
    microvm.ram    0 … 3 GiB, the rest from 4 GiB on                 less what the firmware's low alias hides
                   (pc.ram: split elsewhere, machine_types.py)
    pc.bios        ends at 4 GiB; its last 128 KiB end at 1 MiB too  writable: both places are the same bytes

Every piece is a memory slot of KVM.  Writes that we make ourselves (firmware, DMA) are not in KVM's log: they are
reported to `wrote`, *after* the bytes are there, or a migration could send the page in between and lose them.

Threads   Built and closed by the machine; reads and writes from any thread.  Bytes are copied without the GIL: the
          page may still have to come from a migration's source, and the thread that fetches it needs the GIL.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from qemumig.ram.block import RAMBlock

from ..dirty import LoggedSlot
from ..errors import KvmError
from ..memory import AddressSpace, HostMemory, Mapping
from ..vm import Vm

_libc = ctypes.CDLL(None, use_errno=True)
_libc.memcpy.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_libc.memcpy.restype = ctypes.c_void_p
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

PAGE_SIZE = 4096
LOW_ALIAS_END = 1 << 20
LOW_ALIAS_LIMIT = 128 << 10  # bytes of the firmware that are seen below 1 MiB
HOLE_START = 3 << 30  # RAM below the hole ends here
HOLE_END = 4 << 30  # the firmware ends here, and RAM goes on

FIRMWARE_IDSTR = "pc.bios"

Wrote = Callable[[RAMBlock, int, int], None]  # (block, offset, length) in bytes


@dataclass(frozen=True, slots=True)
class Piece:
    """*size* bytes of a block from *offset*, seen at *guest_address*."""

    guest_address: int
    offset: int
    size: int
    is_firmware: bool


def memory_map(ram_size: int, firmware_size: int, below_hole: int | None = None) -> list[Piece]:
    """The pieces of both blocks in the order of their addresses; sizes in bytes, whole pages.

    *below_hole*: how much of the RAM is below 4 GiB, if not as much as a microvm has there.
    """
    alias_start = LOW_ALIAS_END - min(firmware_size, LOW_ALIAS_LIMIT)
    if below_hole is None:
        below_hole = min(ram_size, HOLE_START)
    pieces = [
        Piece(0, 0, min(below_hole, alias_start), False),
        Piece(alias_start, firmware_size - (LOW_ALIAS_END - alias_start), LOW_ALIAS_END - alias_start, True),
        Piece(LOW_ALIAS_END, LOW_ALIAS_END, below_hole - LOW_ALIAS_END, False),
        Piece(HOLE_END - firmware_size, 0, firmware_size, True),
        Piece(HOLE_END, below_hole, ram_size - below_hole, False),
    ]
    return [piece for piece in pieces if piece.size > 0]


class GuestMemory:
    """Both blocks mapped into *vm*; `blocks` in the order of the wire's list."""

    def __init__(self, vm: Vm, ram: HostMemory, ram_idstr: str, firmware_size: int, below_hole: int | None = None) -> None:
        """*ram* belongs to the new object from the first moment, even if mapping it fails."""
        self._vm = vm
        self._ram = ram
        self._space = AddressSpace()
        self._wrote: Wrote = lambda block, offset, length: None
        try:
            self._firmware = HostMemory.anonymous(firmware_size)
        except KvmError:
            ram.close()
            raise
        self.ram_block = _block(ram_idstr, ram, 0)
        self.firmware_block = _block(FIRMWARE_IDSTR, self._firmware, HOLE_END - firmware_size)
        self.blocks = sorted((self.ram_block, self.firmware_block), key=lambda block: -block.max_length)
        self.logged_slots: list[LoggedSlot] = []
        self.pieces = memory_map(ram.size, firmware_size, below_hole)
        for slot, piece in enumerate(self.pieces):
            self._map(slot, piece)

    def report_writes_to(self, wrote: Wrote) -> None:
        """Tell *wrote* of every write made from here."""
        self._wrote = wrote

    def not_fresh(self) -> None:
        """The guest is about to run, or somebody filled the memory: it need not be zero any more."""
        for block in self.blocks:
            block.fresh = False

    def load_firmware(self, image: bytes) -> None:
        """Put the firmware into its block; both places where the guest sees it change."""
        self.write(HOLE_END - self.firmware_block.used_length, image)

    def read(self, guest_address: int, length: int) -> bytes:
        """*length* bytes, all of them in RAM, else KvmError."""
        self._require_mapped(guest_address, length)
        return self.read_or_zeroes(guest_address, length)

    def read_or_zeroes(self, guest_address: int, length: int) -> bytes:
        """*length* bytes; what is no RAM reads as zero."""
        data = bytearray(length)
        if length:
            start = ctypes.addressof(ctypes.c_char.from_buffer(data))
            for mapping, at, size in self._pieces(guest_address, length):
                _libc.memcpy(start + at - guest_address, _host_address(mapping, at), size)
        return bytes(data)

    def write(self, guest_address: int, data: bytes) -> None:
        """Write *data* into RAM; KvmError, and nothing written, when some of it would miss."""
        self._require_mapped(guest_address, len(data))
        for mapping, at, size in self._pieces(guest_address, len(data)):
            done = at - guest_address
            _libc.memcpy(_host_address(mapping, at), data[done : done + size], size)
            block = self._block_of(mapping)
            block.fresh = False
            self._wrote(block, mapping.offset + at - mapping.guest_address, size)

    def places(self, addresses: Iterable[int]) -> list[tuple[RAMBlock, int]]:
        """Where in which block guest-physical *addresses* are; those that are no RAM are left out."""
        found = [(mapping, at) for address in addresses for mapping, at, _ in self._pieces(address, 1)]
        return [(self._block_of(mapping), mapping.offset + at - mapping.guest_address) for mapping, at in found]

    def discard(self) -> None:
        """Let every private block be as it was when it was mapped; shared memory may be somebody else's, too."""
        for block, memory in ((self.ram_block, self._ram), (self.firmware_block, self._firmware)):
            if not memory.shared:
                forget(block, memory)

    def close(self) -> None:
        """Unmap the host memory; the VM is closed already.  Twice is allowed; all addresses are unmapped then."""
        self._space = AddressSpace()
        self._ram.close()
        self._firmware.close()

    def _map(self, slot: int, piece: Piece) -> None:
        memory, block = (self._firmware, self.firmware_block) if piece.is_firmware else (self._ram, self.ram_block)
        mapping = self._space.map(piece.guest_address, memory, piece.offset, piece.size, slot)
        self._vm.set_memory_slot(slot, piece.guest_address, piece.size, mapping.host_address)
        self.logged_slots.append(LoggedSlot(slot, block, piece.offset // PAGE_SIZE, piece.size // PAGE_SIZE))

    def _block_of(self, mapping: Mapping) -> RAMBlock:
        return self.firmware_block if mapping.memory is self._firmware else self.ram_block

    def _pieces(self, guest_address: int, length: int) -> Iterator[tuple[Mapping, int, int]]:
        """The parts of the range that are RAM: mapping, guest address, size."""
        for mapping in self._space:
            start = max(mapping.guest_address, guest_address)
            end = min(mapping.end, guest_address + length)
            if start < end:
                yield mapping, start, end - start

    def _require_mapped(self, guest_address: int, length: int) -> None:
        found = sum(size for _, _, size in self._pieces(guest_address, length))
        if found != length:
            what = f"{length:#x} bytes at guest address {guest_address:#x}: {found:#x} of them are RAM"
            raise KvmError(errno.EFAULT, what)


def read_host(host_address: int, length: int) -> bytes:
    """*length* bytes of a block, copied without the GIL: the page may still be at a migration's source."""
    data = bytearray(length)
    if length:
        _libc.memcpy(ctypes.addressof(ctypes.c_char.from_buffer(data)), host_address, length)
    return bytes(data)


def write_host(host_address: int, data: bytes) -> None:
    """Write *data* into a block, likewise."""
    _libc.memcpy(host_address, data, len(data))


def forget(block: RAMBlock, memory: HostMemory) -> None:
    """Let *memory*, which is private and all of *block*, be as it was when it was mapped; KvmError."""
    if _libc.madvise(memory.host_address, memory.size, mmap.MADV_DONTNEED) != 0:
        raise KvmError(ctypes.get_errno(), f"madvise (RAM block {block.idstr!r})")
    block.fresh = memory.fresh


def _host_address(mapping: Mapping, guest_address: int) -> int:
    return mapping.host_address + guest_address - mapping.guest_address


def _block(idstr: str, memory: HostMemory, guest_address: int) -> RAMBlock:
    return RAMBlock(
        idstr,
        memory.host_address,
        memory.size,
        page_size=memory.page_size,
        guest_address=guest_address,
        shared=memory.shared,
        named=memory.kind == "file",
        anonymous=memory.kind == "anonymous" and not memory.shared,
        fresh=memory.fresh,
        owner=memory,
    )
