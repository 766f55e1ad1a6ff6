"""`virtio-mmio@…/virtio-blk`: a disk on the MMIO transport (machine.md §5); version 2, instance 0.

QEMU describes the section as one opaque field of type `virtio`.  Inside it are, in this order:

    transport   be32 device feature select   be32 driver feature select   be32 guest page shift
    common      u8 status   u8 isr   be16 queue_sel   be32 features   be32 config length   config
                be32 queues   per queue: be32 num   be32 align   be64 desc   be16 last_avail_idx
    device      pending requests: u8 1 and the request, in host byte order; a byte 0 after the last
    subsections virtio/…, in the order below

The same frame carries a legacy disk and a modern one; the latter adds `virtqueues` and `extra_state`.  Tables of the
transport always have 1024 rows, whatever the device uses.  Queue contents are guest memory and not in the stream.
"""

from __future__ import annotations

import struct as binary
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..fields import Field, boolean, custom, struct, uint8, uint64
from ..kinds import Description
from ..place import Loading, Saving
from ..vmstate import Subsection, VMState, plain_subsection

QUEUE_MAX = 1024  # rows of every table of the transport; also the largest queue, and the most segments of a request
CONFIG_MAX = 256  # bytes of device configuration
CONFIG_LENGTH = 57  # of a virtio-blk device

_TRANSPORT = binary.Struct(">III")
_COMMON = binary.Struct(">BBHII")
_QUEUE = binary.Struct(">IIQH")
_REQUEST_HEAD = binary.Struct("<IIIxxxx")
_ADDRESSES = binary.Struct(f"<{QUEUE_MAX}Q")
_SEGMENTS = binary.Struct(f"<{2 * QUEUE_MAX}Q")
REQUEST_SIZE = _REQUEST_HEAD.size + 2 * _ADDRESSES.size + 2 * _SEGMENTS.size


@dataclass
class Virtqueue:
    """A queue that was set up, or could be: a legacy ring lies at *desc*, rings of a modern one have own addresses."""

    num: int = 0x100
    align: int = 0x1000
    desc: int = 0
    last_avail_idx: int = 0


class Segment(NamedTuple):
    """A piece of guest memory."""

    address: int
    length: int


@dataclass
class Request:
    """A request the device had taken from the queue but not finished; *readable* and *writable* as the device sees it.

    *head* is the number of its first descriptor.
    """

    head: int = 0
    readable: list[Segment] = field(default_factory=list)
    writable: list[Segment] = field(default_factory=list)
    queue: int = 0


class QueueRings(NamedTuple):
    """Where the rings of a modern queue lie."""

    avail: int = 0
    used: int = 0


class TransportQueue(NamedTuple):
    """What the driver wrote into the registers of a modern transport, low half first."""

    num: int = 0
    enabled: bool = False
    desc_low: int = 0
    desc_high: int = 0
    avail_low: int = 0
    avail_high: int = 0
    used_low: int = 0
    used_high: int = 0


@dataclass
class TransportState:
    """The registers of a modern transport."""

    guest_features: tuple[int, int] = (0, 0)  # low half, high half
    queues: list[TransportQueue] = field(default_factory=lambda: [TransportQueue()] * QUEUE_MAX)


@dataclass
class ExtraState:
    """What a transport adds to the device."""

    state: TransportState | None = None


class PackedQueue(NamedTuple):
    """Positions in a packed queue."""

    last_avail_idx: int = 0
    last_avail_wrap_counter: bool = False
    used_idx: int = 0
    used_wrap_counter: bool = False
    inuse: int = 0


@dataclass
class VirtioState:
    """A virtio device and its transport.  Lists of subsections have QUEUE_MAX rows; None when absent."""

    host_features_sel: int = 0
    guest_features_sel: int = 0
    guest_page_shift: int = 0  # legacy: 12 once the driver has set its page size
    status: int = 0
    isr: int = 0
    queue_sel: int = 0
    guest_features_low: int = 0
    config: bytes = bytes(CONFIG_LENGTH)
    queues: list[Virtqueue] = field(default_factory=lambda: [Virtqueue()])
    requests: list[Request] = field(default_factory=list)
    device_endian: int | None = None
    guest_features: int | None = None  # all 64 bits
    virtqueues: list[QueueRings] | None = None
    ringsize: list[int] | None = None  # default size of each queue
    broken: bool | None = None
    extra_state: ExtraState | None = None
    started: bool | None = None
    packed_virtqueues: list[PackedQueue] | None = None
    disabled: bool | None = None


@dataclass
class VirtioBlkState:
    """A disk."""

    virtio: VirtioState = field(default_factory=VirtioState)


# -- tables of the transport: read and written at once, for they are long and mostly empty


@dataclass(frozen=True)
class _Table:
    """QUEUE_MAX rows of one layout; *make* builds a row from its numbers, *parts* does the opposite."""

    row: binary.Struct
    make: Callable[..., Any]
    parts: Callable[[Any], Sequence[int]] = tuple
    type = "table"
    compressible = True

    def save(self, saving: Saving, value: Any, record: Any) -> Description:
        if len(value) != QUEUE_MAX:
            saving.refuse(f"the record holds {len(value)} rows, expected {QUEUE_MAX}")
        for row in value:
            saving.out += _pack(saving, self.row, *self.parts(row))
        return {}

    def load(self, loading: Loading, local: Any, record: Any) -> list[Any]:
        data = loading.reader.read(QUEUE_MAX * self.row.size)
        return [self.make(*row) for row in self.row.iter_unpack(data)]


def _pack(saving: Saving, layout: binary.Struct, *numbers: int) -> bytes:
    try:
        return layout.pack(*numbers)
    except binary.error as error:
        saving.refuse(f"{numbers!r} does not fit: {error}")


def _table(layout: str, make: Callable[..., Any], parts: Callable[[Any], Sequence[int]] = tuple) -> Any:
    """A constructor of fields that hold such a table."""
    kind = _Table(binary.Struct(layout), make, parts)
    return lambda name, attr=None: custom(name, kind, attr)


@dataclass(frozen=True)
class _FeatureHalves:
    """Two numbers of 32 bits."""

    type = "table"
    compressible = True
    _layout = binary.Struct(">II")

    def save(self, saving: Saving, value: Any, record: Any) -> Description:
        saving.out += _pack(saving, self._layout, *value)
        return {}

    def load(self, loading: Loading, local: Any, record: Any) -> tuple[int, ...]:
        return self._layout.unpack(loading.reader.read(self._layout.size))


_TRANSPORT_STATE = VMState(
    "virtio_mmio/state",
    1,
    (custom("guest_features", _FeatureHalves()), _table(">H?IIIIII", TransportQueue)("queues")),
    record=TransportState,
)

_VIRTIO_MMIO = VMState("virtio_mmio", 1, (), subsections=(Subsection("state", _TRANSPORT_STATE),), record=ExtraState)


def _extra_state(name: str, attr: str) -> Field:
    return struct(name, _VIRTIO_MMIO, attr)


_VIRTIO = VMState(
    "virtio",
    1,
    (),
    subsections=(
        plain_subsection("device_endian", "virtio/device_endian", uint8, "device_endian"),
        plain_subsection("guest_features", "virtio/64bit_features", uint64, "guest_features"),
        plain_subsection("virtqueues", "virtio/virtqueues", _table(">QQ", QueueRings), "vq"),
        plain_subsection("ringsize", "virtio/ringsize", _table(">I", int, lambda size: (size,)), "vq"),
        plain_subsection("broken", "virtio/broken", boolean, "broken"),
        plain_subsection("extra_state", "virtio/extra_state", _extra_state, "extra_state"),
        plain_subsection("started", "virtio/started", boolean, "started"),
        plain_subsection("packed_virtqueues", "virtio/packed_virtqueues", _table(">H?H?I", PackedQueue), "vq"),
        plain_subsection("disabled", "virtio/disabled", boolean, "disabled"),
    ),
    record=VirtioState,
)


# -- the frame


@dataclass(frozen=True)
class _VirtioBlk:
    """The opaque field; *queue_count* is how many queues the device was built with."""

    queue_count: int = 1
    type = "virtio"
    compressible = True

    def save(self, saving: Saving, value: Any, record: Any) -> Description:
        state: VirtioState = value
        transport = state.host_features_sel, state.guest_features_sel, state.guest_page_shift
        saving.out += _pack(saving, _TRANSPORT, *transport)
        common = state.status, state.isr, state.queue_sel, state.guest_features_low, len(state.config)
        saving.out += _pack(saving, _COMMON, *common) + state.config
        saving.out += binary.pack(">I", len(state.queues))
        for queue in state.queues:
            saving.out += _pack(saving, _QUEUE, queue.num, queue.align, queue.desc, queue.last_avail_idx)
        for request in state.requests:
            saving.out += b"\x01"
            if self.queue_count > 1:
                saving.out += binary.pack(">I", request.queue)
            _save_request(saving, request)
        saving.out += b"\x00"
        _VIRTIO.write(saving, state)
        return {}

    def load(self, loading: Loading, local: Any, record: Any) -> VirtioState:
        reader = loading.reader
        state = VirtioState()
        transport = _TRANSPORT.unpack(reader.read(_TRANSPORT.size))
        state.host_features_sel, state.guest_features_sel, state.guest_page_shift = transport
        common = _COMMON.unpack(reader.read(_COMMON.size))
        state.status, state.isr, state.queue_sel, state.guest_features_low, config_length = common
        if config_length > CONFIG_MAX:
            finding = f"configuration of {config_length} bytes announced, expected at most {CONFIG_MAX}"
            loading.refuse(finding, reader.offset - 4)
        state.config = reader.read(config_length)
        state.queues = self._load_queues(loading)
        state.requests = self._load_requests(loading)
        _VIRTIO.read(loading, state, _VIRTIO.version_id)
        return state

    def _load_queues(self, loading: Loading) -> list[Virtqueue]:
        offset = loading.reader.offset
        count = loading.reader.read_be32()
        if count > self.queue_count:
            loading.refuse(f"{count} queues announced, expected at most {self.queue_count}", offset)
        queues = []
        for _ in range(count):
            offset = loading.reader.offset
            queue = Virtqueue(*_QUEUE.unpack(loading.reader.read(_QUEUE.size)))
            if queue.num > QUEUE_MAX:
                loading.refuse(f"a queue of {queue.num} descriptors, expected at most {QUEUE_MAX}", offset)
            queues.append(queue)
        return queues

    def _load_requests(self, loading: Loading) -> list[Request]:
        requests: list[Request] = []
        while loading.reader.read_u8():
            if len(requests) == QUEUE_MAX * self.queue_count:
                loading.refuse(f"the pending requests go on, expected at most {len(requests)}")
            offset = loading.reader.offset
            queue = loading.reader.read_be32() if self.queue_count > 1 else 0
            if queue >= self.queue_count:
                loading.refuse(f"a request of queue {queue}, expected less than {self.queue_count}", offset)
            requests.append(_load_request(loading, queue))
        return requests


def _save_request(saving: Saving, request: Request) -> None:
    """Append the request as the structure that QEMU dumps: four tables of full length behind three counts."""
    if max(len(request.readable), len(request.writable)) > QUEUE_MAX:
        saving.refuse(f"a request of more than {QUEUE_MAX} segments")
    saving.out += _pack(saving, _REQUEST_HEAD, request.head, len(request.readable), len(request.writable))
    both = request.writable, request.readable
    for segments in both:
        addresses = [one.address for one in segments]
        saving.out += _pack(saving, _ADDRESSES, *addresses, *[0] * (QUEUE_MAX - len(segments)))
    for segments in both:
        lengths = [number for one in segments for number in (0, one.length)]
        saving.out += _pack(saving, _SEGMENTS, *lengths, *[0] * (2 * (QUEUE_MAX - len(segments))))


def _load_request(loading: Loading, queue: int) -> Request:
    reader = loading.reader
    offset = reader.offset
    head, readable, writable = _REQUEST_HEAD.unpack(reader.read(_REQUEST_HEAD.size))
    if max(readable, writable) > QUEUE_MAX:
        loading.refuse(f"a request of {readable} + {writable} segments, expected at most {QUEUE_MAX} of each kind", offset)
    addresses = [_ADDRESSES.unpack(reader.read(_ADDRESSES.size)) for _ in range(2)]
    lengths = [_SEGMENTS.unpack(reader.read(_SEGMENTS.size))[1::2] for _ in range(2)]
    to_guest, from_guest = (
        [Segment(*one) for one in zip(addresses[side], lengths[side], strict=True)] for side in range(2)
    )
    return Request(head, from_guest[:readable], to_guest[:writable], queue)


def virtio_blk(queue_count: int = 1) -> VMState:
    """The description of a disk with that many queues."""
    return VMState("virtio-blk", 2, (custom("virtio", _VirtioBlk(queue_count)),), record=VirtioBlkState)


VIRTIO_BLK = virtio_blk()
