"""The devices with few registers: reset bytes, older versions, optional parts (machine.md §4, stream.md §5)."""

from __future__ import annotations

from typing import Any

import pytest

from qemumig.errors import StreamError
from qemumig.savevm.devices.acpi_ged import (
    ACPI_GED,
    AcpiGedState,
    CpuHotplug,
    CpuSlot,
    ErrorRecords,
    MemoryHotplug,
    MemorySlot,
)
from qemumig.savevm.devices.apic import APIC, ApicSipi, ApicState, count_shift_of
from qemumig.savevm.devices.cpu_common import CPU_COMMON, CpuCommonState
from qemumig.savevm.devices.cpu_state import CpuState
from qemumig.savevm.devices.fw_cfg import FW_CFG, AcpiBlobs, FwCfgState
from qemumig.savevm.devices.i8254 import I8254, I8254State
from qemumig.savevm.devices.i8259 import I8259, I8259State
from qemumig.savevm.devices.ioapic import IOAPIC, IoapicState
from qemumig.savevm.devices.kvm_tpr_opt import KVM_TPR_OPT, KvmTprOptState
from qemumig.savevm.devices.kvmclock import KVMCLOCK, KvmclockState
from qemumig.savevm.devices.mc146818rtc import MC146818RTC, Mc146818RtcState
from qemumig.savevm.devices.timer import TIMER, Icount, IcountShift, IcountTimers, IcountWarp, TimerState
from qemumig.savevm.reader import BytesReader
from qemumig.savevm.vmstate import VMState
from tests.qemumig.savevm import recorded

RESET: list[tuple[VMState, Any, int]] = [  # and the bytes of its state in the minimal machine
    (TIMER, TimerState(), 24),
    (FW_CFG, FwCfgState(), 30),
    (CPU_COMMON, CpuCommonState(), 8),
    (KVM_TPR_OPT, KvmTprOptState(), 144),
    (APIC, ApicState(), 181),
    (IOAPIC, IoapicState(), 206),
    (KVMCLOCK, KvmclockState(), 41),
    (I8259, I8259State(), 16),
    (I8254, I8254State(), 108),
    (MC146818RTC, Mc146818RtcState(), 245),
    (ACPI_GED, AcpiGedState(memhp=MemoryHotplug()), 4 + 6 + 14 + 4),
]


@pytest.mark.parametrize(("vmstate", "record", "size"), RESET, ids=lambda one: getattr(one, "name", ""))
def test_a_device_after_reset_has_its_size_and_comes_back(vmstate: VMState, record: Any, size: int) -> None:
    data, _ = vmstate.save(record)
    assert len(data) == size
    assert vmstate.load(BytesReader(data), vmstate.version_id) == record


OPTIONAL: list[tuple[VMState, Any]] = [
    (
        TIMER,
        TimerState(1, 2, Icount(3, 4, IcountWarp(5, 6), IcountTimers(None, 7), IcountShift(-8, 9))),
    ),
    (TIMER, TimerState(1, 2, Icount(3, 4))),
    (FW_CFG, FwCfgState(5, 6, 7, AcpiBlobs(1, 2, 3))),
    (FW_CFG, FwCfgState(5, 6, None)),
    (CPU_COMMON, CpuCommonState(1, 2, -3, True)),
    (APIC, ApicState(apic_sipi=ApicSipi(-1, 1))),
    (KVMCLOCK, KvmclockState(5, None)),
    (KVMCLOCK, KvmclockState(5, False)),
    (I8259, I8259State(ltim=1)),
    (MC146818RTC, Mc146818RtcState(periodic_timer=5, irq_reinject_on_ack_count=3)),
    (ACPI_GED, AcpiGedState(ghes=ErrorRecords(9), cpuhp=CpuHotplug(1, 2))),
]


@pytest.mark.parametrize(("vmstate", "record"), OPTIONAL, ids=lambda one: getattr(one, "name", ""))
def test_optional_parts_go_there_and_back(vmstate: VMState, record: Any) -> None:
    data, _ = vmstate.save(record)
    reader = BytesReader(data)
    assert vmstate.load(reader, vmstate.version_id) == record
    assert reader.remaining == 0


def test_hotplug_slots_are_as_many_as_the_local_machine_has() -> None:
    slots = [MemorySlot(True, False, 1, 2), MemorySlot()]
    sent = AcpiGedState(memhp=MemoryHotplug(1, slots), cpuhp=CpuHotplug(3, 4, [CpuSlot(False, True, 5, 6)]))
    data, _ = ACPI_GED.save(sent)
    local = AcpiGedState(memhp=MemoryHotplug(devs=[MemorySlot(), MemorySlot()]), cpuhp=CpuHotplug(devs=[CpuSlot()]))
    assert ACPI_GED.load(BytesReader(data), 1, record=local) == sent


def test_timer_version_1_has_no_virtual_clock() -> None:
    record = TIMER.load(BytesReader((5).to_bytes(8, "big") + bytes(8)), 1)
    assert record == TimerState(5, 0)


def test_the_read_position_of_fw_cfg_had_16_bits_in_version_1() -> None:
    record = FW_CFG.load(BytesReader(bytes.fromhex("00010002")), 1)
    assert (record.cur_entry, record.cur_offset) == (1, 2)


def test_ioapic_version_1_has_no_irr() -> None:
    reader = BytesReader(b"\x01\x02" + bytes(8 * 24))
    record = IOAPIC.load(reader, 1)
    assert (record.id, record.ioregsel, record.irr, reader.remaining) == (1, 2, 0, 0)


@pytest.mark.parametrize(("divide_conf", "shift"), [(0b0000, 1), (0b0001, 2), (0b1010, 7), (0b1011, 0), (0b1000, 5)])
def test_the_divider_of_the_apic_timer(divide_conf: int, shift: int) -> None:
    assert count_shift_of(divide_conf) == shift


def test_the_divider_agrees_with_the_recordings() -> None:
    apics = [one.record for one in recorded.load("q100-2cpu-checks").devices if one.header.idstr == "apic"]
    assert [count_shift_of(one.divide_conf) for one in apics] == [one.count_shift for one in apics]


@pytest.mark.parametrize("name", ["q100-2cpu-ap-parked", "q72-2cpu-ap-parked"])
def test_reset_values_are_those_of_a_vcpu_that_never_ran(name: str) -> None:
    """What differs from a fresh record is what makes this the second CPU of that host."""
    parked = {one.header.idstr: one.record for one in recorded.load(name).devices if one.header.instance_id == 1}
    fresh = {"apic": ApicState(), "cpu_common": CpuCommonState()}
    changed = {
        idstr: {key for key, value in vars(parked[idstr]).items() if value != getattr(record, key)}
        for idstr, record in fresh.items()
    }
    assert changed == {"apic": {"apicbase", "id", "initial_count_load_time"}, "cpu_common": set()}


def test_a_parked_cpu_differs_from_reset_only_in_what_the_host_and_the_model_set() -> None:
    (parked,) = (one.record for one in recorded.load("q100-2cpu-ap-parked").devices if one.label == "cpu-1")
    fresh = CpuState()
    changed = {key for key, value in vars(parked).items() if value != getattr(fresh, key)}
    assert changed == {"regs", "mtrr_var", "mp_state", "tsc", "xstate_bv", "tsc_khz"}
    assert parked.regs == [0, 0, 0x60FB1] + [0] * 13


@pytest.mark.parametrize("idstr", ["ioapic", "serial", "kvm-tpr-opt", "fw_cfg"])
def test_untouched_devices_equal_a_fresh_record(idstr: str) -> None:
    (section,) = (one for one in recorded.load("q100-1cpu").devices if one.header.idstr == idstr)
    assert section.record == section.vmstate.record()


def test_an_unknown_subsection_of_the_clock_is_refused() -> None:
    data = KVMCLOCK.save(KvmclockState())[0] + b"\x05\x0ckvmclock/lag\x00\x00\x00\x01"
    with pytest.raises(StreamError, match="unknown subsection 'kvmclock/lag' of 'kvmclock'"):
        KVMCLOCK.load(BytesReader(data), 1)
