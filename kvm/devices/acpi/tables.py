"""The ACPI tables of the machine (ACPI 5.0, chapter 5; machine.md §3).

    etc/acpi/tables   DSDT   the devices, in AML
                      FADT   a hardware-reduced machine; sleep and reset registers of the event device
                      MADT   vCPUs and I/O APICs
                      XSDT   where FADT and MADT are
    etc/acpi/rsdp     where the XSDT is

Addresses in them are offsets in `etc/acpi/tables`, and checksums zero, until a firmware has run `etc/table-loader`.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from ...config import Chipset
from .. import fw_cfg, ged, ioapic, irqchip, pit, rtc, serial, virtio_mmio
from . import aml, loader

TABLES, RSDP, LOADER = "etc/acpi/tables", "etc/acpi/rsdp", "etc/table-loader"

_HEADER = struct.Struct("<4sIBB6s8sI4sI")
_OEM, _OEM_TABLE, _CREATOR = b"QEMUMI", b"MICROVM ", b"QMIG"
_CHECKSUM_AT = 9  # in a table's header

_LOCAL_APIC_ADDRESS = 0xFEE00000
_IOAPIC_PINS = 24
_ALL_PROCESSORS = 0xFF

# FADT: offsets and flags
_FADT_SIZE, _FADT_REVISION = 268, 5
_DSDT_AT, _BOOT_ARCHITECTURE_AT, _FLAGS_AT, _RESET_AT, _RESET_VALUE_AT = 40, 109, 112, 116, 128
_X_DSDT_AT, _SLEEP_CONTROL_AT, _SLEEP_STATUS_AT = 140, 244, 256
_BOOT_LEGACY_DEVICES, _BOOT_NO_VGA, _BOOT_NO_CMOS_CLOCK = 1 << 0, 1 << 2, 1 << 5
_WBINVD, _NO_POWER_BUTTON, _NO_SLEEP_BUTTON, _RESET_REGISTER, _HARDWARE_REDUCED = 1 << 0, 1 << 4, 1 << 5, 1 << 10, 1 << 20
_XSDT_ENTRIES_AT = 36
_ISA, _TIMER_PIN = 0, 2
_PCAT_COMPATIBLE = 1  # MADT: there are PICs, too
_RSDP_XSDT_AT, _RSDP_V1_SIZE, _RSDP_SIZE = 24, 20, 36
_RSDP_CHECKSUM_AT, _RSDP_EXTENDED_CHECKSUM_AT = 8, 32


@dataclass(frozen=True)
class Described:
    """What the tables tell of the machine; *disks*: slots of virtio-mmio with a device."""

    chipset: Chipset
    cpus: int
    max_cpus: int
    isa_serial: bool
    disks: Sequence[int]


def build(machine: Described) -> dict[str, bytes]:
    """The three files by their names."""
    blob, script = bytearray(), bytearray()
    script += loader.allocate(RSDP, 16, loader.ZONE_LOW) + loader.allocate(TABLES, 64, loader.ZONE_HIGH)

    def add(table: bytes) -> int:
        start = len(blob)
        blob.extend(table)
        script.extend(loader.add_checksum(TABLES, start + _CHECKSUM_AT, start, len(table)))
        return start

    def point(offset: int, size: int) -> None:
        script.extend(loader.add_pointer(TABLES, TABLES, offset, size))

    dsdt = add(_table(b"DSDT", 2, _definitions(machine)))
    point(len(blob) + _DSDT_AT, 4)  # before the sum, which covers it
    point(len(blob) + _X_DSDT_AT, 8)
    fadt = add(_fadt(machine, dsdt))
    madt = add(_madt(machine))
    for entry in range(2):
        point(len(blob) + _XSDT_ENTRIES_AT + 8 * entry, 8)
    xsdt = add(_table(b"XSDT", 1, struct.pack("<QQ", fadt, madt)))

    rsdp = struct.pack("<8sB6sBIIQB3x", b"RSD PTR ", 0, _OEM, 2, 0, _RSDP_SIZE, xsdt, 0)
    script += loader.add_pointer(RSDP, TABLES, _RSDP_XSDT_AT, 8)
    script += loader.add_checksum(RSDP, _RSDP_CHECKSUM_AT, 0, _RSDP_V1_SIZE)
    script += loader.add_checksum(RSDP, _RSDP_EXTENDED_CHECKSUM_AT, 0, _RSDP_SIZE)
    return {TABLES: bytes(blob), RSDP: rsdp, LOADER: bytes(script)}


def _table(signature: bytes, revision: int, body: bytes) -> bytes:
    length = _HEADER.size + len(body)
    return _HEADER.pack(signature, length, revision, 0, _OEM, _OEM_TABLE, 1, _CREATOR, 1) + body


def _fadt(machine: Described, dsdt: int) -> bytes:
    """Most of it is about hardware that a hardware-reduced machine does not have, and zero."""
    body = bytearray(_FADT_SIZE - _HEADER.size)
    registers = ged.REGISTERS[0]
    architecture = _BOOT_NO_VGA | (_BOOT_LEGACY_DEVICES if machine.isa_serial else 0)
    architecture |= 0 if machine.chipset.rtc else _BOOT_NO_CMOS_CLOCK
    flags = _WBINVD | _NO_POWER_BUTTON | _NO_SLEEP_BUTTON | _RESET_REGISTER | _HARDWARE_REDUCED
    for offset, form, *values in (
        (_DSDT_AT, "<I", dsdt),
        (_BOOT_ARCHITECTURE_AT, "<H", architecture),
        (_FLAGS_AT, "<I", flags),
        (_RESET_AT, "<4BQ", *_byte_register(registers + ged.RESET)),
        (_RESET_VALUE_AT, "<B", ged.RESET_VALUE),
        (_X_DSDT_AT, "<Q", dsdt),
        (_SLEEP_CONTROL_AT, "<4BQ", *_byte_register(registers + ged.SLEEP_CONTROL)),
        (_SLEEP_STATUS_AT, "<4BQ", *_byte_register(registers + ged.SLEEP_STATUS)),
    ):
        struct.pack_into(form, body, offset - _HEADER.size, *values)
    return _table(b"FACP", _FADT_REVISION, bytes(body))


def _byte_register(address: int) -> tuple[int, int, int, int, int]:
    """A generic address: in memory, 8 bits wide from bit 0, any access."""
    return 0, 8, 0, 0, address


def _madt(machine: Described) -> bytes:
    body = struct.pack("<II", _LOCAL_APIC_ADDRESS, _PCAT_COMPATIBLE if machine.chipset.pic else 0)
    for number in range(machine.max_cpus):
        body += struct.pack("<BBBBI", 0, 8, number, number, int(number < machine.cpus))
    body += struct.pack("<BBBxII", 1, 12, 0, irqchip.IOAPIC_ADDRESS, 0)
    if machine.chipset.ioapic2:
        body += struct.pack("<BBBxII", 1, 12, 1, ioapic.ADDRESS[0], _IOAPIC_PINS)
    if machine.chipset.pit:
        body += struct.pack("<BBBBIH", 2, 10, _ISA, pit.GSI, _TIMER_PIN, 0)  # an override: polarity and mode as on ISA
    body += struct.pack("<BBBHB", 4, 6, _ALL_PROCESSORS, 0, 1)  # NMI at LINT1
    return _table(b"APIC", 3, body)


def _definitions(machine: Described) -> bytes:
    devices = [_fw_cfg()]
    if machine.isa_serial:
        devices.append(_isa_device("COM1", "PNP0501", *serial.PORTS, serial.GSI, aml.name("_UID", aml.integer(1))))
    if machine.chipset.rtc:
        devices.append(_isa_device("RTC", "PNP0B00", *rtc.PORTS, rtc.GSI))
    devices += [_virtio_slot(slot, machine.chipset.first_virtio_gsi + slot) for slot in sorted(machine.disks)]
    devices += [_event_device(), _power_button()]
    sleep = [aml.integer(value) for value in (ged.SLEEP_TYPE_OFF, 0, 0, 0)]
    return aml.scope("\\_SB_", *devices) + aml.name("\\_S5_", aml.package(*sleep))


def _fw_cfg() -> bytes:
    first, end = fw_cfg.PORTS[0], sum(fw_cfg.DMA_PORTS)
    return aml.device(
        "FWCF",
        aml.name("_HID", aml.string("QEMU0002")),
        aml.name("_STA", aml.integer(0x0B)),  # present, enabled, working, of no interest to a user
        aml.name("_CRS", aml.resources(aml.io_ports(first, end - first))),
    )


def _isa_device(name: str, hid: str, port: int, count: int, gsi: int, *more: bytes) -> bytes:
    crs = aml.resources(aml.io_ports(port, count), aml.irq(gsi))
    return aml.device(name, aml.name("_HID", aml.eisa_id(hid)), *more, aml.name("_CRS", crs))


def _virtio_slot(slot: int, gsi: int) -> bytes:
    registers = aml.memory32(virtio_mmio.slot_address(slot), virtio_mmio.SLOT_SIZE)
    return aml.device(
        f"VR{slot:02}",
        aml.name("_HID", aml.string("LNRO0005")),
        aml.name("_UID", aml.integer(slot)),
        aml.name("_CCA", aml.integer(1)),
        aml.name("_CRS", aml.resources(registers, aml.interrupt(gsi, edge=False))),
    )


def _event_device() -> bytes:
    """It reads which events there are, and tells who is concerned."""
    return aml.device(
        "GED",
        aml.name("_HID", aml.string("ACPI0013")),
        aml.name("_UID", aml.string("GED")),
        aml.name("_CRS", aml.resources(aml.interrupt(ged.GSI, edge=True))),
        aml.memory_region("EREG", *ged.EVENTS),
        aml.dword_field("EREG", "ESEL"),
        aml.method(
            "_EVT",
            1,
            aml.store(aml.path("ESEL"), aml.LOCAL0),
            aml.when_set(aml.LOCAL0, ged.EVENT_POWER_BUTTON, aml.notify("PWRB", 0x80)),
        ),
    )


def _power_button() -> bytes:
    return aml.device("PWRB", aml.name("_HID", aml.eisa_id("PNP0C0C")), aml.name("_UID", aml.integer(0)))
