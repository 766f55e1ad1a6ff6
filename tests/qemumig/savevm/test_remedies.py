"""What would help: each remedy in words, and its options taken by the program they are for."""

from __future__ import annotations

import shlex

import pytest

from kvm.options import parse
from qemumig.savevm import remedies
from qemumig.savevm.devices.virtio_mmio import ExtraState, VirtioBlkState, VirtioState
from qemumig.wire.format import MigCommand

HERE = {"microvm.ram": 64 << 20, "pc.bios": 64 << 10}
SLOT = "virtio-mmio@00000000feb00{}00/{}"


@pytest.mark.parametrize(
    ("idstr", "instance_id", "text"),
    [
        ("i8254", 0, "start the destination with -M pit=on"),
        ("i8259", 1, "start the destination with -M pic=on"),
        ("mc146818rtc", 0, "start the destination with -M rtc=on"),
        ("acpi-ged", 0, "start the destination with -M acpi=on"),
        ("ioapic", 1, "start the destination with -M acpi=on,ioapic2=on"),
        ("serial", 0, "start the destination with -M isa-serial=on"),
        ("serial", 1, "no option adds another serial port to this machine: start the guest without it"),
        ("kvm-tpr-opt", 0, "start the destination with -global apic-common.vapic=on"),
        ("cpu", 3, "start the destination with -smp 4 (or more: as many vCPUs as the source has)"),
        ("cpu", 0xFFFFFFFF, "no option adds this device to this machine: start the guest without it"),
        ("i8259", 2, "no option adds this device to this machine: start the guest without it"),
        ("0000:00:02.0/vga", 0, "no option adds a PCI device to this machine: start the guest without it"),
        (SLOT.format("2", "virtio-net"), 0, "no option adds a virtio-net to this machine: start the guest without it"),
        (
            "virtio-mmio@00000000feb00001/virtio-blk",
            0,
            "no option adds a virtio-blk to this machine: start the guest without it",
        ),
        ("block", 0, "migrate without -b and without capability 'block', and let both sides open one image"),
        ("dirty-bitmap", 0, "say 'migrate_set_capability dirty-bitmaps off' at the source"),
    ],
)
def test_a_section_that_is_lacking(idstr: str, instance_id: int, text: str) -> None:
    assert str(remedies.for_section(idstr, instance_id)) == text


@pytest.mark.parametrize(("place", "slot"), [("0", 0), ("e", 7)])
def test_a_disk_is_put_where_the_source_has_it(place: str, slot: int) -> None:
    remedy = remedies.for_section(SLOT.format(place, "virtio-blk"), 0)
    assert remedy.options.endswith(f"-device virtio-blk-device,drive=disk{slot},bus=virtio-mmio-bus.{slot}")


@pytest.mark.parametrize(
    ("name", "length", "here", "is_main", "text"),
    [
        ("/rom@etc/acpi/tables", 0x1000, HERE, False, "start the destination with -M acpi=on"),
        (
            "mem0",
            96 << 20,
            HERE,
            True,
            "start the destination with -m 96M -object memory-backend-ram,id=mem0,size=96M -M memory-backend=mem0",
        ),
        (
            "/objects/mem0",
            5 << 10,
            HERE,
            True,
            "start the destination with -m 5k -object memory-backend-ram,id=mem0,size=5k,"
            "x-use-canonical-path-for-ramblock-id=on -M memory-backend=mem0",
        ),
        ("microvm.ram", 1 << 20, {"mem7": 1 << 20}, True, "start the destination without memory-backend=mem7"),
        ("microvm.ram", 1 << 20, {"/objects/m": 1 << 20}, True, "start the destination without memory-backend=m"),
        (
            "a,b;rm",
            1 << 20,
            HERE,
            True,
            "no option adds that memory to this machine: start the guest without the device that has it",
        ),
        (
            "vga.vram",
            1 << 20,
            HERE,
            False,
            "no option adds that memory to this machine: start the guest without the device that has it",
        ),
    ],
)
def test_a_ram_block_that_is_lacking(name: str, length: int, here: dict[str, int], is_main: bool, text: str) -> None:
    assert str(remedies.for_block(name, length, here, is_main=is_main)) == text


@pytest.mark.parametrize(
    ("name", "length", "text"),
    [
        ("microvm.ram", 96 << 20, "start the destination with -m 96M"),
        ("microvm.ram", 4100 << 10, "start the destination with -m 4100k"),
        ("mem0", 96 << 20, "start the destination with -m 96M (and size=96M in its -object …,id=mem0)"),
        ("pc.bios", 0x20000, "start the destination with -bios IMAGE of 131072 bytes (the image that the source has)"),
        ("/rom@etc/acpi/rsdp", 0x2000, ""),
    ],
)
def test_a_ram_block_of_another_length(name: str, length: int, text: str) -> None:
    assert str(remedies.for_block_length(name, length)) == text


PASTED = [
    remedies.for_section("cpu", 3),
    remedies.for_section("serial", 0),
    remedies.for_section("kvm-tpr-opt", 0),
    remedies.for_section(SLOT.format("e", "virtio-blk"), 0),
    remedies.for_block("mem0", 96 << 20, HERE, is_main=True),
    remedies.for_block("/objects/mem0", 96 << 20, HERE, is_main=True),
    remedies.for_block_length("microvm.ram", 96 << 20),
    remedies.for_uuid("00112233-4455-6677-8899-aabbccddeeff"),
    remedies.for_property("send-configuration", on_here=True),
    remedies.for_device_state(SLOT.format("0", "virtio-blk"), VirtioBlkState()),
]


@pytest.mark.parametrize("remedy", PASTED, ids=lambda remedy: remedy.options)
def test_options_can_be_pasted_behind_a_command_line(remedy: remedies.Remedy) -> None:
    parse(["-M", "microvm,acpi=off", "-accel", "kvm", "-bios", "IMAGE", "-m", "64M", *shlex.split(remedy.options)])


def test_the_state_of_a_disk_tells_which_transport_it_had() -> None:
    section = SLOT.format("0", "virtio-blk")
    modern = VirtioBlkState(VirtioState(extra_state=ExtraState()))
    assert "force-legacy=off" in str(remedies.for_device_state(section, modern))
    assert "force-legacy=on" in str(remedies.for_device_state(section, VirtioBlkState()))
    assert "-cpu qemu64,pni=off" in str(remedies.for_device_state("cpu", object()))
    assert str(remedies.for_device_state("serial", object())) == ""


@pytest.mark.parametrize(
    ("flags", "capability"),
    [(0x40, ""), (0x100, ""), (0x80, "rdma-pin-all"), (0xA0, "rdma-pin-all"), (0x1, ""), (0xFFF, "")],
)
def test_a_ram_record_tells_which_capability_it_belongs_to(flags: int, capability: str) -> None:
    expected = f"say 'migrate_set_capability {capability} off' at the source" if capability else ""
    assert str(remedies.for_record(flags)) == expected


@pytest.mark.parametrize(
    ("command", "length", "capability"),
    [
        (MigCommand.MIG_CMD_POSTCOPY_ADVISE, 16, "postcopy-ram"),
        (MigCommand.MIG_CMD_POSTCOPY_ADVISE, 0, "dirty-bitmaps"),
        (MigCommand.MIG_CMD_PACKAGED, 4, "postcopy-ram"),
        (MigCommand.MIG_CMD_ENABLE_COLO, 0, "x-colo"),
    ],
)
def test_a_command_tells_which_capability_it_belongs_to(command: MigCommand, length: int, capability: str) -> None:
    assert remedies.capability_of(command, length) == capability


@pytest.mark.parametrize(
    ("magic", "word"), [(0x11223344, "multifd"), (0x16030100, "tls-creds"), (0x16030301, "tls-creds"), (0x47455420, "")]
)
def test_other_beginnings_are_recognised(magic: int, word: str) -> None:
    text = str(remedies.for_magic(magic))
    assert word in text and bool(text) == bool(word)


@pytest.mark.parametrize("name", ["cpu/xen_vcpu", "cpu/later"])
def test_a_subsection_of_the_cpu_that_is_not_known_is_explained(name: str) -> None:
    assert str(remedies.for_subsection(name))
    assert not str(remedies.for_subsection("timer/later"))
