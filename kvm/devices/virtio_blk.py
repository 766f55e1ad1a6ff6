"""virtio-blk: a disk on a raw image (machine.md §5).

    request    readable: u32 type   u32 priority   u64 sector   data to write      writable: data read   u8 status
    worker     take ─▶ header ─▶ image ─▶ data and status into guest memory ─▶ answer ─▶ interrupt

The image is worked on by a thread of the disk, one request after the other; a vCPU only leaves a note that there is
something to do.  Data goes through a piece of our own memory: a page of the guest may still be on its way from a
migration's source, and a kernel that writes straight into it could not wait for it.

When the machine stops, the worker first takes whatever the guest has announced, and ends it.  A request that the image
refuses is answered with an error, or with success, or it is kept and stops the machine: that is for the user to say
(`OnError`).  Kept ones are carried out again when the machine goes on, here or where it has migrated to.

Threads   `disk/NAME`, started and joined here.  What it shares with others is under the transport's lock, which it does
          not hold while it reads or writes the image.
Holds     (1) after `stop` no request is out but the kept ones, and what was written has been flushed
          (2) whatever a driver puts into a request, nothing outside its buffers and the image is touched
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

from qemumig.errors import MachineError
from qemumig.savevm.devices.virtio_mmio import Request, Segment, VirtioBlkState
from qemumig.threads import start_thread

from ..block import SECTOR_SIZE, BlockError, RawImage
from ..errors import KvmError
from .virtio_mmio import Transport
from .virtio_queue import DEFAULT_SIZE, Memory, VirtioError

DEVICE_ID = 2

F_SEG_MAX, F_GEOMETRY, F_RO, F_BLK_SIZE, F_SCSI = 1 << 2, 1 << 4, 1 << 5, 1 << 6, 1 << 7
F_FLUSH, F_TOPOLOGY, F_CONFIG_WCE, F_DISCARD, F_WRITE_ZEROES = 1 << 9, 1 << 10, 1 << 11, 1 << 13, 1 << 14
_FEATURES = F_SEG_MAX | F_GEOMETRY | F_BLK_SIZE | F_FLUSH | F_TOPOLOGY | F_CONFIG_WCE | F_DISCARD | F_WRITE_ZEROES

_BARRIER = 1 << 31  # of old drivers; says nothing any more
_READ, _WRITE, _DISCARD, _WRITE_ZEROES = 0, 1, 11, 13
_SCSI, _FLUSH, _GET_ID = (2, 3), (4, 5), (8, 9)

OK, IOERR, UNSUPPORTED = 0, 1, 2

_HEADER = struct.Struct("<IIQ")
_RANGE = struct.Struct("<QII")  # sector, count, flags
_CONFIG = struct.Struct("<QIIHBBIBBHIBxHIIIIIB")
_WRITEBACK_AT = 32  # byte of the configuration
_SCSI_FAILED = struct.pack("<I", 255)
_UNMAP = 1  # flag of a write-zeroes
_SERIAL_LENGTH = 20

_MOST_SECTORS = 0x3FFFFF  # of one request: 2 GiB, less one sector
_PIECE = 1 << 20  # bytes moved at a time
_HEADS, _TRACK_SECTORS, _MOST_CYLINDERS = 16, 63, 16383


class OnError(Enum):
    """What becomes of a request that the image refuses."""

    REPORT = "report"
    IGNORE = "ignore"
    STOP = "stop"
    ENOSPC = "enospc"  # stop when the file system is full, else report


@dataclass(frozen=True)
class DiskEvents:
    """How a disk reaches the machine, from its own thread: QMP events, and a request to stop with `io-error`."""

    emit: Callable[[str, dict | None], None]
    stop_machine: Callable[[], None]


class VirtioBlk:
    """The disk *name* on *image* behind *transport*; it answers once `start` was called, its thread runs until `close`.

    *writeback*: the host may keep writes to itself until a flush, unless the driver says otherwise.
    """

    device_id = DEVICE_ID
    legacy_features = F_SCSI

    def __init__(
        self,
        name: str,
        image: RawImage,
        transport: Transport,
        memory: Memory,
        events: DiskEvents,
        warn: Callable[[str], None],
        *,
        on_read_error: OnError = OnError.REPORT,
        on_write_error: OnError = OnError.ENOSPC,
        writeback: bool = True,
        serial: str = "",
    ) -> None:
        # Set before the guest runs.
        self.name = name
        self.features = _FEATURES | (F_RO if image.read_only else 0)
        self._image = image
        self._transport = transport
        self._memory = memory
        self._events = events
        self._warn = warn
        self._on_error = {"read": on_read_error, "write": on_write_error}
        self._writeback_default = writeback
        self._serial = serial.encode()[:_SERIAL_LENGTH] + b"\0"
        # Under the machine's transition lock.
        self._unflushed = ""  # why the last flush failed
        # Under the transport's lock.
        self._changed = transport.lock
        self._writeback = writeback
        self._running = False
        self._kicked = False
        self._busy = False  # a request is being carried out
        self._holds = 0  # who wants that nothing is taken
        self._again: deque[Request] = deque()  # to be carried out before what is in the queue
        self._kept: list[Request] = []  # failed, for another attempt
        self._ending = False
        transport.attach(self)
        self._thread = start_thread(f"disk/{name}".encode()[:15].decode(errors="ignore"), self._work)

    # -- the machine's side

    def start(self) -> None:
        """The vCPUs are about to run: what failed is tried again, and chains may wait already."""
        with self._changed:
            self._again.extend(self._kept)
            self._kept.clear()
            self._running = self._kicked = True
            self._changed.notify_all()

    def stop(self) -> None:
        """No vCPU runs any more: end what the guest has asked for, then take nothing."""
        with self._changed:
            self._changed.wait_for(self._is_idle)
            self._running = False
        try:
            self._image.flush()
        except OSError as error:
            self._unflushed = f"disk '{self.name}' cannot be flushed: {error.strerror}"
            self._warn(self._unflushed)
        else:
            self._unflushed = ""

    def claim(self) -> None:
        """The image is this machine's; MachineError when somebody else has it."""
        try:
            self._image.lock()
        except BlockError as error:
            raise MachineError(f"disk '{self.name}': {'; '.join((str(error), *error.hints))}") from error

    def release(self) -> None:
        """The image is about to be another machine's."""
        self._image.unlock()

    def hard_reset(self) -> None:
        """As after power-on; no vCPU runs."""
        self._transport.reset()

    def close(self) -> None:
        """End the thread, after the request it is at; twice is allowed."""
        with self._changed:
            self._ending = True
            self._changed.notify_all()
        self._thread.join()

    def save(self) -> VirtioBlkState:
        """The record of disk and transport; MachineError when the image does not hold all that was written."""
        if self._unflushed:
            raise MachineError(self._unflushed)
        return VirtioBlkState(self._transport.save())

    def load(self, record: VirtioBlkState) -> None:
        """Go on where the source's disk was."""
        self._transport.load(record.virtio)

    def _is_idle(self) -> bool:
        return not self._busy and not (self._running and (self._kicked or self._again))

    # -- the transport's side; under lock

    def read_config(self) -> bytes:
        """Capacity, geometry and limits as QEMU tells them."""
        sectors = self._image.size // SECTOR_SIZE
        cylinders = min(max(sectors // (_HEADS * _TRACK_SECTORS), 2), _MOST_CYLINDERS)
        most_segments = DEFAULT_SIZE - 2
        geometry = cylinders, _HEADS, _TRACK_SECTORS
        topology = 0, 0, 0, 0  # physical block, alignment, least and best transfer: nothing beyond the sector
        one_queue, one_segment, one_sector, may_unmap = 1, 1, 1, 1
        return _CONFIG.pack(
            *(sectors, 0, most_segments, *geometry, SECTOR_SIZE, *topology, self._writeback, one_queue),
            *(_MOST_SECTORS, one_segment, one_sector, _MOST_SECTORS, one_segment, may_unmap),
        )

    def write_config(self, config: bytes) -> None:
        """The driver chooses whether writes may wait for a flush."""
        self._writeback = bool(config[_WRITEBACK_AT])

    def begin(self, features: int) -> None:
        """A driver that cannot flush must not need to."""
        if not features & F_CONFIG_WCE:
            self._writeback = bool(features & F_FLUSH)

    def kick(self) -> None:
        """There may be chains."""
        self._kicked = True
        self._changed.notify_all()

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Nothing is being carried out, nor taken."""
        self._holds += 1
        self._changed.wait_for(lambda: not self._busy)
        try:
            yield
        finally:
            self._holds -= 1
            self._changed.notify_all()

    def reset(self) -> None:
        """Forget what the driver wanted."""
        self._again.clear()
        self._kept.clear()
        self._kicked = False
        self._writeback = self._writeback_default

    def unfinished(self) -> list[Request]:
        """Failed requests, in the order in which they failed."""
        return [*self._again, *self._kept]

    def resume_with(self, requests: list[Request]) -> None:
        """Try these when the machine starts."""
        self._kept.extend(requests)

    # -- the worker

    def _work(self) -> None:
        while (request := self._next()) is not None:
            try:
                written = self._carry_out(request)
            except (VirtioError, KvmError) as error:
                self._end(request, None, error)
            else:
                self._end(request, written)

    def _next(self) -> Request | None:
        """Wait for a request and begin it; None: it is time to end."""
        with self._changed:
            while True:
                self._changed.wait_for(self._may_work)
                if self._ending:
                    return None
                request = self._again.popleft() if self._again else self._transport.take()
                if request is not None:
                    self._busy = True
                    return request
                self._kicked = False  # whoever kicks after this has the lock, and is seen
                self._changed.notify_all()

    def _may_work(self) -> bool:
        return self._ending or (self._running and not self._holds and (self._kicked or bool(self._again)))

    def _end(self, request: Request, written: int | None, error: Exception | None = None) -> None:
        """Answer *request*, or keep it when nothing was *written*."""
        with self._changed:
            if error is not None:
                self._transport.break_down(error)
            elif written is None:
                self._kept.append(request)
            else:
                self._transport.answer(request.head, written)
            self._busy = False
            self._changed.notify_all()

    # -- one request; without the lock

    def _carry_out(self, request: Request) -> int | None:
        """Do what *request* says; how many bytes its driver gets back, None when it has to wait.  VirtioError."""
        if not request.readable or not request.writable:
            raise VirtioError("a request has no room for header and status")
        if _length(request.readable) < _HEADER.size:
            raise VirtioError(f"a request has {_length(request.readable)} readable bytes, its header {_HEADER.size}")
        kind, _, sector = _HEADER.unpack(self._gather(request.readable, 0, _HEADER.size))
        operation = "read" if kind & ~_BARRIER == _READ else "write"
        try:
            status = self._do(kind & ~_BARRIER, sector, request)
        except OSError as error:
            kept_or_status = self._judge(operation, error)
            if kept_or_status is None:
                return None
            status = kept_or_status
        written = _length(request.writable)
        self._scatter(request.writable, written - 1, bytes((status,)))
        return written

    def _do(self, kind: int, sector: int, request: Request) -> int:
        """The status byte; OSError when the image refuses."""
        if kind == _READ:
            return self._read(sector, request)
        if kind == _WRITE:
            return self._write(sector, request)
        if kind in _FLUSH:
            self._image.flush()
            return OK
        if kind in _GET_ID:
            room = _length(request.writable) - 1
            self._scatter(request.writable, 0, self._serial[: min(room, _SERIAL_LENGTH)])
            return OK
        if kind in (_DISCARD, _WRITE_ZEROES):
            return self._change_range(kind, request)
        if kind in _SCSI:
            return self._refuse_scsi(request)
        return UNSUPPORTED

    def _read(self, sector: int, request: Request) -> int:
        length = _length(request.writable) - 1
        if not self._is_inside(sector, length):
            return IOERR
        for done in range(0, length, _PIECE):
            data = self._image.read(sector * SECTOR_SIZE + done, min(_PIECE, length - done))
            self._scatter(request.writable, done, data)
        return OK

    def _write(self, sector: int, request: Request) -> int:
        length = _length(request.readable) - _HEADER.size
        if self._image.read_only or not self._is_inside(sector, length):
            return IOERR
        for done in range(0, length, _PIECE):
            data = self._gather(request.readable, _HEADER.size + done, min(_PIECE, length - done))
            self._image.write(sector * SECTOR_SIZE + done, data)
        self._settle()
        return OK

    def _change_range(self, kind: int, request: Request) -> int:
        """Discard, or write zeroes; one range a request."""
        length = _length(request.readable) - _HEADER.size
        if length < _RANGE.size:
            raise VirtioError(f"a discard or write-zeroes says {length} bytes, expected {_RANGE.size}")
        sector, count, flags = _RANGE.unpack(self._gather(request.readable, _HEADER.size, _RANGE.size))
        if length > _RANGE.size or flags & ~(_UNMAP if kind == _WRITE_ZEROES else 0):
            return UNSUPPORTED
        if not self._is_inside(sector, count * SECTOR_SIZE):
            return IOERR
        if kind == _DISCARD:
            self._image.discard(sector * SECTOR_SIZE, count * SECTOR_SIZE)
            return OK
        if self._image.read_only:
            return IOERR
        self._image.write_zeroes(sector * SECTOR_SIZE, count * SECTOR_SIZE, may_unmap=bool(flags))
        self._settle()
        return OK

    def _refuse_scsi(self, request: Request) -> int:
        """A SCSI command, which has a buffer of its own before the status for what the target says: it says no."""
        if len(request.readable) < 2 or len(request.writable) < 3:
            return IOERR
        answer = Segment(request.writable[-2].address, min(request.writable[-2].length, len(_SCSI_FAILED)))
        self._scatter([answer], 0, _SCSI_FAILED[: answer.length])
        return UNSUPPORTED

    def _settle(self) -> None:
        """Without a write-back cache a write is on the disk when it is answered."""
        if not self._writeback:
            self._image.flush()

    def _is_inside(self, sector: int, length: int) -> bool:
        sectors = self._image.size // SECTOR_SIZE
        count, rest = divmod(length, SECTOR_SIZE)
        return rest == 0 and count <= _MOST_SECTORS and sector + count <= sectors

    def _judge(self, operation: str, error: OSError) -> int | None:
        """What the driver is told of a refusal of the image; None: nothing yet, the machine stops."""
        no_space = error.errno == errno.ENOSPC
        action = self._on_error[operation]
        if action is OnError.ENOSPC:
            action = OnError.STOP if no_space else OnError.REPORT
        event = {
            "device": "",
            "node-name": self.name,
            "operation": operation,
            "action": action.value,
            "nospace": no_space,
            "reason": os.strerror(error.errno or errno.EIO),
        }
        self._events.emit("BLOCK_IO_ERROR", event)
        if action is OnError.STOP:
            self._events.stop_machine()
            return None
        return OK if action is OnError.IGNORE else IOERR

    # -- guest memory

    def _gather(self, segments: Sequence[Segment], start: int, length: int) -> bytes:
        """*length* bytes from *start* of what *segments* hold together."""
        return b"".join(self._memory.read(*part) for part in _parts(segments, start, length))

    def _scatter(self, segments: Sequence[Segment], start: int, data: bytes) -> None:
        """Put *data* at *start* of them."""
        done = 0
        for address, length in _parts(segments, start, len(data)):
            self._memory.write(address, data[done : done + length])
            done += length


def _length(segments: Sequence[Segment]) -> int:
    return sum(segment.length for segment in segments)


def _parts(segments: Sequence[Segment], start: int, length: int) -> Iterator[Segment]:
    """The pieces of guest memory behind *length* bytes from *start*."""
    end = start + length
    position = 0
    for segment in segments:
        first, last = max(start - position, 0), min(end - position, segment.length)
        if first < last:
            yield Segment(segment.address + first, last - first)
        position += segment.length
        if position >= end:
            return
