"""The disk as its driver sees it, legacy and modern: requests, errors, interrupts, and its state on the move."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvm.block import RawImage
from kvm.devices.virtio_blk import OnError
from qemumig.errors import MachineError
from qemumig.savevm.devices.virtio_mmio import VIRTIO_BLK, Request, Segment, VirtioBlkState
from qemumig.savevm.reader import BytesReader
from tests.kvm.devices.disks import RAM_SIZE, Bench
from tests.kvm.devices.virtio_driver import (
    BLK_CONFIG_WCE,
    BLK_FLUSH,
    CONFIG,
    DISCARD,
    EVENT_IDX,
    FLUSH,
    GET_ID,
    INDIRECT,
    INDIRECT_DESC,
    INTERRUPT_ACK,
    INTERRUPT_STATUS,
    IOERR,
    NEEDS_RESET,
    NEXT,
    NO_INTERRUPT,
    OK,
    READ,
    STATUS,
    UNSUPP,
    WRITE,
    WRITE_ZEROES,
    Buffer,
    Driver,
    header,
    into,
    out,
    segment,
)
from tests.qemumig.savevm import recorded

Make = Callable[..., Bench]
SECTORS = 2048


@pytest.fixture(params=[False, True], ids=["legacy", "modern"])
def modern(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def make(modern: bool, tmp_path: Path) -> Iterator[Make]:
    """A maker of disks on one and the same image."""
    benches: list[Bench] = []

    def make(**options: Any) -> Bench:
        bench = Bench(tmp_path / "disk.img", modern=modern, **options)
        benches.append(bench)
        return bench

    yield make
    for bench in benches:
        bench.close()
        bench.close()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("disk/")]


@pytest.fixture
def bench(make: Make) -> Bench:
    bench = make()
    bench.driver.start()
    return bench


def content(bench: Bench) -> bytes:
    return Path(bench.image.path).read_bytes()


# -- requests


def test_a_new_disk_says_what_it_is_and_offers(make: Make, modern: bool) -> None:
    bench = make()
    assert [bench.read(offset) for offset in (0, 4, 8, 12)] == [0x74726976, 2 if modern else 1, 2, 0x554D4551]
    assert bench.driver.offered() == (0x101_30006E54 if modern else 0x31006ED4)
    assert bench.read(CONFIG, 4) == SECTORS
    assert bench.read(CONFIG + 56, 1) == 1
    assert (bench.read(CONFIG + 57, 1), bench.read(CONFIG + 56, 4)) == (0xFF, 0xFFFFFFFF)


@pytest.mark.parametrize("indirect", [False, True])
@pytest.mark.parametrize("features", [0, EVENT_IDX, INDIRECT_DESC | EVENT_IDX | BLK_FLUSH])
def test_blocks_are_written_read_and_flushed(make: Make, indirect: bool, features: int) -> None:
    bench = make()
    bench.driver.start(features)
    data = os.urandom(4096)
    for round_ in range(20):  # more often than the ring has entries
        assert bench.driver.write(8 * round_, data, indirect=indirect) == OK
        assert bench.driver.read(8 * round_, 4096, indirect=indirect) == (OK, data)
        assert bench.driver.flush() == OK
    assert content(bench)[: 20 * 4096] == data * 20


def test_data_and_header_may_be_cut_anywhere(bench: Bench) -> None:
    parts = [out(b"\1" + bytes(6)), out(bytes(9) + b"a" * 100), out(b"b" * 412), into(1)]
    bench.driver.push(parts)
    assert bench.driver.finish()[1] == 1
    assert content(bench)[:512] == b"a" * 100 + b"b" * 412
    pushed = bench.driver.push([header(READ), into(100), into(412 + 1)])
    assert bench.driver.finish() == (pushed.head, 513)
    assert bench.get(pushed.places[2][0], 413) == b"b" * 412 + bytes([OK])


def test_what_the_device_writes_goes_through_the_memory_that_marks_it_dirty(bench: Bench) -> None:
    bench.memory.writes.clear()
    pushed = bench.driver.push([header(READ), into(4096), into(1)])
    bench.driver.finish()
    data, status = pushed.places[1][0], pushed.places[2][0]
    used = bench.driver.used
    assert {(data, 4096), (status, 1), (used + 4, 8), (used + 2, 2)} <= set(bench.memory.writes)


@pytest.mark.parametrize(
    ("kind", "sector", "buffers", "status"),
    [
        (READ, SECTORS, [into(512)], IOERR),
        (READ, SECTORS - 1, [into(1024)], IOERR),
        (READ, (1 << 64) - 1, [into(512)], IOERR),
        (READ, 0, [into(100)], IOERR),
        (READ, 0, [], OK),
        (WRITE, SECTORS, [out(bytes(512))], IOERR),
        (WRITE, 0, [out(bytes(100))], IOERR),
        (READ | 1 << 31, 0, [into(512)], OK),
        (0x99, 0, [out(bytes(512))], UNSUPP),
        (DISCARD, 0, [out(segment(0, 8))], OK),
        (DISCARD, 0, [out(segment(0, 8, 1))], UNSUPP),
        (DISCARD, 0, [out(segment(0, 8) * 2)], UNSUPP),
        (DISCARD, 0, [out(segment(SECTORS, 1))], IOERR),
        (DISCARD, 0, [out(segment(0, 0x400000))], IOERR),
        (WRITE_ZEROES, 0, [out(segment(8, 8, 1))], OK),
        (WRITE_ZEROES, 0, [out(segment(8, 8, 2))], UNSUPP),
        (WRITE_ZEROES, 0, [out(segment((1 << 64) - 1, 8))], IOERR),
        (2, 0, [], IOERR),
        (2, 0, [out(bytes(6)), into(96), into(16)], UNSUPP),
    ],
)
def test_every_request_gets_its_status(bench: Bench, kind: int, sector: int, buffers: list[Buffer], status: int) -> None:
    assert bench.driver.request(kind, sector, *buffers)[0] == status
    assert bench.warnings == []
    assert content(bench) == bytes(1 << 20)


def test_zeroes_are_written(bench: Bench) -> None:
    bench.driver.write(0, b"x" * 4096)
    assert bench.driver.request(WRITE_ZEROES, 0, out(segment(2, 3)))[0] == OK
    assert content(bench)[:4096] == b"x" * 1024 + bytes(1536) + b"x" * 1536


@pytest.mark.parametrize(("room", "seen"), [(20, b"hello\0\xee"), (3, b"hel"), (30, b"hello\0\xee")])
def test_the_serial_is_told_as_far_as_it_fits(make: Make, room: int, seen: bytes) -> None:
    bench = make(serial="hello")
    bench.driver.start()
    status, (text,) = bench.driver.request(GET_ID, 0, into(room))
    assert (status, text[: len(seen)]) == (OK, seen)


def test_a_read_only_disk_is_only_read(make: Make, tmp_path: Path) -> None:
    (tmp_path / "disk.img").write_bytes(b"r" * 4096)
    bench = make(image=RawImage(str(tmp_path / "disk.img"), read_only=True))
    bench.driver.start()
    assert bench.driver.offered() & 1 << 5
    assert bench.driver.read(0, 512) == (OK, b"r" * 512)
    assert bench.driver.write(0, bytes(512)) == IOERR
    assert bench.driver.request(WRITE_ZEROES, 0, out(segment(0, 1)))[0] == IOERR
    assert content(bench) == b"r" * 4096


@pytest.mark.parametrize(
    ("features", "cached"), [(0, False), (BLK_FLUSH, True), (BLK_CONFIG_WCE, True), (BLK_FLUSH | BLK_CONFIG_WCE, True)]
)
def test_a_driver_that_cannot_flush_does_not_need_to(make: Make, features: int, cached: bool) -> None:
    bench = make()
    flushes: list[bool] = []
    flush = bench.image.flush
    bench.image.flush = lambda: (flushes.append(True), flush())
    bench.driver.start(features)
    assert bench.read(CONFIG + 32, 1) == cached
    bench.driver.write(0, b"x" * 512)
    assert bool(flushes) is not cached


# -- interrupts


def test_a_used_buffer_raises_the_line_until_it_is_acknowledged(bench: Bench) -> None:
    bench.levels.clear()
    assert bench.driver.flush() == OK
    assert (bench.read(INTERRUPT_STATUS), bench.levels) == (1, [True])
    bench.write(INTERRUPT_ACK, 1)
    assert (bench.read(INTERRUPT_STATUS), bench.levels) == (0, [True, False])


@pytest.mark.parametrize("modern", [True])  # a legacy device has one cause only
def test_the_line_rises_anew_for_what_was_not_acknowledged(bench: Bench) -> None:
    with bench.transport.lock:
        bench.transport.break_down(ValueError("for a test"))
    bench.levels.clear()
    bench.write(INTERRUPT_ACK, 1)
    assert (bench.read(INTERRUPT_STATUS), bench.levels) == (2, [False, True])
    bench.write(INTERRUPT_ACK, 2)
    assert (bench.read(INTERRUPT_STATUS), bench.levels[-1]) == (0, False)


def test_a_driver_that_polls_is_not_interrupted(bench: Bench) -> None:
    bench.put(bench.driver.avail, NO_INTERRUPT.to_bytes(2, "little"))
    assert bench.driver.flush() == OK
    bench.disk.stop()
    assert bench.read(INTERRUPT_STATUS) == 0


def test_an_event_index_delays_the_interrupt(make: Make) -> None:
    bench = make()
    bench.driver.start(EVENT_IDX)
    assert bench.driver.flush() == OK  # the first one always interrupts
    bench.write(INTERRUPT_ACK, 1)
    bench.put(bench.driver.avail + 4 + 2 * bench.driver.size, (2).to_bytes(2, "little"))
    seen = []
    for _ in range(2):
        assert bench.driver.flush() == OK
        with bench.transport.lock:
            seen.append(bench.read(INTERRUPT_STATUS))
    bench.disk.stop()
    assert (seen[0], bench.read(INTERRUPT_STATUS)) == (0, 1)


# -- drivers that break the rules


def chain(*descriptors: tuple[int, int, int, int], table: int | None = None) -> Callable[[Driver], None]:
    def push(driver: Driver) -> None:
        for index, descriptor in enumerate(descriptors):
            driver.describe(index, *descriptor, table=table)
        driver.offer(0)

    return push


def indirect(address: int, length: int) -> Callable[[Driver], None]:
    return chain((address, length, INDIRECT, 0))


def long_indirect(driver: Driver) -> None:
    for index in range(1025):
        driver.describe(index, 0x20000, 16, NEXT, index + 1, table=0x40000)
    indirect(0x40000, 16 * 1025)(driver)


def jump(driver: Driver) -> None:
    driver.pushed += 8
    driver.offer(0)


def no_status(driver: Driver) -> None:
    driver.push([header(READ)])


HOSTILE: list[tuple[str, Callable[[Driver], Any]]] = [
    ("names descriptor 8, expected less than 8", lambda driver: driver.offer(8)),
    ("runs in circles", chain((0x20000, 16, NEXT, 1), (0x20000, 512, NEXT, 0))),
    ("descriptor 0 leads to 77, expected less than 8", chain((0x20000, 16, NEXT, 77))),
    ("the avail index is 9 ahead of 0, expected at most 8", jump),
    ("a buffer at 0x20000 is empty", chain((0x20000, 0, 0, 0))),
    ("a buffer of 512 bytes at 0xfff00 is not all RAM", chain((RAM_SIZE - 256, 512, 0, 0))),
    ("a buffer of 512 bytes at 0xffffffffffffff00 is not all RAM", chain((-256, 512, 0, 0))),
    ("a buffer of 4294967295 bytes at 0x0 is not all RAM", chain((0, 0xFFFFFFFF, 0, 0))),
    ("a readable buffer follows a writable one", chain((0x20000, 1, NEXT | 2, 1), (0x20000, 16, 0, 0))),
    ("an indirect table has 0 bytes", indirect(0x40000, 0)),
    ("an indirect table has 17 bytes", indirect(0x40000, 17)),
    ("an indirect table of 4294967280 bytes at 0x40000 is not all RAM", indirect(0x40000, 0xFFFFFFF0)),
    ("a chain has more than 1024 buffers", long_indirect),
    ("has no room for header and status", no_status),
    ("has 4 readable bytes, its header 16", lambda driver: driver.push([out(b"1234"), into(1)])),
    ("says 10 bytes, expected 16", lambda driver: driver.push([header(DISCARD), out(bytes(10)), into(1)])),
]


@pytest.mark.parametrize(("finding", "push"), HOSTILE, ids=[finding for finding, _ in HOSTILE])
def test_a_driver_that_breaks_the_rules_gets_a_broken_device_until_it_resets_it(
    bench: Bench, modern: bool, finding: str, push: Callable[[Driver], Any]
) -> None:
    push(bench.driver)
    bench.disk.stop()
    (warning,) = bench.warnings
    assert warning.startswith("disk 'd0': ") and finding in warning
    assert bool(bench.driver.status() & NEEDS_RESET) is modern
    assert bench.read(INTERRUPT_STATUS) == (3 if modern else 0)
    assert bench.disk.save().virtio.broken is True
    bench.disk.start()
    bench.driver.notify()
    bench.driver.start()
    assert bench.driver.write(0, b"x" * 512) == OK
    assert len(bench.warnings) == 1


def test_rings_outside_ram_break_the_device(make: Make) -> None:
    bench = make()
    bench.driver.negotiate(0)
    bench.driver.desc = bench.driver.avail = bench.driver.used = 0
    bench.driver.desc, bench.driver.avail, bench.driver.used = 0x7FFFF000, 0x7FFFF080, 0x80000000
    bench.put = lambda address, data: None  # type: ignore[method-assign]
    bench.driver.set_up_queue()
    bench.write(STATUS, 0xF)
    bench.driver.notify()
    bench.disk.stop()
    assert ["where there is no RAM" in warning for warning in bench.warnings] == [True]


# -- stop, start, errors


class FailingImage(RawImage):
    """Writes and flushes fail with *number* while it is set; `gate` holds them up while it is clear."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.number = 0
        self.entered, self.gate = threading.Event(), threading.Event()
        self.gate.set()

    def write(self, offset: int, data: bytes) -> None:
        self.entered.set()
        self.gate.wait(10)
        if self.number:
            raise OSError(self.number, os.strerror(self.number))
        super().write(offset, data)


@pytest.fixture
def image(tmp_path: Path) -> FailingImage:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1 << 20))
    return FailingImage(str(path))


def test_registers_answer_while_the_image_is_busy_and_a_stop_waits_for_it(make: Make, image: FailingImage) -> None:
    bench = make(image=image)
    bench.driver.start()
    image.gate.clear()
    for sector in range(2):
        bench.driver.push([header(WRITE, sector), out(b"x" * 512), into(1)])
    assert image.entered.wait(10)
    assert bench.driver.status() & 4
    assert bench.driver.used_index() == 0
    stopper = threading.Thread(target=bench.disk.stop)
    stopper.start()
    image.gate.set()
    stopper.join(10)
    assert not stopper.is_alive()
    assert bench.driver.used_index() == 2
    assert bench.disk.save().virtio.requests == []


def test_a_reset_by_the_driver_waits_for_the_request_that_is_out(make: Make, image: FailingImage) -> None:
    bench = make(image=image)
    bench.driver.start()
    image.gate.clear()
    bench.driver.push([header(WRITE), out(b"x" * 512), into(1)])
    assert image.entered.wait(10)
    resetter = threading.Thread(target=bench.write, args=(STATUS, 0))
    resetter.start()
    image.gate.set()
    resetter.join(10)
    assert not resetter.is_alive()
    assert (bench.driver.status(), content(bench)[:512]) == (0, b"x" * 512)


@pytest.mark.parametrize(
    ("action", "number", "status", "told"),
    [
        (OnError.REPORT, errno.EIO, IOERR, "report"),
        (OnError.IGNORE, errno.EIO, OK, "ignore"),
        (OnError.ENOSPC, errno.EIO, IOERR, "report"),
        (OnError.REPORT, errno.ENOSPC, IOERR, "report"),
    ],
)
def test_an_error_is_reported_or_ignored_as_the_user_says(
    make: Make, image: FailingImage, action: OnError, number: int, status: int, told: str
) -> None:
    bench = make(image=image, on_write_error=action)
    bench.driver.start()
    image.number = number
    assert bench.driver.write(0, b"x" * 512) == status
    ((name, data),) = bench.events
    assert name == "BLOCK_IO_ERROR" and data is not None
    assert (data["operation"], data["action"], data["nospace"]) == ("write", told, number == errno.ENOSPC)
    assert data["reason"] == os.strerror(number)
    assert bench.stops == 0


def stopped_by_errors(make: Make, image: FailingImage, count: int = 2) -> Bench:
    bench = make(image=image, on_write_error=OnError.ENOSPC)
    bench.driver.start()
    image.number = errno.ENOSPC
    for sector in range(count):
        bench.driver.push([header(WRITE, sector), out(bytes([sector + 1]) * 512), into(1)])
    bench.disk.stop()
    assert bench.stops == count
    assert [data["action"] for _, data in bench.events if data] == ["stop"] * count
    assert bench.driver.used_index() == 0
    image.number = 0
    return bench


def test_requests_that_stopped_the_machine_are_tried_again_when_it_goes_on(make: Make, image: FailingImage) -> None:
    bench = stopped_by_errors(make, image)
    bench.disk.start()
    assert [bench.driver.finish()[1] for _ in range(2)] == [1, 1]
    assert content(bench)[:1024] == b"\1" * 512 + b"\2" * 512


def test_a_reset_drops_requests_that_wait(make: Make, image: FailingImage) -> None:
    bench = stopped_by_errors(make, image)
    bench.disk.hard_reset()
    bench.disk.start()
    bench.disk.stop()
    assert content(bench)[:1024] == bytes(1024)
    assert bench.disk.save().virtio.requests == []


def test_a_flush_that_fails_at_the_stop_keeps_the_disk_from_being_saved(make: Make, image: FailingImage) -> None:
    bench = make(image=image)
    bench.driver.start()

    def flush() -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    image.flush = flush  # type: ignore[method-assign]
    bench.disk.stop()
    with pytest.raises(MachineError, match="disk 'd0' cannot be flushed: Input/output error"):
        bench.disk.save()
    del image.flush
    bench.disk.stop()
    bench.disk.save()


# -- migration


def carry_over(source: Bench, destination: Bench) -> None:
    """Memory and state of a stopped disk, the state by way of its bytes."""
    data = VIRTIO_BLK.save(source.disk.save())[0]
    destination.memory.bytes[:] = source.memory.bytes
    destination.disk.load(VIRTIO_BLK.load(BytesReader(data), 2))
    destination.driver.__dict__.update({**source.driver.__dict__, "reach": destination})


@pytest.mark.parametrize("features", [0, EVENT_IDX | INDIRECT_DESC | BLK_FLUSH])
def test_a_disk_goes_on_where_it_was(make: Make, features: int) -> None:
    source, destination = make(), make(running=False)
    source.driver.start(features)
    assert source.driver.write(0, b"x" * 512) == OK
    source.disk.stop()
    carry_over(source, destination)
    assert destination.disk.save() == source.disk.save()
    assert destination.levels[-1] is True  # the interrupt was not acknowledged yet
    destination.disk.start()
    assert destination.driver.read(0, 512) == (OK, b"x" * 512)
    assert destination.driver.write(1, b"y" * 512) == OK


def test_failed_requests_are_tried_again_at_the_destination(make: Make, image: FailingImage) -> None:
    source = stopped_by_errors(make, image)
    destination = make(running=False)
    carry_over(source, destination)
    assert len(destination.disk.save().virtio.requests) == 2
    destination.disk.start()
    assert [destination.driver.finish()[1] for _ in range(2)] == [1, 1]
    assert content(destination)[:1024] == b"\1" * 512 + b"\2" * 512


def test_what_the_guest_announced_before_the_stop_is_found_at_the_destination(make: Make) -> None:
    source, destination = make(running=False), make(running=False)
    source.driver.start()
    source.driver.push([header(FLUSH), into(1)])
    carry_over(source, destination)
    destination.disk.start()
    assert destination.driver.finish()[1] == 1


@pytest.mark.parametrize("name", [name for name in recorded.names() if "-blk-" in name])
def test_recorded_disks_load_and_save_as_they_came(name: str, tmp_path: Path) -> None:
    (section,) = [one for one in recorded.load(name).devices if one.header.idstr == recorded.DISK]
    bench = Bench(tmp_path / "disk.img", modern="modern" in name, running=False)
    try:
        bench.disk.load(section.record)
        assert VIRTIO_BLK.save(bench.disk.save())[0] == section.payload
    finally:
        bench.close()


def lie(**changes: Any) -> Callable[[VirtioBlkState], None]:
    return lambda record: record.virtio.__dict__.update(changes)


def with_queue(**changes: Any) -> Callable[[VirtioBlkState], None]:
    return lambda record: record.virtio.queues[0].__dict__.update(changes)


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        (lie(guest_features=1 << 63), "features 0x8000000000000000 were accepted, but only"),
        (lie(guest_features=None, guest_features_low=1), "features 0x1 were accepted"),
        (lie(guest_page_shift=32), "a page shift of 32, expected at most 31"),
        (lie(device_endian=2), "device endianness 2, expected 1"),
        (lie(requests=[Request(8)]), "a pending request of descriptor 8, expected less than 8"),
        (lie(requests=[Request(0, [Segment(1 << 63, 16)])]), "descriptor 0: a buffer of 16 bytes at 0x8000000000000000"),
        (lie(requests=[Request(0, [Segment(0, 0)])]), "descriptor 0: a buffer at 0x0 is empty"),
        (lie(requests=[Request(0)] * 9), "9 requests are pending, expected at most 8"),
    ],
)
def test_a_stream_that_lies_is_refused_and_changes_nothing(
    bench: Bench, change: Callable[[VirtioBlkState], None], finding: str
) -> None:
    bench.disk.stop()
    before, record = bench.disk.save(), bench.disk.save()
    change(record)
    with pytest.raises(MachineError, match=finding):
        bench.disk.load(record)
    assert bench.disk.save() == before


@pytest.mark.parametrize(
    "change",
    [
        with_queue(last_avail_idx=1000),
        with_queue(desc=0xFFFFFFFFFFFFF000),
        with_queue(num=3),
        lie(requests=[Request(0)]),
        lie(isr=0xFF, status=0xFF, queue_sel=0xFFFF, config=b"", host_features_sel=77),
        lie(broken=True),
    ],
)
def test_a_stream_that_is_odd_harms_nobody(bench: Bench, change: Callable[[VirtioBlkState], None]) -> None:
    bench.disk.stop()
    record = bench.disk.save()
    change(record)
    bench.disk.load(record)
    bench.disk.start()
    for offset in range(0, 0x200, 4):
        bench.read(offset)
    bench.driver.notify()
    bench.driver.start()
    assert bench.driver.write(0, b"x" * 512) == OK
