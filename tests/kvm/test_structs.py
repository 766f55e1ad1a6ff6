import ctypes

import pytest

from kvm import structs

# Bytes, as the kernel's headers give them for x86-64.
SIZES = {
    "kvm_regs": 144,
    "kvm_segment": 24,
    "kvm_dtable": 16,
    "kvm_sregs": 312,
    "kvm_sregs2": 320,
    "kvm_fpu": 416,
    "kvm_xsave": 4096,
    "kvm_xcr": 16,
    "kvm_xcrs": 392,
    "kvm_debugregs": 128,
    "kvm_msr_entry": 16,
    "kvm_msrs": 8,
    "kvm_msr_list": 4,
    "kvm_vcpu_events": 64,
    "kvm_mp_state": 4,
    "kvm_interrupt": 4,
    "kvm_cpuid_entry2": 40,
    "kvm_cpuid2": 8,
    "kvm_enable_cap": 104,
    "kvm_lapic_state": 1024,
    "kvm_pic_state": 16,
    "kvm_ioapic_state": 216,
    "kvm_irqchip": 520,
    "kvm_irq_level": 8,
    "kvm_irq_routing_irqchip": 8,
    "kvm_irq_routing_msi": 16,
    "kvm_irq_routing_entry": 48,
    "kvm_irq_routing": 8,
    "kvm_msi": 32,
    "kvm_irqfd": 32,
    "kvm_ioeventfd": 64,
    "kvm_pit_config": 64,
    "kvm_pit_channel_state": 24,
    "kvm_pit_state2": 112,
    "kvm_clock_data": 48,
    "kvm_userspace_memory_region": 32,
    "kvm_dirty_log": 16,
    "kvm_clear_dirty_log": 24,
    "kvm_debug_exit_arch": 32,
    "kvm_sync_regs": 520,
    "kvm_run": 2352,
    "kvm_ioapic_redirect_entry": 8,
}

OFFSETS = {
    "kvm_run.immediate_exit": 1,
    "kvm_run.exit_reason": 8,
    "kvm_run.io": 32,
    "kvm_run.mmio": 32,
    "kvm_run.kvm_valid_regs": 288,
    "kvm_run.s": 304,
    "kvm_sregs.cr0": 224,
    "kvm_sregs.interrupt_bitmap": 280,
    "kvm_sregs2.pdptrs": 288,
    "kvm_vcpu_events.sipi_vector": 16,
    "kvm_vcpu_events.smi": 24,
    "kvm_vcpu_events.triple_fault": 28,
    "kvm_vcpu_events.exception_payload": 56,
    "kvm_xcrs.xcrs": 8,
    "kvm_debugregs.dr6": 32,
    "kvm_ioapic_state.redirtbl": 24,
    "kvm_fpu.mxcsr": 408,
    "kvm_irq_routing_entry.u": 16,
    "kvm_clear_dirty_log.dirty_bitmap": 16,
    "kvm_clock_data.realtime": 16,
    "kvm_pit_channel_state.count_load_time": 16,
    "kvm_enable_cap.args": 8,
}


@pytest.mark.parametrize(("name", "size"), SIZES.items())
def test_size_is_the_kernels(name: str, size: int) -> None:
    assert ctypes.sizeof(getattr(structs, name)) == size


@pytest.mark.parametrize(("place", "offset"), OFFSETS.items())
def test_offset_is_the_kernels(place: str, offset: int) -> None:
    name, field = place.split(".")
    assert getattr(getattr(structs, name), field).offset == offset


def test_every_structure_is_pinned() -> None:
    kinds = (ctypes.Structure, ctypes.Union)
    names = {
        name
        for name, value in vars(structs).items()
        if name.startswith("kvm_") and isinstance(value, type) and issubclass(value, kinds)
    }
    assert names == set(SIZES)


def test_array_follows_its_head() -> None:
    whole = structs.with_array(structs.kvm_msrs, "entries", structs.kvm_msr_entry, 3)
    assert ctypes.sizeof(whole) == 8 + 3 * 16
    assert whole.entries.offset == 8
    assert structs.with_array(structs.kvm_msrs, "entries", structs.kvm_msr_entry, 3) is whole


def test_redirection_entry_is_one_word_in_two_views() -> None:
    entry = structs.kvm_ioapic_redirect_entry(bits=0x0200_0000_0001_8931)
    fields = entry.fields
    assert (fields.vector, fields.delivery_mode, fields.dest_mode) == (0x31, 1, 1)
    assert (fields.trig_mode, fields.mask, fields.dest_id) == (1, 1, 2)
