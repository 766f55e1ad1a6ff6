"""Exceptions, interrupts and NMIs under way, between kvm_vcpu_events and a CpuState (cpu-state.md §2).

A stop may fall between the moment an exception arises and the one its handler is entered.  On the wire there is
only "vector n is to be delivered"; a receiver up to QEMU 10.1 then delivers error code 0.  So a fault with another
error code is not sent at all: it left the instruction pointer at its instruction, which raises it again on the
other side.
"""

from __future__ import annotations

from qemumig.savevm.devices.cpu_state import CpuState

from ..structs import (
    KVM_MP_STATE_SIPI_RECEIVED,
    KVM_VCPUEVENT_VALID_NMI_PENDING,
    KVM_VCPUEVENT_VALID_PAYLOAD,
    KVM_VCPUEVENT_VALID_SIPI_VECTOR,
    KVM_VCPUEVENT_VALID_SMM,
    KVM_VCPUEVENT_VALID_TRIPLE_FAULT,
    kvm_vcpu_events,
)
from .host import HostState

NONE = -1  # no vector: 0 would be one
_HFLAGS2 = 0x101
_HFLAGS2_NMI_MASKED = 1 << 2
_HFLAGS_SMM = 1 << 19

_VECTOR_DEBUG, _VECTOR_PAGE_FAULT = 1, 14
_DR6_TRAPS, _DR6_ONES = 0xF, 0xFFFF0FF0
_DR7_GENERAL_DETECT = 1 << 13


def take_events(cpu: CpuState, events: kvm_vcpu_events) -> None:
    """Fill *cpu* from *events*; CR2 and the debug registers are there already."""
    exception, interrupt, nmi = events.exception, events.interrupt, events.nmi
    arose = exception.injected or exception.pending
    if exception.pending and events.exception_has_payload:
        _apply_payload(cpu, exception.nr, events.exception_payload)
    again = bool(arose and exception.has_error_code and exception.error_code)
    cpu.exception_nr = exception.nr if arose and not again else NONE
    cpu.has_error_code = int(cpu.exception_nr != NONE and exception.has_error_code)
    cpu.interrupt_injected = interrupt.nr if interrupt.injected else NONE
    cpu.soft_interrupt = interrupt.soft
    cpu.nmi_injected, cpu.nmi_pending = nmi.injected, nmi.pending
    cpu.hflags2 = _HFLAGS2 | (_HFLAGS2_NMI_MASKED if nmi.masked else 0)
    cpu.sipi_vector = events.sipi_vector
    if events.flags & KVM_VCPUEVENT_VALID_TRIPLE_FAULT:
        cpu.triple_fault = events.triple_fault.pending


def events_of(cpu: CpuState, host: HostState) -> kvm_vcpu_events:
    """The structure that brings *cpu*'s events back."""
    events = kvm_vcpu_events(flags=KVM_VCPUEVENT_VALID_NMI_PENDING)
    _put_exception(events, cpu, host)
    events.interrupt.injected = cpu.interrupt_injected >= 0
    events.interrupt.nr = max(cpu.interrupt_injected, 0) & 0xFF
    events.interrupt.soft = cpu.soft_interrupt
    events.nmi.injected, events.nmi.pending = cpu.nmi_injected, cpu.nmi_pending
    events.nmi.masked = bool(cpu.hflags2 & _HFLAGS2_NMI_MASKED)
    if cpu.mp_state == KVM_MP_STATE_SIPI_RECEIVED:
        events.flags |= KVM_VCPUEVENT_VALID_SIPI_VECTOR
        events.sipi_vector = cpu.sipi_vector
    if host.has_smm:
        events.flags |= KVM_VCPUEVENT_VALID_SMM
        events.smi.smm = bool(cpu.hflags & _HFLAGS_SMM)
    if host.has_triple_fault:
        events.flags |= KVM_VCPUEVENT_VALID_TRIPLE_FAULT
        events.triple_fault.pending = bool(cpu.triple_fault)
    return events


def _put_exception(events: kvm_vcpu_events, cpu: CpuState, host: HostState) -> None:
    exception, info = events.exception, cpu.exception_info
    if host.has_payload:
        events.flags |= KVM_VCPUEVENT_VALID_PAYLOAD
    if cpu.exception_nr >= 0:
        exception.nr = cpu.exception_nr & 0xFF
        exception.has_error_code = cpu.has_error_code
        exception.error_code = (cpu.error_code or 0) & 0xFFFFFFFF
        exception.injected = info.exception_injected if info else 1
    if info and host.has_payload:
        exception.pending = info.exception_pending
        events.exception_has_payload = info.exception_has_payload
        events.exception_payload = info.exception_payload


def _apply_payload(cpu: CpuState, vector: int, payload: int) -> None:
    """What the processor would have done on the way to the handler: there is no room for it on the wire."""
    if vector == _VECTOR_PAGE_FAULT:
        cpu.cr2 = payload
    elif vector == _VECTOR_DEBUG:
        dr6 = cpu.dr[6] & ~_DR6_TRAPS | _DR6_ONES
        cpu.dr[4] = cpu.dr[6] = (dr6 | payload) ^ payload & _DR6_ONES
        cpu.dr[5] = cpu.dr[7] = cpu.dr[7] & ~_DR7_GENERAL_DETECT
