"""`virtio-mmio@…/virtio-blk`: the frame of a disk, legacy and modern, and lies about it (machine.md §5)."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from qemumig.errors import StreamError
from qemumig.savevm.devices.virtio_mmio import (
    QUEUE_MAX,
    REQUEST_SIZE,
    VIRTIO_BLK,
    ExtraState,
    PackedQueue,
    QueueRings,
    Request,
    Segment,
    TransportQueue,
    TransportState,
    VirtioBlkState,
    VirtioState,
    Virtqueue,
    virtio_blk,
)
from qemumig.savevm.reader import BytesReader
from qemumig.savevm.vmstate import VMState


def _save(vmstate: VMState = VIRTIO_BLK, **changes: Any) -> bytes:
    return vmstate.save(VirtioBlkState(VirtioState(**changes)))[0]


def _load(data: bytes, vmstate: VMState = VIRTIO_BLK) -> VirtioState:
    reader = BytesReader(data)
    record = vmstate.load(reader, 2)
    assert reader.remaining == 0
    return record.virtio


def test_an_untouched_disk_has_139_bytes() -> None:
    data = _save(guest_features=0)
    assert len(data) == 139
    assert _load(data) == VirtioState(guest_features=0)


def test_the_description_is_one_opaque_field() -> None:
    data, description = VIRTIO_BLK.save(VirtioBlkState())
    assert description["fields"] == [{"name": "virtio", "type": "virtio", "size": len(data)}]


@pytest.mark.parametrize(
    "changes",
    [
        {"device_endian": 1},
        {"guest_features": 1 << 32},
        {"virtqueues": [QueueRings(number, number + 1) for number in range(QUEUE_MAX)]},
        {"ringsize": list(range(QUEUE_MAX))},
        {"broken": True},
        {"extra_state": ExtraState()},
        {"extra_state": ExtraState(TransportState((1, 2), [TransportQueue(3, True, 4, 5, 6, 7, 8, 9)] * QUEUE_MAX))},
        {"started": False},
        {"packed_virtqueues": [PackedQueue(1, True, 2, False, 3)] * QUEUE_MAX},
        {"disabled": True},
        {"requests": [Request(7, [Segment(0x1000, 16)], [Segment(0x2000, 512), Segment(0x3000, 1)])] * 2},
        {"queues": []},
        {"config": bytes(range(96))},
    ],
)
def test_every_part_goes_there_and_back(changes: dict[str, Any]) -> None:
    assert _load(_save(**changes)) == VirtioState(**changes)


def test_a_device_of_several_queues_says_which_one_a_request_is_of() -> None:
    vmstate = virtio_blk(3)
    changes = {"queues": [Virtqueue(8)] * 3, "requests": [Request(5, queue=2)]}
    assert _load(_save(vmstate, **changes), vmstate) == VirtioState(**changes)
    data = bytearray(_save(vmstate, **changes))
    place = data.index(b"\x01\x00\x00\x00\x02", REQUESTS_AT + 36)
    data[place + 4] = 3
    with pytest.raises(StreamError, match="a request of queue 3, expected less than 3"):
        _load(bytes(data), vmstate)


CONFIG_LENGTH_AT = 20
QUEUE_COUNT_AT = 24 + 57
QUEUE_AT = QUEUE_COUNT_AT + 4
REQUESTS_AT = QUEUE_AT + 18


@pytest.mark.parametrize(
    ("place", "layout", "value", "finding"),
    [
        (CONFIG_LENGTH_AT, ">I", 257, r"offset 0x14: configuration of 257 bytes announced, expected at most 256"),
        (CONFIG_LENGTH_AT, ">I", 0xFFFFFFFF, "configuration of 4294967295 bytes announced"),
        (QUEUE_COUNT_AT, ">I", 2, r"offset 0x51: 2 queues announced, expected at most 1"),
        (QUEUE_COUNT_AT, ">I", 0xFFFFFFFF, "4294967295 queues announced"),
        (QUEUE_AT, ">I", 1025, r"offset 0x55: a queue of 1025 descriptors, expected at most 1024"),
        (REQUESTS_AT + 5, "<I", 1025, r"a request of 1025 \+ 0 segments, expected at most 1024 of each kind"),
        (REQUESTS_AT + 9, "<I", 0xFFFFFFFF, r"a request of 0 \+ 4294967295 segments"),
    ],
)
def test_a_lie_about_a_count_is_refused(place: int, layout: str, value: int, finding: str) -> None:
    data = bytearray(_save(requests=[Request()]))
    struct.pack_into(layout, data, place, value)
    with pytest.raises(StreamError, match=finding) as caught:
        VIRTIO_BLK.load(BytesReader(data), 2, section="virtio-mmio@0/virtio-blk")
    assert "section 'virtio-mmio@0/virtio-blk' instance 0, field virtio at" in str(caught.value)


def test_pending_requests_that_do_not_end_are_refused() -> None:
    one = b"\x01" + bytes(REQUEST_SIZE)
    data = _save()[:REQUESTS_AT] + one * (QUEUE_MAX + 1)
    with pytest.raises(StreamError, match="the pending requests go on, expected at most 1024"):
        VIRTIO_BLK.load(BytesReader(data), 2)


def test_a_foreign_subsection_of_the_frame_is_refused() -> None:
    with pytest.raises(StreamError, match="unknown subsection 'virtio/magic' of 'virtio'"):
        _load(_save() + b"\x05\x0cvirtio/magic\x00\x00\x00\x01")


@pytest.mark.parametrize(
    "changes",
    [
        {"ringsize": [1]},
        {"status": 256},
        {"requests": [Request(writable=[Segment(0, 0)] * 1025)]},
        {"ringsize": [-1] * QUEUE_MAX},
    ],
)
def test_a_record_that_does_not_fit_is_not_saved(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="section 'virtio-blk' instance 0, field virtio"):
        _save(**changes)
