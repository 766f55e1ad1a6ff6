"""Disks on the command line: what is opened, which slot it gets, and what is said about the ones that cannot be."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvm.block_options import IDE, IDE_PLACES, Disks
from kvm.from_text import block_pairs
from kvm.keyval import UsageError


@pytest.fixture
def disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disks]:
    monkeypatch.chdir(tmp_path)
    for name in ("a.img", "b.img"):
        (tmp_path / name).write_bytes(bytes(8192))
    warnings: list[str] = []
    disks = Disks(warnings.append)
    yield disks
    disks.close()


def add(disks: Disks, *options: str) -> None:
    """Options as "-blockdev …", "-drive …", "-device …", in this order."""
    for option in options:
        name, _, text = option.partition(" ")
        if name == "-drive":
            disks.add_drive(text)
        elif name == "-blockdev":
            disks.add_node(block_pairs(text))
        else:
            disks.add_device(text)


def test_a_machine_with_more_slots_has_more_places_for_disks(tmp_path: Path) -> None:
    (tmp_path / "a.img").write_bytes(bytes(8192))
    disks = Disks(lambda warning: None, slots=24)
    add(disks, f"-blockdev driver=file,node-name=d0,filename={tmp_path}/a.img", "-device virtio-blk-device,drive=d0")
    assert [disk.slot for disk in disks.disks] == [23]
    disks.close()


NODE = "-blockdev driver=file,node-name=d0,filename=a.img"
OTHER = "-blockdev driver=file,node-name=d1,filename=b.img"
DRIVE = "-drive if=none,id=x,file=a.img,format=raw"
DISK = "-device virtio-blk-device,drive=d0"


@pytest.mark.parametrize(
    "options",
    [
        (NODE, DISK),
        (NODE + ",locking=off,cache.direct=on,read-only=off,discard=unmap", DISK),
        ('-blockdev {"driver":"file","node-name":"d0","filename":"a.img","cache":{"direct":false}}', DISK),
        ("-blockdev driver=raw,node-name=d0,file.driver=file,file.filename=a.img,file.locking=off,read-only=on", DISK),
        (OTHER.replace("b.img", "a.img"), "-blockdev driver=raw,node-name=d0,file=d1", DISK),
        (NODE, '-device {"driver":"virtio-blk-device","drive":"d0"}'),
        ("-drive if=none,id=d0,file=a.img,format=raw,file.locking=off,readonly=on", DISK),
        ("-drive if=none,id=d0,file=a.img", DISK),
    ],
)
def test_every_way_to_name_an_image_leads_to_it(disks: Disks, options: tuple[str, ...]) -> None:
    add(disks, *options)
    (disk,) = disks.disks
    assert (disk.name, disk.image.path, disk.image.size, disk.slot) == ("d0", "a.img", 8192, 7)
    assert disk.image.read_only is any("read-only=on" in option or "readonly=on" in option for option in options)


def test_disks_get_the_last_free_slots_or_the_ones_they_name(disks: Disks) -> None:
    add(disks, NODE, OTHER, "-device virtio-blk-device,drive=d1,bus=virtio-mmio-bus.7,serial=s1", DISK)
    assert [(disk.name, disk.slot, disk.serial) for disk in disks.disks] == [("d1", 7, "s1"), ("d0", 6, "")]


@pytest.mark.parametrize(
    ("options", "actions"),
    [
        ((NODE, DISK), ("report", "enospc")),
        ((NODE, DISK + ",werror=stop,rerror=ignore"), ("ignore", "stop")),
        ((DRIVE + ",werror=report,rerror=stop", "-device virtio-blk-device,drive=x"), ("stop", "report")),
        ((DRIVE + ",werror=report", "-device virtio-blk-device,drive=x,werror=stop,rerror=auto"), ("report", "stop")),
    ],
)
def test_the_device_decides_about_errors_before_the_drive_does(
    disks: Disks, options: tuple[str, ...], actions: tuple[str, str]
) -> None:
    add(disks, *options)
    assert (disks.disks[0].on_read_error, disks.disks[0].on_write_error) == actions


@pytest.mark.parametrize(
    ("mode", "writeback"), [("none", True), ("writethrough", False), ("unsafe", True), ("directsync", False)]
)
def test_cache_modes_of_a_drive(disks: Disks, mode: str, writeback: bool) -> None:
    add(disks, f"{DRIVE},cache={mode}", "-device virtio-blk-device,drive=x")
    assert disks.disks[0].writeback is writeback


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-blockdev driver=file,node-name=d0,filename=nope"], "Could not open 'nope': No such file or directory"),
        (["-blockdev driver=file,node-name=d0,filename=."], "Could not open '.': Is a directory"),
        (
            ["-blockdev driver=file,node-name=d0,filename=/dev/null"],
            "'file' driver requires '/dev/null' to be a regular file",
        ),
        (["-blockdev driver=file,filename=a.img"], "'node-name' must be specified for the root node"),
        (["-blockdev driver=file,node-name=d0"], "Parameter 'filename' is missing"),
        (["-blockdev node-name=d0,filename=a.img"], "Parameter 'driver' is missing"),
        (["-blockdev driver=foo,node-name=d0"], "Parameter 'driver' does not accept value 'foo'"),
        ([NODE + ",foo=1"], "Parameter 'foo' is unexpected"),
        ([NODE + ",cache.foo=on"], "Parameter 'cache.foo' is unexpected"),
        ([NODE + ",locking=maybe"], "Parameter 'locking' does not accept value 'maybe'"),
        ([NODE + ",read-only=maybe"], "Parameter 'read-only' expects 'on' or 'off'"),
        ([NODE + ",cache.direct=maybe"], "Parameter 'cache.direct' expects 'on' or 'off'"),
        ([NODE + ",discard=foo"], "Parameter 'discard' does not accept value 'foo'"),
        ([NODE.replace("d0", "0d")], "Invalid node-name: '0d'"),
        ([NODE, NODE], "Duplicate nodes with node-name='d0'"),
        (["-blockdev driver=raw,node-name=r0,file=nope"], "Cannot find device='nope' nor node-name='nope'"),
        (["-blockdev driver=raw,node-name=r0"], "Parameter 'file' is missing"),
        (["-blockdev {"], "JSON parse error, premature EOI"),
        ([NODE, "-device virtio-blk-device"], "drive property not set"),
        (["-device virtio-blk-device,drive=nope"], "Property 'virtio-blk-device.drive' can't find value 'nope'"),
        ([NODE, DISK + ",foo=1"], "Property 'virtio-blk-device.foo' not found"),
        ([NODE, DISK + ",bus=nope"], "Bus 'nope' not found"),
        ([NODE, DISK + ",bus=virtio-mmio-bus.8"], "Bus 'virtio-mmio-bus.8' not found"),
        ([NODE, DISK + ",werror=foo"], "Parameter 'werror' does not accept value 'foo'"),
        ([NODE, DISK + ",id=0x"], "Parameter 'id' expects an identifier"),
        ([NODE, DISK, DISK], "Permission conflict on node 'd0': the disk on 'd0' writes to it already"),
        (
            [NODE, OTHER, DISK + ",bus=virtio-mmio-bus.0", "-device virtio-blk-device,drive=d1,bus=virtio-mmio-bus.0"],
            "Bus 'virtio-mmio-bus.0' is full",
        ),
        ([NODE, OTHER, DISK + ",id=a", "-device virtio-blk-device,drive=d1,id=a"], "Duplicate ID 'a' for device"),
        (["-device nosuch"], "'nosuch' is not a valid device model name"),
        (["-device drive=d0"], "Parameter 'driver' is missing"),
        (["-drive if=none,id=x,file=nope,format=raw"], "Could not open 'nope': No such file or directory"),
        (["-drive if=none,id=x,file=a.img,format=foo"], "Unknown driver 'foo'"),
        ([DRIVE + ",foo=bar"], "Block format 'raw' does not support the option 'foo'"),
        ([DRIVE + ",file.foo=off"], "Block protocol 'file' doesn't support the option 'foo'"),
        ([DRIVE + ",readonly=maybe"], "Parameter 'read-only' expects 'on' or 'off'"),
        ([DRIVE.replace("none", "foo")], "unsupported bus type 'foo'"),
        ([DRIVE + ",cache=foo"], "invalid cache option"),
        ([DRIVE, DRIVE], "Duplicate ID 'x' for drive"),
        ([DRIVE + ",werror=foo"], "'foo' invalid write error action"),
        ([DRIVE + ",rerror=enospc"], "'enospc' invalid read error action"),
        (["-drive if=none,id=x,format=raw"], 'A block device must be specified for "file"'),
        (
            [DRIVE, "-device virtio-blk-device,drive=x", "-device virtio-blk-device,drive=x"],
            "Drive 'x' is already in use by another device",
        ),
    ],
)
def test_what_cannot_be_is_said_in_qemus_words(disks: Disks, options: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        add(disks, *options)
    assert str(caught.value) == message


def test_a_pc_takes_disks_of_its_own_kind_and_boots_as_it_is_told(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).write_bytes(bytes(512))
    disks = Disks(lambda warning: None, IDE_PLACES, IDE)
    disks.add_drive(f"file={tmp_path}/a,format=raw,index=1")
    disks.add_drive(f"file={tmp_path}/b,format=raw")
    disks.add_drive(f"file={tmp_path}/c,format=raw,if=none,id=x")
    disks.add_device("ide-hd,drive=x,secs=1,cyls=1,heads=1,bootindex=0")
    assert [(disk.name, disk.slot, disk.kind, disk.boot_index) for disk in disks.disks] == [
        ("ide0", 1, IDE, None),
        ("ide1", 0, IDE, None),
        ("x", 2, IDE, 0),
    ]
    with pytest.raises(UsageError, match=r"drive with bus=0, unit=1 \(index=1\) exists"):
        disks.add_drive(f"file={tmp_path}/a,format=raw,index=1")
    with pytest.raises(UsageError, match="No 'virtio-bus' bus found for device 'virtio-blk-device'"):
        disks.add_device("virtio-blk-device,drive=x")
    disks.close()
