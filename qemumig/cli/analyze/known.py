"""Device sections whose layout this package knows itself: for recordings that do not describe them.

A recording that was cut has no description at its end, and neither has one of postcopy.
"""

from __future__ import annotations

from ...errors import StreamError
from ...savevm import vmdesc
from ...savevm.devices.acpi_ged import ACPI_GED
from ...savevm.devices.apic import APIC
from ...savevm.devices.cpu import CPU
from ...savevm.devices.cpu_common import CPU_COMMON
from ...savevm.devices.fw_cfg import FW_CFG
from ...savevm.devices.globalstate import GLOBALSTATE
from ...savevm.devices.i8254 import I8254
from ...savevm.devices.i8259 import I8259
from ...savevm.devices.ioapic import IOAPIC
from ...savevm.devices.kvm_tpr_opt import KVM_TPR_OPT
from ...savevm.devices.kvmclock import KVMCLOCK
from ...savevm.devices.mc146818rtc import MC146818RTC
from ...savevm.devices.serial import SERIAL
from ...savevm.devices.timer import TIMER
from ...savevm.vmdesc import DescribedField
from ...savevm.vmstate import VMState
from .recording import MappedReader

LAYOUTS: dict[str, VMState] = {
    one.name: one
    for one in (
        *(TIMER, FW_CFG, CPU_COMMON, CPU, KVM_TPR_OPT, APIC, IOAPIC, KVMCLOCK, SERIAL, GLOBALSTATE),
        *(ACPI_GED, I8259, I8254, MC146818RTC),
    )
}


def load(reader: MappedReader, idstr: str, instance_id: int, version_id: int) -> list[DescribedField] | None:
    """Read a payload of known layout and return its fields; None when the layout is not known.

    The bytes are loaded as a record, and what describes the record again, when it is saved, describes the bytes.
    StreamError when they are no such state.
    """
    layout = LAYOUTS.get(idstr)
    if layout is None or not layout.accepts(version_id):
        return None
    start = reader.offset
    record = layout.load(reader, version_id, section=idstr, instance_id=instance_id)
    try:
        payload, description = layout.save(record, section=idstr, instance_id=instance_id)
    except ValueError as error:
        raise StreamError(f"section {idstr!r} at offset {start:#x}: {error}", offset=start, section=idstr) from None
    if payload != reader.data[start : reader.offset]:
        return []  # an older version: it has an end, but its fields have other names
    return vmdesc.split(description, payload)
