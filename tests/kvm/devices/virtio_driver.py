"""A virtio-blk driver for tests: it does what a guest would do, and what none should.

    reach = Reach(...)                          how it gets at the slot's registers and at guest memory
    driver = Driver(reach, modern=True)
    driver.start()                              features, one queue, DRIVER_OK
    driver.write(sector, data)                  the request's status byte
    driver.push([out(b"..."), into(512)])       any chain at all; `finish` waits until the device has used it

The same driver steers our disk and, through QEMU's qtest, a real one: whoever asks both can compare the answers.
"""

from __future__ import annotations

import struct
import time
from dataclasses import dataclass, field
from typing import Protocol

MAGIC, VERSION, DEVICE_ID, VENDOR_ID = 0x00, 0x04, 0x08, 0x0C
DEVICE_FEATURES, DEVICE_FEATURES_SEL, DRIVER_FEATURES, DRIVER_FEATURES_SEL = 0x10, 0x14, 0x20, 0x24
GUEST_PAGE_SIZE, QUEUE_SEL, QUEUE_NUM_MAX, QUEUE_NUM, QUEUE_ALIGN, QUEUE_PFN = 0x28, 0x30, 0x34, 0x38, 0x3C, 0x40
QUEUE_READY, QUEUE_NOTIFY, INTERRUPT_STATUS, INTERRUPT_ACK, STATUS = 0x44, 0x50, 0x60, 0x64, 0x70
QUEUE_DESC, QUEUE_AVAIL, QUEUE_USED, CONFIG_GENERATION, CONFIG = 0x80, 0x90, 0xA0, 0xFC, 0x100

ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET = 1, 2, 4, 8, 0x40
NEXT, WRITABLE, INDIRECT = 1, 2, 4  # flags of a descriptor
NO_INTERRUPT, NO_NOTIFY = 1, 1  # flags of the avail ring, of the used ring

INDIRECT_DESC, EVENT_IDX, VERSION_1 = 1 << 28, 1 << 29, 1 << 32
BLK_RO, BLK_SCSI, BLK_FLUSH, BLK_CONFIG_WCE = 1 << 5, 1 << 7, 1 << 9, 1 << 11
BLK_DISCARD, BLK_WRITE_ZEROES = 1 << 13, 1 << 14
READ, WRITE, SCSI, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 2, 4, 8, 11, 13

OK, IOERR, UNSUPP = 0, 1, 2
UNTOUCHED = 0xEE  # what a status byte holds before the device writes it

PAGE = 4096
TABLE, BUFFERS, INDIRECT_TABLES = 0x10000, 0x20000, 0x40000  # guest addresses
PATIENCE_S = 10.0


class Reach(Protocol):
    """The way to one slot and to guest memory."""

    def read(self, offset: int, size: int = 4) -> int: ...

    def write(self, offset: int, value: int, size: int = 4) -> None: ...

    def get(self, address: int, length: int) -> bytes: ...

    def put(self, address: int, data: bytes) -> None: ...


@dataclass
class Buffer:
    """A descriptor-to-be: bytes for the device, or room for bytes from it.  *address*: where, else the driver chooses."""

    data: bytes = b""
    room: int = 0
    address: int | None = None
    flags: int = 0

    @property
    def length(self) -> int:
        return self.room or len(self.data)


def out(data: bytes, **rest: int) -> Buffer:
    """Bytes that the device reads."""
    return Buffer(data, **rest)


def into(length: int, **rest: int) -> Buffer:
    """Room that the device writes."""
    return Buffer(room=length, flags=WRITABLE, **rest)


def header(kind: int, sector: int = 0) -> Buffer:
    """The first 16 bytes of a request."""
    return out(struct.pack("<IIQ", kind, 0, sector))


def segment(sector: int, count: int, flags: int = 0) -> bytes:
    """What a discard or a write-zeroes is about."""
    return struct.pack("<QII", sector, count, flags)


@dataclass
class Pushed:
    """A chain in the ring: head descriptor, the buffers and where they lie."""

    head: int
    places: list[tuple[int, Buffer]] = field(default_factory=list)


class Driver:
    """One queue of *size* entries at TABLE."""

    def __init__(self, reach: Reach, *, modern: bool, size: int = 8) -> None:
        self.reach = reach
        self.modern = modern
        self.size = size
        self.features = 0
        self.desc = TABLE
        self.avail = TABLE + 16 * size
        self.used = -(-(self.avail + 6 + 2 * size) // PAGE) * PAGE
        self.pushed = self.seen = 0  # avail entries ever made, used entries ever seen
        self._next_buffer = BUFFERS
        self._free = 0

    # -- setting up

    def offered(self) -> int:
        """The features the device offers, all 64 bits."""
        halves = []
        for half in (0, 1):
            self.reach.write(DEVICE_FEATURES_SEL, half)
            halves.append(self.reach.read(DEVICE_FEATURES))
        return halves[0] | halves[1] << 32

    def negotiate(self, features: int) -> None:
        """Reset, say hello, accept *features* (VERSION_1 too, if modern)."""
        self.features = features | (VERSION_1 if self.modern else 0)
        self.reach.write(STATUS, 0)
        self.reach.write(STATUS, ACKNOWLEDGE | DRIVER)
        for half in (0, 1) if self.modern else (0,):
            self.reach.write(DRIVER_FEATURES_SEL, half)
            self.reach.write(DRIVER_FEATURES, self.features >> 32 * half & 0xFFFFFFFF)
        if self.modern:
            self.reach.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK)

    def set_up_queue(self) -> None:
        """Tell the device where the rings are; they are emptied."""
        self.reach.put(self.desc, bytes(self.used + 6 + 8 * self.size - self.desc))
        self.pushed = self.seen = 0
        self.reach.write(QUEUE_SEL, 0)
        self.reach.write(QUEUE_NUM, self.size)
        if not self.modern:
            self.reach.write(GUEST_PAGE_SIZE, PAGE)
            self.reach.write(QUEUE_ALIGN, PAGE)
            self.reach.write(QUEUE_PFN, self.desc // PAGE)
            return
        for register, address in ((QUEUE_DESC, self.desc), (QUEUE_AVAIL, self.avail), (QUEUE_USED, self.used)):
            self.reach.write(register, address & 0xFFFFFFFF)
            self.reach.write(register + 4, address >> 32)
        self.reach.write(QUEUE_READY, 1)

    def start(self, features: int = 0) -> None:
        """From reset to a running device."""
        self.negotiate(features)
        self.set_up_queue()
        self.reach.write(STATUS, ACKNOWLEDGE | DRIVER | (FEATURES_OK if self.modern else 0) | DRIVER_OK)

    # -- rings

    def describe(self, index: int, address: int, length: int, flags: int, following: int, table: int | None = None) -> None:
        """Fill in a descriptor."""
        at = (self.desc if table is None else table) + 16 * index
        self.reach.put(at, struct.pack("<QIHH", address & (1 << 64) - 1, length, flags, following))

    def place(self, buffers: list[Buffer]) -> list[tuple[int, Buffer]]:
        """Put the buffers into memory."""
        places = []
        for buffer in buffers:
            address = buffer.address
            if address is None:
                if self._next_buffer + buffer.length > INDIRECT_TABLES:
                    self._next_buffer = BUFFERS
                address = self._next_buffer
                self._next_buffer += -(-buffer.length // 64) * 64
                self.reach.put(address, buffer.data or bytes([UNTOUCHED]) * buffer.length)
            places.append((address, buffer))
        return places

    def push(self, buffers: list[Buffer], *, indirect: bool = False, notify: bool = True) -> Pushed:
        """Make a chain of *buffers* available."""
        pushed = Pushed(self._free if not indirect else self._free % self.size, self.place(buffers))
        table, first = (INDIRECT_TABLES + 0x1000 * pushed.head, 0) if indirect else (None, pushed.head)
        for number, (address, buffer) in enumerate(pushed.places):
            last = number == len(buffers) - 1
            following = (first + number + 1) % self.size if table is None else number + 1
            flags = buffer.flags | (0 if last else NEXT)
            index = (first + number) % self.size if table is None else number
            self.describe(index, address, buffer.length, flags, following, table)
        if table is not None:
            self.describe(pushed.head, table, 16 * len(buffers), INDIRECT, 0)
        self._free = (self._free + (1 if indirect else len(buffers))) % self.size
        self.offer(pushed.head, notify=notify)
        return pushed

    def offer(self, head: int, *, notify: bool = True) -> None:
        """Make the chain at *head* available."""
        self.reach.put(self.avail + 4 + 2 * (self.pushed % self.size), struct.pack("<H", head))
        self.pushed += 1
        self.reach.put(self.avail + 2, struct.pack("<H", self.pushed & 0xFFFF))
        if notify:
            self.notify()

    def notify(self) -> None:
        """Kick queue 0."""
        self.reach.write(QUEUE_NOTIFY, 0)

    def used_index(self) -> int:
        return struct.unpack("<H", self.reach.get(self.used + 2, 2))[0]

    def used_entry(self, number: int) -> tuple[int, int]:
        """(head, length) of the used ring's entry *number*, counted from the start."""
        return struct.unpack("<II", self.reach.get(self.used + 4 + 8 * (number % self.size), 8))

    def finish(self) -> tuple[int, int]:
        """Wait for the next used entry and return it: (head, bytes written)."""
        end = time.monotonic() + PATIENCE_S
        while self.used_index() == self.seen & 0xFFFF:
            assert time.monotonic() < end, f"the device has used nothing; its status is {self.status():#x}"
            time.sleep(0.001)
        self.seen += 1
        return self.used_entry(self.seen - 1)

    def status(self) -> int:
        return self.reach.read(STATUS)

    # -- whole requests

    def request(self, kind: int, sector: int, *data: Buffer, indirect: bool = False) -> tuple[int, list[bytes]]:
        """Carry out one request; its status and what the device left in the writable data buffers."""
        pushed = self.push([header(kind, sector), *data, into(1)], indirect=indirect)
        head, _ = self.finish()
        assert head == pushed.head
        contents = [self.reach.get(address, buffer.room) for address, buffer in pushed.places if buffer.flags & WRITABLE]
        return contents[-1][0], contents[:-1]

    def write(self, sector: int, data: bytes, **how: bool) -> int:
        return self.request(WRITE, sector, out(data), **how)[0]

    def read(self, sector: int, length: int, **how: bool) -> tuple[int, bytes]:
        status, contents = self.request(READ, sector, into(length), **how)
        return status, contents[0]

    def flush(self) -> int:
        return self.request(FLUSH, 0)[0]
