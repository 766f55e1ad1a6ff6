"""ctypes mirrors of KVM's structures: field for field, in the kernel's order, under the kernel's names.

Constants stand beside the structure whose field they fill.  Of a structure that ends in a flexible array only
the head is here (its size is what the request number holds); `with_array` makes the whole of it.
"""

from __future__ import annotations

import functools
from ctypes import Structure, Union, c_int32, c_int64, c_uint8, c_uint16, c_uint32, c_uint64, c_void_p
from typing import Any

u8, u16, u32, u64 = c_uint8, c_uint16, c_uint32, c_uint64


def _each(kind: Any, names: str) -> list[tuple[str, Any]]:
    """One field of type *kind* for every word of *names*."""
    return [(name, kind) for name in names.split()]


@functools.cache
def with_array(head: type[Structure], field: str, element: Any, count: int) -> type[Structure]:
    """*head* followed by *field*, an array of *count* elements."""
    return type(f"{head.__name__}_{count}", (head,), {"_fields_": [(field, element * count)]})


# -- registers -----------------------------------------------------------------------------------------------


class kvm_regs(Structure):
    _fields_ = _each(u64, "rax rbx rcx rdx rsi rdi rsp rbp r8 r9 r10 r11 r12 r13 r14 r15 rip rflags")


class kvm_segment(Structure):
    _fields_ = [
        ("base", u64),
        ("limit", u32),
        ("selector", u16),
        *_each(u8, "type present dpl db s l g avl unusable padding"),
    ]


class kvm_dtable(Structure):
    _fields_ = [("base", u64), ("limit", u16), ("padding", u16 * 3)]


class _kvm_sregs_head(Structure):
    """What kvm_sregs and kvm_sregs2 have in common."""

    _fields_ = [
        *_each(kvm_segment, "cs ds es fs gs ss tr ldt"),
        *_each(kvm_dtable, "gdt idt"),
        *_each(u64, "cr0 cr2 cr3 cr4 cr8 efer apic_base"),
    ]


KVM_NR_INTERRUPTS = 256


class kvm_sregs(_kvm_sregs_head):
    _fields_ = [("interrupt_bitmap", u64 * (KVM_NR_INTERRUPTS // 64))]


KVM_SREGS2_FLAGS_PDPTRS_VALID = 1


class kvm_sregs2(_kvm_sregs_head):
    _fields_ = [("flags", u64), ("pdptrs", u64 * 4)]


class kvm_fpu(Structure):
    _fields_ = [
        ("fpr", u8 * 16 * 8),
        ("fcw", u16),
        ("fsw", u16),
        ("ftwx", u8),
        ("pad1", u8),
        ("last_opcode", u16),
        ("last_ip", u64),
        ("last_dp", u64),
        ("xmm", u8 * 16 * 16),
        ("mxcsr", u32),
        ("pad2", u32),
    ]


class kvm_xsave(Structure):
    """The head; KVM_CAP_XSAVE2 says how many bytes there are in all."""

    _fields_ = [("region", u32 * 1024)]


KVM_MAX_XCRS = 16


class kvm_xcr(Structure):
    _fields_ = [("xcr", u32), ("reserved", u32), ("value", u64)]


class kvm_xcrs(Structure):
    _fields_ = [("nr_xcrs", u32), ("flags", u32), ("xcrs", kvm_xcr * KVM_MAX_XCRS), ("padding", u64 * 16)]


class kvm_debugregs(Structure):
    _fields_ = [("db", u64 * 4), ("dr6", u64), ("dr7", u64), ("flags", u64), ("reserved", u64 * 9)]


class kvm_msr_entry(Structure):
    _fields_ = [("index", u32), ("reserved", u32), ("data", u64)]


class kvm_msrs(Structure):
    """Head of `entries`, an array of kvm_msr_entry (vcpu.py packs them)."""

    _fields_ = [("nmsrs", u32), ("pad", u32)]


class kvm_msr_list(Structure):
    """Head of `indices`, an array of u32."""

    _fields_ = [("nmsrs", u32)]


# -- events and run state of a vCPU --------------------------------------------------------------------------

KVM_VCPUEVENT_VALID_NMI_PENDING = 0x01
KVM_VCPUEVENT_VALID_SIPI_VECTOR = 0x02
KVM_VCPUEVENT_VALID_SHADOW = 0x04
KVM_VCPUEVENT_VALID_SMM = 0x08
KVM_VCPUEVENT_VALID_PAYLOAD = 0x10
KVM_VCPUEVENT_VALID_TRIPLE_FAULT = 0x20


class _kvm_event_exception(Structure):
    _fields_ = [("injected", u8), ("nr", u8), ("has_error_code", u8), ("pending", u8), ("error_code", u32)]


class _kvm_event_interrupt(Structure):
    _fields_ = [("injected", u8), ("nr", u8), ("soft", u8), ("shadow", u8)]


class _kvm_event_nmi(Structure):
    _fields_ = [("injected", u8), ("pending", u8), ("masked", u8), ("pad", u8)]


class _kvm_event_smi(Structure):
    _fields_ = [("smm", u8), ("pending", u8), ("smm_inside_nmi", u8), ("latched_init", u8)]


class _kvm_event_triple_fault(Structure):
    _fields_ = [("pending", u8)]


class kvm_vcpu_events(Structure):
    _fields_ = [
        ("exception", _kvm_event_exception),
        ("interrupt", _kvm_event_interrupt),
        ("nmi", _kvm_event_nmi),
        ("sipi_vector", u32),
        ("flags", u32),
        ("smi", _kvm_event_smi),
        ("triple_fault", _kvm_event_triple_fault),
        ("reserved", u8 * 26),
        ("exception_has_payload", u8),
        ("exception_payload", u64),
    ]


KVM_MP_STATE_RUNNABLE = 0
KVM_MP_STATE_UNINITIALIZED = 1
KVM_MP_STATE_INIT_RECEIVED = 2
KVM_MP_STATE_HALTED = 3
KVM_MP_STATE_SIPI_RECEIVED = 4


class kvm_mp_state(Structure):
    _fields_ = [("mp_state", u32)]


class kvm_interrupt(Structure):
    _fields_ = [("irq", u32)]


# -- CPUID, capabilities -------------------------------------------------------------------------------------

KVM_CPUID_FLAG_SIGNIFCANT_INDEX = 1  # the kernel's spelling


class kvm_cpuid_entry2(Structure):
    _fields_ = [
        *_each(u32, "function index flags eax ebx ecx edx"),
        ("padding", u32 * 3),
    ]


class kvm_cpuid2(Structure):
    """Head of `entries`, an array of kvm_cpuid_entry2."""

    _fields_ = [("nent", u32), ("padding", u32)]


class kvm_enable_cap(Structure):
    _fields_ = [("cap", u32), ("flags", u32), ("args", u64 * 4), ("pad", u8 * 64)]


# -- interrupt chips, lines and routes -----------------------------------------------------------------------

KVM_APIC_REG_SIZE = 0x400


class kvm_lapic_state(Structure):
    """The APIC's register page: register r is four bytes at r, registers are 16 bytes apart."""

    _fields_ = [("regs", u8 * KVM_APIC_REG_SIZE)]


class kvm_pic_state(Structure):
    _fields_ = _each(
        u8,
        "last_irr irr imr isr priority_add irq_base read_reg_select poll special_mask init_state auto_eoi "
        "rotate_on_auto_eoi special_fully_nested_mode init4 elcr elcr_mask",
    )


KVM_IOAPIC_NUM_PINS = 24


class _kvm_ioapic_redirect_fields(Structure):
    _fields_ = [
        ("vector", u8),
        ("delivery_mode", u8, 3),
        ("dest_mode", u8, 1),
        ("delivery_status", u8, 1),
        ("polarity", u8, 1),
        ("remote_irr", u8, 1),
        ("trig_mode", u8, 1),
        ("mask", u8, 1),
        ("reserve", u8, 7),
        ("reserved", u8 * 4),
        ("dest_id", u8),
    ]


class kvm_ioapic_redirect_entry(Union):
    _fields_ = [("bits", u64), ("fields", _kvm_ioapic_redirect_fields)]


class kvm_ioapic_state(Structure):
    _fields_ = [
        ("base_address", u64),
        ("ioregsel", u32),
        ("id", u32),
        ("irr", u32),
        ("pad", u32),
        ("redirtbl", kvm_ioapic_redirect_entry * KVM_IOAPIC_NUM_PINS),
    ]


KVM_IRQCHIP_PIC_MASTER = 0
KVM_IRQCHIP_PIC_SLAVE = 1
KVM_IRQCHIP_IOAPIC = 2


class _kvm_irqchip_union(Union):
    _fields_ = [("dummy", u8 * 512), ("pic", kvm_pic_state), ("ioapic", kvm_ioapic_state)]


class kvm_irqchip(Structure):
    _fields_ = [("chip_id", u32), ("pad", u32), ("chip", _kvm_irqchip_union)]


class _kvm_irq_level_union(Union):
    _fields_ = [("irq", u32), ("status", c_int32)]


class kvm_irq_level(Structure):
    _anonymous_ = ("u",)
    _fields_ = [("u", _kvm_irq_level_union), ("level", u32)]


KVM_IRQ_ROUTING_IRQCHIP = 1
KVM_IRQ_ROUTING_MSI = 2


class kvm_irq_routing_irqchip(Structure):
    _fields_ = [("irqchip", u32), ("pin", u32)]


class kvm_irq_routing_msi(Structure):
    _fields_ = [("address_lo", u32), ("address_hi", u32), ("data", u32), ("devid", u32)]


class _kvm_irq_routing_union(Union):
    _fields_ = [("irqchip", kvm_irq_routing_irqchip), ("msi", kvm_irq_routing_msi), ("pad", u32 * 8)]


class kvm_irq_routing_entry(Structure):
    _fields_ = [("gsi", u32), ("type", u32), ("flags", u32), ("pad", u32), ("u", _kvm_irq_routing_union)]


class kvm_irq_routing(Structure):
    """Head of `entries`, an array of kvm_irq_routing_entry."""

    _fields_ = [("nr", u32), ("flags", u32)]


class kvm_msi(Structure):
    _fields_ = [*_each(u32, "address_lo address_hi data flags devid"), ("pad", u8 * 12)]


KVM_IRQFD_FLAG_DEASSIGN = 1
KVM_IRQFD_FLAG_RESAMPLE = 2


class kvm_irqfd(Structure):
    _fields_ = [("fd", u32), ("gsi", u32), ("flags", u32), ("resamplefd", u32), ("pad", u8 * 16)]


KVM_IOEVENTFD_FLAG_DATAMATCH = 1
KVM_IOEVENTFD_FLAG_PIO = 2
KVM_IOEVENTFD_FLAG_DEASSIGN = 4


class kvm_ioeventfd(Structure):
    _fields_ = [
        ("datamatch", u64),
        ("addr", u64),
        ("len", u32),
        ("fd", c_int32),
        ("flags", u32),
        ("pad", u8 * 36),
    ]


# -- timers and clock ----------------------------------------------------------------------------------------


class kvm_pit_config(Structure):
    _fields_ = [("flags", u32), ("pad", u32 * 15)]


class kvm_pit_channel_state(Structure):
    _fields_ = [
        ("count", u32),
        ("latched_count", u16),
        *_each(u8, "count_latched status_latched status read_state write_state write_latch rw_mode mode bcd gate"),
        ("count_load_time", c_int64),
    ]


class kvm_pit_state2(Structure):
    _fields_ = [("channels", kvm_pit_channel_state * 3), ("flags", u32), ("reserved", u32 * 9)]


KVM_CLOCK_TSC_STABLE = 2
KVM_CLOCK_REALTIME = 4
KVM_CLOCK_HOST_TSC = 8


class kvm_clock_data(Structure):
    _fields_ = [
        ("clock", u64),  # nanoseconds
        ("flags", u32),
        ("pad0", u32),
        ("realtime", u64),
        ("host_tsc", u64),
        ("pad", u32 * 4),
    ]


# -- memory slots and their dirty logs -----------------------------------------------------------------------

KVM_MEM_LOG_DIRTY_PAGES = 1
KVM_MEM_READONLY = 2


class kvm_userspace_memory_region(Structure):
    _fields_ = [
        ("slot", u32),
        ("flags", u32),
        ("guest_phys_addr", u64),
        ("memory_size", u64),
        ("userspace_addr", u64),
    ]


class _kvm_dirty_bitmap_pointer(Union):
    _fields_ = [("dirty_bitmap", c_void_p), ("padding2", u64)]


class kvm_dirty_log(Structure):
    _anonymous_ = ("u",)
    _fields_ = [("slot", u32), ("padding1", u32), ("u", _kvm_dirty_bitmap_pointer)]


KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE = 1
KVM_DIRTY_LOG_INITIALLY_SET = 2


class kvm_clear_dirty_log(Structure):
    _anonymous_ = ("u",)
    _fields_ = [
        ("slot", u32),
        ("num_pages", u32),
        ("first_page", u64),
        ("u", _kvm_dirty_bitmap_pointer),
    ]


# -- the page shared with KVM_RUN ----------------------------------------------------------------------------

KVM_EXIT_UNKNOWN = 0
KVM_EXIT_EXCEPTION = 1
KVM_EXIT_IO = 2
KVM_EXIT_HYPERCALL = 3
KVM_EXIT_DEBUG = 4
KVM_EXIT_HLT = 5
KVM_EXIT_MMIO = 6
KVM_EXIT_IRQ_WINDOW_OPEN = 7
KVM_EXIT_SHUTDOWN = 8
KVM_EXIT_FAIL_ENTRY = 9
KVM_EXIT_INTR = 10
KVM_EXIT_SET_TPR = 11
KVM_EXIT_TPR_ACCESS = 12
KVM_EXIT_NMI = 16
KVM_EXIT_INTERNAL_ERROR = 17
KVM_EXIT_SYSTEM_EVENT = 24
KVM_EXIT_IOAPIC_EOI = 26
KVM_EXIT_X86_RDMSR = 29
KVM_EXIT_X86_WRMSR = 30
KVM_EXIT_DIRTY_RING_FULL = 31

KVM_EXIT_IO_IN = 0
KVM_EXIT_IO_OUT = 1

KVM_INTERNAL_ERROR_EMULATION = 1
KVM_INTERNAL_ERROR_SIMUL_EX = 2
KVM_INTERNAL_ERROR_DELIVERY_EV = 3
KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON = 4

KVM_SYSTEM_EVENT_SHUTDOWN = 1
KVM_SYSTEM_EVENT_RESET = 2
KVM_SYSTEM_EVENT_CRASH = 3


class _kvm_run_hw(Structure):
    _fields_ = [("hardware_exit_reason", u64)]


class _kvm_run_fail_entry(Structure):
    _fields_ = [("hardware_entry_failure_reason", u64), ("cpu", u32)]


class _kvm_run_ex(Structure):
    _fields_ = [("exception", u32), ("error_code", u32)]


class _kvm_run_io(Structure):
    _fields_ = [("direction", u8), ("size", u8), ("port", u16), ("count", u32), ("data_offset", u64)]


class kvm_debug_exit_arch(Structure):
    _fields_ = [("exception", u32), ("pad", u32), ("pc", u64), ("dr6", u64), ("dr7", u64)]


class _kvm_run_debug(Structure):
    _fields_ = [("arch", kvm_debug_exit_arch)]


class _kvm_run_mmio(Structure):
    _fields_ = [("phys_addr", u64), ("data", u8 * 8), ("len", u32), ("is_write", u8)]


class _kvm_run_hypercall(Structure):
    _fields_ = [("nr", u64), ("args", u64 * 6), ("ret", u64), ("longmode", u32), ("pad", u32)]


class _kvm_run_tpr_access(Structure):
    _fields_ = [("rip", u64), ("is_write", u32), ("pad", u32)]


class _kvm_run_internal(Structure):
    _fields_ = [("suberror", u32), ("ndata", u32), ("data", u64 * 16)]


class _kvm_run_system_event(Structure):
    _fields_ = [("type", u32), ("ndata", u32), ("data", u64 * 16)]


class _kvm_run_eoi(Structure):
    _fields_ = [("vector", u8)]


class _kvm_run_msr(Structure):
    _fields_ = [("error", u8), ("pad", u8 * 7), ("reason", u32), ("index", u32), ("data", u64)]


class _kvm_run_exit(Union):
    _fields_ = [
        ("hw", _kvm_run_hw),
        ("fail_entry", _kvm_run_fail_entry),
        ("ex", _kvm_run_ex),
        ("io", _kvm_run_io),
        ("debug", _kvm_run_debug),
        ("mmio", _kvm_run_mmio),
        ("hypercall", _kvm_run_hypercall),
        ("tpr_access", _kvm_run_tpr_access),
        ("internal", _kvm_run_internal),
        ("system_event", _kvm_run_system_event),
        ("eoi", _kvm_run_eoi),
        ("msr", _kvm_run_msr),
        ("padding", u8 * 256),
    ]


class kvm_sync_regs(Structure):
    _fields_ = [("regs", kvm_regs), ("sregs", kvm_sregs), ("events", kvm_vcpu_events)]


class _kvm_run_sync(Union):
    _fields_ = [("regs", kvm_sync_regs), ("padding", u8 * 2048)]


class kvm_run(Structure):
    """First page of a vCPU's mapping; what the last exit was about is in the member named after its reason."""

    _anonymous_ = ("exit",)
    _fields_ = [
        ("request_interrupt_window", u8),
        ("immediate_exit", u8),
        ("padding1", u8 * 6),
        ("exit_reason", u32),
        ("ready_for_interrupt_injection", u8),
        ("if_flag", u8),
        ("flags", u16),
        ("cr8", u64),
        ("apic_base", u64),
        ("exit", _kvm_run_exit),
        ("kvm_valid_regs", u64),
        ("kvm_dirty_regs", u64),
        ("s", _kvm_run_sync),
    ]
