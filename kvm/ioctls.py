"""KVM's request numbers, computed from the size of what they carry; each knows its kernel name.

    bits 31-30   direction: 0 none, 1 the kernel reads (W), 2 the kernel writes (R), 3 both
    bits 29-16   size of the structure (of its head, if it ends in a flexible array)
    bits 15-8    0xAE, KVM's letter
    bits 7-0     number of the request

A wrong field width in structs.py changes the number, so a test that pins the numbers pins the structures.
"""

from __future__ import annotations

import ctypes
from enum import IntEnum
from typing import Any

from . import structs
from .errors import KvmError

KVMIO = 0xAE
_NONE, _WRITE, _READ = 0, 1, 2

_libc = ctypes.CDLL(None, use_errno=True)
raw_ioctl = _libc.ioctl
raw_ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)
raw_ioctl.restype = ctypes.c_int


class Request(int):
    """A request number that can say its name."""

    name: str

    def __new__(cls, number: int, name: str) -> Request:
        request = super().__new__(cls, number)
        request.name = name
        return request

    def __repr__(self) -> str:
        return f"{self.name} ({int(self):#x})"


def _request(direction: int, name: str, number: int, size: int) -> Request:
    return Request(direction << 30 | size << 16 | KVMIO << 8 | number, name)


def io(name: str, number: int) -> Request:
    """A request whose argument is a plain number, or nothing."""
    return _request(_NONE, name, number, 0)


def iow(name: str, number: int, argument: Any) -> Request:
    """A request that hands a structure of type *argument* to the kernel."""
    return _request(_WRITE, name, number, ctypes.sizeof(argument))


def ior(name: str, number: int, argument: Any) -> Request:
    """A request that takes a structure of type *argument* from the kernel."""
    return _request(_READ, name, number, ctypes.sizeof(argument))


def iowr(name: str, number: int, argument: Any) -> Request:
    """A request whose structure travels both ways."""
    return _request(_READ | _WRITE, name, number, ctypes.sizeof(argument))


def call(fd: int, request: Request, argument: Any = 0, what: str = "") -> int:
    """Make *request* of descriptor *fd*; the kernel's result, never negative.

    *argument*: a number, or byref() of a structure.  *what* goes behind the request's name in the error:
    " (slot 7)".  Raises KvmError; EINTR and EAGAIN too, the caller knows what they mean.
    """
    result: int = raw_ioctl(fd, request, argument)
    if result < 0:
        raise KvmError(ctypes.get_errno(), request.name + what)
    return result


# -- of /dev/kvm ---------------------------------------------------------------------------------------------
KVM_GET_API_VERSION = io("KVM_GET_API_VERSION", 0x00)
KVM_CREATE_VM = io("KVM_CREATE_VM", 0x01)
KVM_GET_MSR_INDEX_LIST = iowr("KVM_GET_MSR_INDEX_LIST", 0x02, structs.kvm_msr_list)
KVM_CHECK_EXTENSION = io("KVM_CHECK_EXTENSION", 0x03)  # of a VM, too
KVM_GET_VCPU_MMAP_SIZE = io("KVM_GET_VCPU_MMAP_SIZE", 0x04)
KVM_GET_SUPPORTED_CPUID = iowr("KVM_GET_SUPPORTED_CPUID", 0x05, structs.kvm_cpuid2)
KVM_GET_MSR_FEATURE_INDEX_LIST = iowr("KVM_GET_MSR_FEATURE_INDEX_LIST", 0x0A, structs.kvm_msr_list)

# -- of a VM -------------------------------------------------------------------------------------------------
KVM_CREATE_VCPU = io("KVM_CREATE_VCPU", 0x41)
KVM_GET_DIRTY_LOG = iow("KVM_GET_DIRTY_LOG", 0x42, structs.kvm_dirty_log)
KVM_SET_USER_MEMORY_REGION = iow("KVM_SET_USER_MEMORY_REGION", 0x46, structs.kvm_userspace_memory_region)
KVM_SET_TSS_ADDR = io("KVM_SET_TSS_ADDR", 0x47)
KVM_SET_IDENTITY_MAP_ADDR = iow("KVM_SET_IDENTITY_MAP_ADDR", 0x48, ctypes.c_uint64)
KVM_CREATE_IRQCHIP = io("KVM_CREATE_IRQCHIP", 0x60)
KVM_IRQ_LINE = iow("KVM_IRQ_LINE", 0x61, structs.kvm_irq_level)
KVM_GET_IRQCHIP = iowr("KVM_GET_IRQCHIP", 0x62, structs.kvm_irqchip)
KVM_SET_IRQCHIP = ior("KVM_SET_IRQCHIP", 0x63, structs.kvm_irqchip)  # the kernel's direction, not a slip
KVM_SET_GSI_ROUTING = iow("KVM_SET_GSI_ROUTING", 0x6A, structs.kvm_irq_routing)
KVM_IRQFD = iow("KVM_IRQFD", 0x76, structs.kvm_irqfd)
KVM_CREATE_PIT2 = iow("KVM_CREATE_PIT2", 0x77, structs.kvm_pit_config)
KVM_IOEVENTFD = iow("KVM_IOEVENTFD", 0x79, structs.kvm_ioeventfd)
KVM_SET_CLOCK = iow("KVM_SET_CLOCK", 0x7B, structs.kvm_clock_data)
KVM_GET_CLOCK = ior("KVM_GET_CLOCK", 0x7C, structs.kvm_clock_data)
KVM_GET_PIT2 = ior("KVM_GET_PIT2", 0x9F, structs.kvm_pit_state2)
KVM_SET_PIT2 = iow("KVM_SET_PIT2", 0xA0, structs.kvm_pit_state2)
KVM_ENABLE_CAP = iow("KVM_ENABLE_CAP", 0xA3, structs.kvm_enable_cap)
KVM_SIGNAL_MSI = iow("KVM_SIGNAL_MSI", 0xA5, structs.kvm_msi)
KVM_CLEAR_DIRTY_LOG = iowr("KVM_CLEAR_DIRTY_LOG", 0xC0, structs.kvm_clear_dirty_log)

# -- of a vCPU -----------------------------------------------------------------------------------------------
KVM_RUN = io("KVM_RUN", 0x80)
KVM_GET_REGS = ior("KVM_GET_REGS", 0x81, structs.kvm_regs)
KVM_SET_REGS = iow("KVM_SET_REGS", 0x82, structs.kvm_regs)
KVM_GET_SREGS = ior("KVM_GET_SREGS", 0x83, structs.kvm_sregs)
KVM_SET_SREGS = iow("KVM_SET_SREGS", 0x84, structs.kvm_sregs)
KVM_INTERRUPT = iow("KVM_INTERRUPT", 0x86, structs.kvm_interrupt)
KVM_GET_MSRS = iowr("KVM_GET_MSRS", 0x88, structs.kvm_msrs)
KVM_SET_MSRS = iow("KVM_SET_MSRS", 0x89, structs.kvm_msrs)
KVM_GET_FPU = ior("KVM_GET_FPU", 0x8C, structs.kvm_fpu)
KVM_SET_FPU = iow("KVM_SET_FPU", 0x8D, structs.kvm_fpu)
KVM_GET_LAPIC = ior("KVM_GET_LAPIC", 0x8E, structs.kvm_lapic_state)
KVM_SET_LAPIC = iow("KVM_SET_LAPIC", 0x8F, structs.kvm_lapic_state)
KVM_SET_CPUID2 = iow("KVM_SET_CPUID2", 0x90, structs.kvm_cpuid2)
KVM_GET_CPUID2 = iowr("KVM_GET_CPUID2", 0x91, structs.kvm_cpuid2)
KVM_GET_MP_STATE = ior("KVM_GET_MP_STATE", 0x98, structs.kvm_mp_state)
KVM_SET_MP_STATE = iow("KVM_SET_MP_STATE", 0x99, structs.kvm_mp_state)
KVM_NMI = io("KVM_NMI", 0x9A)
KVM_X86_SETUP_MCE = iow("KVM_X86_SETUP_MCE", 0x9C, ctypes.c_uint64)
KVM_X86_GET_MCE_CAP_SUPPORTED = ior("KVM_X86_GET_MCE_CAP_SUPPORTED", 0x9D, ctypes.c_uint64)  # of /dev/kvm
KVM_GET_VCPU_EVENTS = ior("KVM_GET_VCPU_EVENTS", 0x9F, structs.kvm_vcpu_events)
KVM_SET_VCPU_EVENTS = iow("KVM_SET_VCPU_EVENTS", 0xA0, structs.kvm_vcpu_events)
KVM_GET_DEBUGREGS = ior("KVM_GET_DEBUGREGS", 0xA1, structs.kvm_debugregs)
KVM_SET_DEBUGREGS = iow("KVM_SET_DEBUGREGS", 0xA2, structs.kvm_debugregs)
KVM_SET_TSC_KHZ = io("KVM_SET_TSC_KHZ", 0xA2)
KVM_GET_TSC_KHZ = io("KVM_GET_TSC_KHZ", 0xA3)
KVM_GET_XSAVE = ior("KVM_GET_XSAVE", 0xA4, structs.kvm_xsave)
KVM_SET_XSAVE = iow("KVM_SET_XSAVE", 0xA5, structs.kvm_xsave)
KVM_GET_XCRS = ior("KVM_GET_XCRS", 0xA6, structs.kvm_xcrs)
KVM_SET_XCRS = iow("KVM_SET_XCRS", 0xA7, structs.kvm_xcrs)
KVM_KVMCLOCK_CTRL = io("KVM_KVMCLOCK_CTRL", 0xAD)
KVM_GET_SREGS2 = ior("KVM_GET_SREGS2", 0xCC, structs.kvm_sregs2)
KVM_SET_SREGS2 = iow("KVM_SET_SREGS2", 0xCD, structs.kvm_sregs2)
KVM_GET_XSAVE2 = ior("KVM_GET_XSAVE2", 0xCF, structs.kvm_xsave)


class Cap(IntEnum):
    """Capabilities that an x86 machine asks for, by the kernel's names."""

    KVM_CAP_IRQCHIP = 0
    KVM_CAP_HLT = 1
    KVM_CAP_USER_MEMORY = 3
    KVM_CAP_SET_TSS_ADDR = 4
    KVM_CAP_VAPIC = 6
    KVM_CAP_EXT_CPUID = 7
    KVM_CAP_CLOCKSOURCE = 8
    KVM_CAP_NR_VCPUS = 9  # a recommendation
    KVM_CAP_NR_MEMSLOTS = 10
    KVM_CAP_MP_STATE = 14
    KVM_CAP_SYNC_MMU = 16
    KVM_CAP_USER_NMI = 22
    KVM_CAP_IRQ_ROUTING = 25
    KVM_CAP_MCE = 31  # value: number of banks
    KVM_CAP_IRQFD = 32
    KVM_CAP_PIT2 = 33
    KVM_CAP_PIT_STATE2 = 35
    KVM_CAP_IOEVENTFD = 36
    KVM_CAP_SET_IDENTITY_MAP_ADDR = 37
    KVM_CAP_ADJUST_CLOCK = 39  # value: flags of KVM_GET_CLOCK
    KVM_CAP_INTERNAL_ERROR_DATA = 40
    KVM_CAP_VCPU_EVENTS = 41
    KVM_CAP_INTR_SHADOW = 49
    KVM_CAP_DEBUGREGS = 50
    KVM_CAP_ENABLE_CAP = 54
    KVM_CAP_XSAVE = 55
    KVM_CAP_XCRS = 56
    KVM_CAP_ASYNC_PF = 59
    KVM_CAP_TSC_CONTROL = 60
    KVM_CAP_GET_TSC_KHZ = 61
    KVM_CAP_MAX_VCPUS = 66
    KVM_CAP_TSC_DEADLINE_TIMER = 72
    KVM_CAP_SYNC_REGS = 74
    KVM_CAP_KVMCLOCK_CTRL = 76
    KVM_CAP_SIGNAL_MSI = 77
    KVM_CAP_READONLY_MEM = 81
    KVM_CAP_ENABLE_CAP_VM = 98
    KVM_CAP_CHECK_EXTENSION_VM = 105
    KVM_CAP_DISABLE_QUIRKS = 116
    KVM_CAP_X86_SMM = 117
    KVM_CAP_MULTI_ADDRESS_SPACE = 118
    KVM_CAP_SPLIT_IRQCHIP = 121
    KVM_CAP_MAX_VCPU_ID = 128
    KVM_CAP_X2APIC_API = 129
    KVM_CAP_IMMEDIATE_EXIT = 136
    KVM_CAP_X86_DISABLE_EXITS = 143
    KVM_CAP_GET_MSR_FEATURES = 153
    KVM_CAP_NESTED_STATE = 157  # value: largest size in bytes
    KVM_CAP_EXCEPTION_PAYLOAD = 164
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 = 168  # value: flags that may be enabled
    KVM_CAP_HALT_POLL = 182
    KVM_CAP_ASYNC_PF_INT = 183
    KVM_CAP_STEAL_TIME = 187
    KVM_CAP_X86_USER_SPACE_MSR = 188
    KVM_CAP_X86_MSR_FILTER = 189
    KVM_CAP_DIRTY_LOG_RING = 192  # value: largest ring in bytes
    KVM_CAP_SREGS2 = 200
    KVM_CAP_EXIT_ON_EMULATION_FAILURE = 204
    KVM_CAP_XSAVE2 = 208  # value: bytes of the XSAVE image
    KVM_CAP_SYS_ATTRIBUTES = 209
    KVM_CAP_DISABLE_QUIRKS2 = 213
    KVM_CAP_VM_TSC_CONTROL = 214
    KVM_CAP_X86_TRIPLE_FAULT_EVENT = 218
    KVM_CAP_DIRTY_LOG_RING_ACQ_REL = 223
