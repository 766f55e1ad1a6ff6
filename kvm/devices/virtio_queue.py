"""A split virtqueue: chains of buffers from the driver, answers to it, all of it in guest memory.

    descriptor table   16 bytes each: u64 address   u32 length   u16 flags (1 next, 2 writable, 4 indirect)   u16 next
    avail ring         u16 flags   u16 index   u16 head × num      u16 used_event
    used ring          u16 flags   u16 index   { u32 head   u32 written } × num      u16 avail_event

    driver: chain ─▶ avail[index % num], index + 1 ─▶ kick ─▶ pop ─▶ … ─▶ push ─▶ used, index + 1 ─▶ interrupt

Indices only grow, modulo 2^16.  Which index comes next is ours to remember on the avail side (it travels in the
stream) and is read back from the ring on the used side, once after every change of the rings.

What the driver writes there is taken for hostile: whatever does not hold raises VirtioError, and the device is broken
until its driver resets it.

Holds     (1) a chain has at most MAX_SEGMENTS pieces, each of them not empty and wholly in RAM, readable ones first
          (2) no more than num chains are out at a time

Threads   The device calls under its lock.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Protocol

from qemumig.savevm.devices.virtio_mmio import QUEUE_MAX, Request, Segment

MAX_SEGMENTS = QUEUE_MAX  # of one chain
DEFAULT_SIZE = 256
DEFAULT_ALIGN = 4096

_NEXT, _WRITABLE, _INDIRECT = 1, 2, 4
_NO_INTERRUPT = 1  # in the avail ring's flags
_DESCRIPTOR = struct.Struct("<QIHH")
_USED_ELEMENT = struct.Struct("<II")
_INDEX = 0xFFFF
_ADDRESS = (1 << 64) - 1


class VirtioError(Exception):
    """The driver broke the rules; the message says which."""


class Memory(Protocol):
    """Guest memory as a device reaches it; both calls want the whole range to be RAM."""

    def read(self, guest_address: int, length: int) -> bytes: ...

    def write(self, guest_address: int, data: bytes) -> None: ...

    def holds(self, guest_address: int, length: int) -> bool:
        """Whether all of the range is RAM."""


@dataclass
class Rings:
    """Where a queue is and how far it has come; *num* descriptors, *desc* 0: not set up."""

    num: int = DEFAULT_SIZE
    align: int = DEFAULT_ALIGN
    desc: int = 0
    avail: int = 0
    used: int = 0
    last_avail_index: int = 0


@dataclass
class _Chain:
    """What `_walk` has gathered."""

    readable: list[Segment] = field(default_factory=list)
    writable: list[Segment] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.readable) + len(self.writable)


class Queue:
    """One queue on *memory*; `rings` may be changed while no chain is out, then `forget` what was known of them."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self.reset()

    def reset(self) -> None:
        """No rings, nothing out."""
        self.rings = Rings()
        self.event_index = False  # the driver asks for interrupts, and for kicks, by index
        self.notify_on_empty = False
        self.forget()

    def forget(self) -> None:
        """The rings are new: read what is theirs again; the next answer always interrupts."""
        self._used_index: int | None = None
        self._signalled: int | None = None  # used index at the last question whether to interrupt

    def lay_out_legacy(self) -> None:
        """Put avail and used ring where a legacy driver has them: behind the descriptors, used on the next boundary."""
        rings = self.rings
        if rings.desc:
            rings.avail = rings.desc + _DESCRIPTOR.size * rings.num
            rings.used = -(-(rings.avail + 4 + 2 * rings.num + 2) // rings.align) * rings.align
        else:
            rings.avail = rings.used = 0

    @property
    def is_set_up(self) -> bool:
        return self.rings.desc != 0 and self.rings.num != 0

    # -- from the driver

    def pop(self, out: int) -> Request | None:
        """The next chain, or None when there is none; *out* chains are out already."""
        rings = self.rings
        waiting = (self._read_u16(rings.avail + 2) - rings.last_avail_index) & _INDEX
        if waiting == 0:
            return None
        if waiting > rings.num:
            raise VirtioError(
                f"the avail index is {waiting} ahead of {rings.last_avail_index}, expected at most {rings.num}"
            )
        if out >= rings.num:
            raise VirtioError(f"{out + 1} chains are out, expected at most {rings.num}")
        self._read_used_index()
        head = self._read_u16(rings.avail + 4 + 2 * (rings.last_avail_index % rings.num))
        chain = self._read_chain(head)
        rings.last_avail_index = (rings.last_avail_index + 1) & _INDEX
        if self.event_index:
            self.ask_for_kicks()
        return Request(head, chain.readable, chain.writable)

    def ask_for_kicks(self) -> None:
        """Tell the driver to kick for the very next chain.  Look for chains once more afterwards."""
        at = self.rings.used + 4 + _USED_ELEMENT.size * self.rings.num
        self._write(at, self.rings.last_avail_index.to_bytes(2, "little"))

    def _read_chain(self, head: int) -> _Chain:
        num = self.rings.num
        if head >= num:
            raise VirtioError(f"the avail ring names descriptor {head}, expected less than {num}")
        chain = _Chain()
        address, length, flags, _ = self._read_descriptor(self.rings.desc, head)
        if not flags & _INDIRECT:
            self._walk(chain, self.rings.desc, num, head)
            return chain
        if length == 0 or length % _DESCRIPTOR.size:
            raise VirtioError(f"an indirect table has {length} bytes, expected a multiple of {_DESCRIPTOR.size}")
        if not self._memory.holds(address, length):
            raise VirtioError(f"an indirect table of {length} bytes at {address:#x} is not all RAM")
        self._walk(chain, address, length // _DESCRIPTOR.size, 0)
        return chain

    def _walk(self, chain: _Chain, table: int, count: int, first: int) -> None:
        """Gather the chain that begins with descriptor *first* of *count*."""
        index, steps = first, 0
        while True:
            address, length, flags, following = self._read_descriptor(table, index)
            self._add(chain, Segment(address, length), flags)
            steps += 1
            if not flags & _NEXT:
                return
            if steps == count:
                raise VirtioError(f"a chain of more than {count} descriptors runs in circles")
            if following >= count:
                raise VirtioError(f"descriptor {index} leads to {following}, expected less than {count}")
            index = following

    def _add(self, chain: _Chain, segment: Segment, flags: int) -> None:
        if segment.length == 0:
            raise VirtioError(f"a buffer at {segment.address:#x} is empty")
        if not self._memory.holds(*segment):
            raise VirtioError(f"a buffer of {segment.length} bytes at {segment.address:#x} is not all RAM")
        if flags & _WRITABLE:
            chain.writable.append(segment)
        elif chain.writable:
            raise VirtioError("a readable buffer follows a writable one")
        else:
            chain.readable.append(segment)
        if len(chain) > MAX_SEGMENTS:
            raise VirtioError(f"a chain has more than {MAX_SEGMENTS} buffers")

    def problem_with(self, request: Request) -> str:
        """What is wrong with a chain from elsewhere, "" when nothing is."""
        chain = _Chain()
        try:
            for segments, flags in ((request.readable, 0), (request.writable, _WRITABLE)):
                for segment in segments:
                    self._add(chain, segment, flags)
        except VirtioError as error:
            return str(error)
        return ""

    # -- to the driver

    def push(self, head: int, written: int) -> None:
        """The chain at *head* is used, *written* bytes of it."""
        index, num = self._read_used_index(), self.rings.num
        at = self.rings.used + 4 + _USED_ELEMENT.size * (index % num)
        self._write(at, _USED_ELEMENT.pack(head, written))
        self._used_index = (index + 1) & _INDEX
        self._write(self.rings.used + 2, self._used_index.to_bytes(2, "little"))

    def wants_interrupt(self, out: int) -> bool:
        """Whether the driver wants to hear of the last push; *out* chains are still out."""
        rings = self.rings
        if self.notify_on_empty and not out and self._read_u16(rings.avail + 2) == rings.last_avail_index:
            return True
        if not self.event_index:
            return not self._read_u16(rings.avail) & _NO_INTERRUPT
        new, old = self._read_used_index(), self._signalled
        self._signalled = new
        wanted = self._read_u16(rings.avail + 4 + 2 * rings.num)
        return old is None or (new - wanted - 1) & _INDEX < (new - old) & _INDEX

    def _read_used_index(self) -> int:
        if self._used_index is None:
            self._used_index = self._read_u16(self.rings.used + 2)
        return self._used_index

    # -- memory

    def _read_descriptor(self, table: int, index: int) -> tuple[int, int, int, int]:
        address, length, flags, following = _DESCRIPTOR.unpack(
            self._read(table + _DESCRIPTOR.size * index, _DESCRIPTOR.size)
        )
        return address, length, flags, following

    def _read_u16(self, address: int) -> int:
        return int.from_bytes(self._read(address, 2), "little")

    def _read(self, address: int, length: int) -> bytes:
        self._require_ram(address, length)
        return self._memory.read(address, length)

    def _write(self, address: int, data: bytes) -> None:
        self._require_ram(address, len(data))
        self._memory.write(address, data)

    def _require_ram(self, address: int, length: int) -> None:
        if address + length > _ADDRESS or not self._memory.holds(address, length):
            raise VirtioError(f"a ring has {length} bytes at {address:#x}, where there is no RAM")
