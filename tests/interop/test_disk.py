"""A disk like QEMU's: a guest with one moves there and back, and a driver gets the same answers from both.

The guest writes blocks in turn and checks each before it writes it again (flag 16), so a lost or doubled write shows.
Both ends share the image file.  The driver is ours (tests/kvm/devices/virtio_driver.py); it reaches a real QEMU's disk
by the qtest protocol, while no guest runs.
"""

from __future__ import annotations

import contextlib
import json
import random
import re
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qemumig.cli.vmm import MachineShape
from tests.kvm.devices import virtio_driver as driver
from tests.kvm.devices.disks import Bench
from tests.support.host import qemumig_system
from tests.support.vmm import GuestParameters, Stage, Vmm, VmmError, migrate

pytestmark = pytest.mark.needs("kvm", "qemu")

CHECK_DISK = 16
GUEST = GuestParameters(dirty_pages=64, print_every=20, flags=CHECK_DISK)


@pytest.fixture(params=[False, True], ids=["legacy", "modern"])
def modern(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def disk_options(image: Path, modern: bool, *, node: str = "", locking: str = "off", device: str = "") -> tuple[str, ...]:
    """A disk of 1 MiB in slot 0; *node*: its -blockdev, if not simply the file."""
    if not image.exists():
        image.write_bytes(bytes(1 << 20))
    plain = f"driver=file,node-name=d0,filename={image},locking={locking}"
    return (
        *("-global", f"virtio-mmio.force-legacy={'off' if modern else 'on'}"),
        *("-blockdev", node or plain, "-device", f"virtio-blk-device,drive=d0,bus=virtio-mmio-bus.0{device}"),
    )


def assert_disk_goes_on(stage: Stage, vmm: Vmm, *, arrived: bool = True) -> None:
    """The guest checks at least one whole round of its 64 blocks where it is now."""
    assert vmm.serial.wait_more(70, 30), f"{vmm.name}: the guest printed only {vmm.serial.output()[-40:]!r}"
    stage.assert_guest_is_well(vmm, arrived=arrived)


@pytest.mark.parametrize("locking", ["off", "auto"])
def test_the_disk_check_holds_there_and_back_again(stage: Stage, qemu: str, modern: bool, locking: str) -> None:
    options = disk_options(stage.directory / "disk.img", modern, locking=locking)
    first = stage.vmm("first", qemumig_system(), guest=GUEST, extra=options)
    second = stage.vmm("second", qemu, incoming=True, extra=options)
    migrate(first, second)
    assert_disk_goes_on(stage, second)
    third = stage.vmm("third", qemumig_system(), incoming=True, extra=options)
    migrate(second, third)
    assert_disk_goes_on(stage, third)


def test_a_write_that_failed_in_qemu_is_tried_again_here(stage: Stage, qemu: str, modern: bool) -> None:
    image = stage.directory / "disk.img"
    failing = {
        "driver": "blkdebug",
        "node-name": "d0",
        "image": {"driver": "file", "filename": str(image), "locking": "off"},
        "inject-error": [{"event": "none", "iotype": "write", "sector": 80, "errno": 5}],
    }
    broken = disk_options(image, modern, node=json.dumps(failing), device=",werror=stop,rerror=stop")
    source = stage.vmm("source", qemu, guest=GUEST, extra=broken)
    source.wait_runstate("io-error")
    destination = stage.vmm("destination", qemumig_system(), incoming=True, extra=disk_options(image, modern))
    migrate(source, destination)
    destination.wait_runstate("io-error")
    destination.command("cont")
    assert_disk_goes_on(stage, destination)


def test_a_write_that_failed_here_is_tried_again_in_qemu(stage: Stage, qemu: str, modern: bool) -> None:
    image = stage.directory / "disk.img"
    options = disk_options(image, modern, device=",werror=stop,rerror=stop")
    limit = 80 * 512  # a process may not write to a file beyond it
    source = stage.vmm("source", f"prlimit --fsize={limit} {qemumig_system()}", guest=GUEST, extra=options)
    event = source.wait_event("BLOCK_IO_ERROR", 30)
    assert (event["data"]["action"], event["data"]["operation"]) == ("stop", "write")
    source.wait_runstate("io-error")
    source.command("cont")  # the same again
    source.wait_event("BLOCK_IO_ERROR", 30)
    source.wait_runstate("io-error")
    destination = stage.vmm("destination", qemu, incoming=True, extra=disk_options(image, modern))
    migrate(source, destination)
    destination.wait_runstate("io-error")
    destination.command("cont")
    assert_disk_goes_on(stage, destination)


@pytest.mark.parametrize("words", [("-snapshot",), ()], ids=["option", "drive"])
def test_what_is_written_to_a_snapshot_is_forgotten_and_cannot_migrate(stage: Stage, words: tuple[str, ...]) -> None:
    image = stage.directory / "disk.img"
    image.write_bytes(bytes(1 << 20))
    drive = f"if=none,id=d0,file={image},format=raw" + ("" if words else ",snapshot=on")
    device = "virtio-blk-device,drive=d0,bus=virtio-mmio-bus.0"
    vmm = stage.vmm("vmm", qemumig_system(), guest=GUEST, extra=(*words, "-drive", drive, "-device", device))
    with pytest.raises(VmmError, match=r"State blocked by the temporary snapshot of .*disk.img"):
        vmm.command("migrate", uri="exec:cat")
    assert vmm.command("query-block")[0]["inserted"]["cache"]["no-flush"] is True
    assert_disk_goes_on(stage, vmm, arrived=False)
    vmm.close()
    assert image.read_bytes() == bytes(1 << 20)


def test_an_image_in_use_is_kept_from_a_second_machine(stage: Stage, qemu: str) -> None:
    options = disk_options(stage.directory / "disk.img", False, locking="auto")
    for number, (one, other) in enumerate(((qemumig_system(), qemu), (qemu, qemumig_system()))):
        user = stage.vmm(f"user{number}", one, guest=GUEST, extra=options)
        with pytest.raises(VmmError, match=r"[Ii]s another process using the image"):
            stage.vmm(f"second{number}", other, stopped=True, extra=options)
        user.close()


def test_a_modern_disk_does_not_come_in_where_a_legacy_one_is(stage: Stage, qemu: str) -> None:
    image = stage.directory / "disk.img"
    source = stage.vmm("source", qemu, guest=GUEST, extra=disk_options(image, True))
    destination = stage.vmm("destination", qemumig_system(), incoming=True, extra=disk_options(image, False))
    with contextlib.suppress(VmmError):  # a source without a return path does not hear of it
        migrate(source, destination)
    assert destination.process.wait(30) == 1
    assert re.search(r"features 0x100000000 were accepted, but only 0x\w+ are offered here", destination.last_words())


# -- the same driver on both disks


LETTERS = {1: "b", 2: "w", 4: "l"}  # of qtest's commands, by size


class RealDisk:
    """A QEMU without a running guest, its disk in slot 0 within reach; a context manager."""

    _SLOT = 0xFEB00000

    def __init__(self, qemu: str, directory: Path, modern: bool) -> None:
        (directory / "guest.bin").write_bytes(GUEST.image())
        shape = MachineShape(64 << 20, 1, directory / "guest.bin", disk_options(directory / "real.img", modern))
        path = directory / "qtest"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen(1)
            listener.settimeout(30)
            argv = [qemu, *shape.options(), "-S", "-qtest", f"unix:{path}", "-qtest-log", "none"]
            self._process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            self._connection, _ = listener.accept()
        self._lines = self._connection.makefile("rwb")

    def __enter__(self) -> RealDisk:
        return self

    def __exit__(self, *exception: object) -> None:
        self._lines.close()
        self._connection.close()
        self._process.kill()
        self._process.wait()

    def _ask(self, words: str) -> str:
        self._lines.write(words.encode() + b"\n")
        self._lines.flush()
        answer = self._lines.readline().decode().split()
        assert answer[:1] == ["OK"], (words, answer)
        return answer[1] if len(answer) > 1 else ""

    def read(self, offset: int, size: int = 4) -> int:
        return int(self._ask(f"read{LETTERS[size]} {self._SLOT + offset:#x}"), 16)

    def write(self, offset: int, value: int, size: int = 4) -> None:
        self._ask(f"write{LETTERS[size]} {self._SLOT + offset:#x} {value:#x}")

    def get(self, address: int, length: int) -> bytes:
        return bytes.fromhex(self._ask(f"read {address:#x} {length}")[2:])

    def put(self, address: int, data: bytes) -> None:
        self._ask(f"write {address:#x} {len(data)} 0x{data.hex()}")


@pytest.fixture
def both(qemu: str, directory: Path, modern: bool) -> Iterator[tuple[Bench, RealDisk]]:
    bench = Bench(directory / "ours.img", modern=modern)
    with RealDisk(qemu, directory, modern) as real:
        yield bench, real
    bench.close()


# Not among them: the greatest queue size, which is 1024 in older versions, and kicks.
REGISTERS = (0x00, 0x04, 0x08, 0x0C, 0x10, 0x14, 0x20, 0x24, 0x28, 0x2C, 0x30, 0x38, 0x3C, 0x40, 0x44, 0x60, 0x64, 0x70)
REGISTERS += (0x80, 0x84, 0x90, 0x94, 0xA0, 0xA4, 0xB0, 0xC0, 0xFC, 0x100, 0x104, 0x114, 0x118, 0x120, 0x134, 0x138, 0x139)
VALUES = (0, 1, 2, 3, 4, 7, 8, 0xB, 0xF, 0x10, 0x40, 0x80, 0x100, 0x1000, 0x3000, 0xA55A5, 0xFFFFFFFF)


@pytest.mark.parametrize("seed", range(10))
def test_registers_answer_as_the_real_ones_do(both: tuple[Bench, RealDisk], seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(150):
        offset, size = chance.choice(REGISTERS), chance.choice((4, 4, 4, 4, 4, 2, 1))
        if chance.random() < 0.4:
            ours, theirs = (disk.read(offset, size) for disk in both)
            assert ours == theirs, f"register {offset:#x}, {size} bytes: {ours:#x}, a real disk says {theirs:#x}"
            continue
        value = chance.choice(VALUES)
        if offset == driver.QUEUE_NUM:
            value &= 0xFF
        if offset == driver.QUEUE_PFN:
            value %= 64  # rings in RAM: others break a real device at once, ours when it looks
        for disk in both:
            disk.write(offset, value & (1 << 8 * size) - 1, size)


HEADER, DATA, STATUS_BYTE = driver.header, driver.out, driver.into(1)
CHAINS = {
    "read": [HEADER(driver.READ, 8), driver.into(1024), STATUS_BYTE],
    "read and status in one": [HEADER(driver.READ, 8), driver.into(513)],
    "write": [HEADER(driver.WRITE, 8), DATA(b"w" * 512), STATUS_BYTE],
    "write in pieces": [DATA(b"\1" + bytes(7)), DATA(bytes(8) + b"p" * 100), DATA(b"q" * 412), STATUS_BYTE],
    "write beyond": [HEADER(driver.WRITE, 2048), DATA(b"w" * 512), STATUS_BYTE],
    "read of no sector": [HEADER(driver.READ), driver.into(100), STATUS_BYTE],
    "read of nothing beyond": [HEADER(driver.READ, 2049), STATUS_BYTE],
    "write with room for data": [HEADER(driver.WRITE), DATA(b"r" * 512), driver.into(512), STATUS_BYTE],
    "flush": [HEADER(driver.FLUSH), STATUS_BYTE],
    "id": [HEADER(driver.GET_ID), driver.into(20), STATUS_BYTE],
    "discard": [HEADER(driver.DISCARD), DATA(driver.segment(0, 8)), STATUS_BYTE],
    "discard with a flag": [HEADER(driver.DISCARD), DATA(driver.segment(0, 8, 1)), STATUS_BYTE],
    "two discards": [HEADER(driver.DISCARD), DATA(driver.segment(0, 8) * 2), STATUS_BYTE],
    "discard cut short": [HEADER(driver.DISCARD), DATA(bytes(10)), STATUS_BYTE],
    "zeroes": [HEADER(driver.WRITE_ZEROES), DATA(driver.segment(8, 1, 1)), STATUS_BYTE],
    "zeroes beyond": [HEADER(driver.WRITE_ZEROES), DATA(driver.segment(2048, 1)), STATUS_BYTE],
    "SCSI": [HEADER(driver.SCSI), DATA(bytes(6)), driver.into(96), driver.into(16), STATUS_BYTE],
    "SCSI cut short": [HEADER(driver.SCSI), STATUS_BYTE],
    "unknown": [HEADER(0x99), DATA(bytes(512)), STATUS_BYTE],
    "no status": [HEADER(driver.READ)],
    "half a header": [DATA(b"1234"), STATUS_BYTE],
    "empty buffer": [HEADER(driver.READ), driver.Buffer(address=driver.BUFFERS), STATUS_BYTE],
    "wrong order": [driver.into(512), HEADER(driver.READ), STATUS_BYTE],
}


@pytest.mark.parametrize("indirect", [False, True])
def test_requests_end_as_they_do_on_a_real_disk(
    both: tuple[Bench, RealDisk], modern: bool, indirect: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "PATIENCE_S", 0.3)  # for chains that are never used, by neither
    with ThreadPoolExecutor(2) as pool:
        for name, chain in CHAINS.items():
            ours, theirs = pool.map(
                outcome, (driver.Driver(disk, modern=modern) for disk in both), [chain] * 2, [indirect] * 2
            )
            assert ours == theirs, f"{name}: {ours}, a real disk: {theirs}"
    both[0].image.flush()
    image = Path(both[0].image.path)
    assert image.read_bytes() == image.with_name("real.img").read_bytes()


def outcome(guest: driver.Driver, chain: list[driver.Buffer], indirect: bool) -> tuple:
    """What a driver sees of *chain*: used entry, status, interrupts, and what was written."""
    guest.start(driver.INDIRECT_DESC)
    pushed = guest.push(chain, indirect=indirect)
    try:
        used = guest.finish()
    except AssertionError:
        used = None
    places = [(at, buffer.room) for at, buffer in pushed.places if buffer.flags & driver.WRITABLE]
    return used, guest.status(), guest.reach.read(driver.INTERRUPT_STATUS), [guest.reach.get(*place) for place in places]
