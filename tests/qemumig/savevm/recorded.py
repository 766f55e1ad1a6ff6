"""Recorded streams of real QEMUs (tests/streams/), cut into their sections by the code under test.

Only the RAM sections are skipped by a parser of their own (tests/support/plain_ram.py).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import zstandard

from qemumig.machine import DeviceSection
from qemumig.savevm import commands, sections, vmdesc
from qemumig.savevm.devices.acpi_ged import ACPI_GED
from qemumig.savevm.devices.apic import APIC
from qemumig.savevm.devices.cpu import CPU
from qemumig.savevm.devices.cpu_common import CPU_COMMON
from qemumig.savevm.devices.fw_cfg import FW_CFG
from qemumig.savevm.devices.globalstate import GLOBALSTATE
from qemumig.savevm.devices.i8254 import I8254
from qemumig.savevm.devices.i8259 import I8259
from qemumig.savevm.devices.ioapic import IOAPIC
from qemumig.savevm.devices.kvm_tpr_opt import KVM_TPR_OPT
from qemumig.savevm.devices.kvmclock import KVMCLOCK
from qemumig.savevm.devices.mc146818rtc import MC146818RTC
from qemumig.savevm.devices.serial import SERIAL
from qemumig.savevm.devices.timer import TIMER
from qemumig.savevm.devices.virtio_mmio import VIRTIO_BLK
from qemumig.savevm.reader import BytesReader
from qemumig.savevm.vmstate import VMState
from qemumig.wire.format import SectionType
from tests.support.plain_ram import PlainRam

STREAMS = Path(__file__).parents[2] / "streams" / "microvm"
DISK = "virtio-mmio@00000000feb00000/virtio-blk"
VMSTATES: dict[str, VMState] = {
    **{one.name: one for one in (TIMER, FW_CFG, CPU_COMMON, CPU, KVM_TPR_OPT, APIC, IOAPIC, KVMCLOCK, SERIAL)},
    **{one.name: one for one in (GLOBALSTATE, ACPI_GED, I8259, I8254, MC146818RTC)},
    DISK: VIRTIO_BLK,
}


@dataclass
class RecordedSection:
    """A FULL section of a recording, loaded."""

    header: sections.SectionHeader
    vmstate: VMState
    payload: bytes
    offset: int  # of the payload, in the stream
    record: Any

    @property
    def label(self) -> str:
        return f"{self.header.idstr}-{self.header.instance_id}"


@dataclass
class Recording:
    """A recorded stream and the decode that lies beside it."""

    name: str
    data: bytes
    decoded: dict[str, Any]
    configuration: sections.Configuration = field(default_factory=sections.Configuration)
    header_length: int = 0  # bytes of file header and configuration
    devices: list[RecordedSection] = field(default_factory=list)
    commands: list[commands.Command] = field(default_factory=list)
    blocks: dict[str, int] = field(default_factory=dict)
    description: bytes = b""

    @property
    def described_devices(self) -> list[dict[str, Any]]:
        return vmdesc.parse(self.description)["devices"]

    @property
    def version(self) -> str:
        return self.name.partition("-")[0]


def names() -> list[str]:
    """Every recording there is."""
    return sorted(path.name.removesuffix(".mig.zst") for path in STREAMS.glob("*.mig.zst"))


@cache
def load(name: str) -> Recording:
    """Read a recording from its first byte to its last."""
    recording = Recording(name, _unpack(f"{name}.mig.zst"), json.loads(_unpack(f"{name}.json.zst")))
    reader = BytesReader(recording.data)
    sections.read_file_header(reader)
    recording.configuration = sections.read_configuration(reader)
    recording.header_length = reader.offset
    ram = PlainRam("x-ignore-shared" in recording.configuration.enabled_capabilities)
    table = _table()
    while (kind := reader.read_u8()) != SectionType.QEMU_VM_EOF:
        if kind == SectionType.QEMU_VM_COMMAND:
            recording.commands.append(commands.read_command(reader))
        else:
            _load_section(recording, reader, kind, table, ram)
    recording.blocks = ram.blocks
    recording.description = sections.skip_vmdescription(reader) or b""
    assert reader.remaining == 0
    return recording


def _unpack(file_name: str) -> bytes:
    return zstandard.ZstdDecompressor().decompressobj().decompress((STREAMS / file_name).read_bytes())


def _table() -> sections.SectionTable[DeviceSection | None]:
    entries: list[sections.SectionEntry[DeviceSection | None]] = [sections.SectionEntry("ram", 0, 4, None, 4)]
    for idstr, vmstate in VMSTATES.items():
        for instance_id in range(2):
            owner = DeviceSection(idstr, instance_id, vmstate)
            entries.append(sections.SectionEntry(idstr, instance_id, vmstate.version_id, owner, vmstate.oldest_version))
    return sections.SectionTable(entries)


def _load_section(
    recording: Recording,
    reader: BytesReader,
    kind: int,
    table: sections.SectionTable[DeviceSection | None],
    ram: PlainRam,
) -> None:
    header = sections.read_section_header(reader, kind)
    bound = table.bind(header) if header.idstr else table.lookup(header.section_id)
    start = reader.offset
    owner = bound.entry.owner
    if owner is None:
        reader.read(ram.skip_body(recording.data, start) - start)
    else:
        record = owner.vmstate.load(reader, header.version_id, section=header.idstr, instance_id=header.instance_id)
        payload = recording.data[start : reader.offset]
        recording.devices.append(RecordedSection(header, owner.vmstate, payload, start, record))
    sections.read_section_footer(reader, header.section_id, bound.entry.idstr)
