from __future__ import annotations

import struct
from typing import Any

import pytest

from kvm.config import Chipset
from kvm.devices.acpi.tables import Described, build
from tests.kvm.devices.acpi.reader import Aml, Firmware

MOST = Chipset(acpi=True, ioapic2=True, pit=True, pic=True, rtc=True)
EVENT_METHOD = bytes.fromhex("09 70 4553454c 60 a0 10 93 7b 60 0a02 00 0a02 86 50575242 0a80")


def described(**changes: Any) -> Described:
    return Described(**{"chipset": MOST, "cpus": 1, "max_cpus": 1, "isa_serial": True, "disks": [], **changes})


def tables(**changes: Any) -> dict[str, bytes]:
    return Firmware(build(described(**changes))).tables()


def definitions(**changes: Any) -> Aml:
    return Aml(tables(**changes)["DSDT"][36:])


def madt_entries(table: bytes) -> list[tuple]:
    """(type, content) of each."""
    found, at = [], 44
    while at < len(table):
        found.append((table[at], table[at + 2 : at + table[at + 1]]))
        at += table[at + 1]
    assert at == len(table)
    return found


def test_a_firmware_finds_every_table_with_its_sum_right() -> None:
    found = tables()
    assert set(found) == {"XSDT", "FACP", "APIC", "DSDT"}
    assert {name: table[8] for name, table in found.items()} == {"XSDT": 1, "FACP": 5, "APIC": 3, "DSDT": 2}


def test_all_files_fit_into_the_page_that_a_real_machine_gives_them() -> None:
    files = build(described(cpus=200, max_cpus=200, disks=range(24)))
    assert all(len(content) <= 4096 for content in files.values())


def test_the_fadt_is_that_of_a_machine_without_acpi_hardware() -> None:
    fadt = tables()["FACP"]
    assert len(fadt) == 268
    (flags,) = struct.unpack_from("<I", fadt, 112)
    assert flags & 1 << 20 and flags & 1 << 10
    registers = {"reset": 116, "sleep control": 244, "sleep status": 256}
    places = {name: struct.unpack_from("<4BQ", fadt, offset) for name, offset in registers.items()}
    assert places == {
        "reset": (0, 8, 0, 0, 0xFEA00202),
        "sleep control": (0, 8, 0, 0, 0xFEA00200),
        "sleep status": (0, 8, 0, 0, 0xFEA00201),
    }
    assert fadt[128] == 0x42


@pytest.mark.parametrize(("rtc", "absent"), [(True, 0), (False, 1 << 5)])
def test_the_fadt_tells_whether_there_is_a_cmos_clock(rtc: bool, absent: int) -> None:
    (architecture,) = struct.unpack_from("<H", tables(chipset=Chipset(acpi=True, rtc=rtc))["FACP"], 109)
    assert architecture & 1 << 5 == absent


def test_the_madt_lists_processors_and_ioapics() -> None:
    madt = tables(cpus=2, max_cpus=3)["APIC"]
    assert struct.unpack_from("<II", madt, 36) == (0xFEE00000, 1)
    assert madt_entries(madt) == [
        (0, struct.pack("<BBI", 0, 0, 1)),
        (0, struct.pack("<BBI", 1, 1, 1)),
        (0, struct.pack("<BBI", 2, 2, 0)),
        (1, struct.pack("<BxII", 0, 0xFEC00000, 0)),
        (1, struct.pack("<BxII", 1, 0xFEC10000, 24)),
        (2, struct.pack("<BBIH", 0, 0, 2, 0)),
        (4, struct.pack("<BHB", 0xFF, 0, 1)),
    ]


def test_the_madt_of_the_smallest_machine_with_acpi() -> None:
    madt = tables(chipset=Chipset(acpi=True))["APIC"]
    assert struct.unpack_from("<II", madt, 36) == (0xFEE00000, 0)
    assert [kind for kind, _ in madt_entries(madt)] == [0, 1, 4]


def test_the_namespace_has_the_machines_devices() -> None:
    aml = definitions(disks=[23, 0])
    assert list(aml.devices) == [f"\\_SB_.{name}" for name in ("FWCF", "COM1", "RTC_", "VR00", "VR23", "GED_", "PWRB")]
    assert aml.root.names == {"\\_S5_": [5, 0, 0, 0]}
    assert aml.devices["\\_SB_.FWCF"].names == {"_HID": "QEMU0002", "_STA": 0x0B, "_CRS": [("io", 0x510, 12)]}
    assert aml.devices["\\_SB_.COM1"].names == {
        "_HID": 0x0105D041,  # PNP0501
        "_UID": 1,
        "_CRS": [("io", 0x3F8, 8), ("irq", 4)],
    }
    assert aml.devices["\\_SB_.RTC_"].names == {"_HID": 0x000BD041, "_CRS": [("io", 0x70, 2), ("irq", 8)]}


@pytest.mark.parametrize(
    ("chipset", "slot", "gsi"), [(MOST, 23, 47), (MOST, 0, 24), (Chipset(acpi=True), 7, 23), (Chipset(acpi=True), 0, 16)]
)
def test_a_disk_is_at_its_slot_with_its_level_interrupt(chipset: Chipset, slot: int, gsi: int) -> None:
    names = definitions(chipset=chipset, disks=[slot]).devices[f"\\_SB_.VR{slot:02}"].names
    place = ("memory", 0xFEB00000 + 0x200 * slot, 0x200)
    assert names == {"_HID": "LNRO0005", "_UID": slot, "_CCA": 1, "_CRS": [place, ("interrupt", gsi, "level")]}


def test_the_event_device_tells_the_power_button() -> None:
    aml = definitions()
    device = aml.devices["\\_SB_.GED_"]
    assert device.names == {"_HID": "ACPI0013", "_UID": "GED", "_CRS": [("interrupt", 9, "edge")]}
    assert device.regions == {"EREG": (0, 0xFEA00000, 4)}
    assert device.fields == {"ESEL": 32}
    assert device.methods == {"_EVT": EVENT_METHOD}
    assert aml.devices["\\_SB_.PWRB"].names == {"_HID": 0x0C0CD041, "_UID": 0}


def test_what_the_machine_does_not_have_is_not_described() -> None:
    aml = definitions(chipset=Chipset(acpi=True), isa_serial=False)
    assert list(aml.devices) == ["\\_SB_.FWCF", "\\_SB_.GED_", "\\_SB_.PWRB"]
