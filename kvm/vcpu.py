"""A vCPU: its registers, and one KVM_RUN at a time.

Out   exits as small typed values; the data of an access is a view of the page shared with the kernel, so a
      handler fills in what the guest reads by writing to `exit.data` before it returns

Holds     only the vCPU's thread (vcpu_thread.py) is in KVM_RUN; the rest is called while it is parked, or from it
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
from collections.abc import Iterable, Sequence
from ctypes import addressof, byref, c_uint8, c_uint64
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

from . import ioctls, structs
from .errors import KvmError
from .ioctls import Cap, Request, call, raw_ioctl
from .structs import (
    kvm_cpuid2,
    kvm_cpuid_entry2,
    kvm_debugregs,
    kvm_interrupt,
    kvm_lapic_state,
    kvm_mp_state,
    kvm_regs,
    kvm_run,
    kvm_sregs,
    kvm_sregs2,
    kvm_vcpu_events,
    kvm_xcrs,
    with_array,
)
from .system import read_cpuid

if TYPE_CHECKING:
    from .vm import Vm

XSAVE_SIZE = 4096  # of hosts without KVM_CAP_XSAVE2
MAX_MSRS = 256  # the kernel takes fewer than this in one request
_MSRS_HEAD = struct.Struct("=II")  # kvm_msrs: how many entries, padding …
_MSR_ENTRY = struct.Struct("=IIQ")  # … and a kvm_msr_entry each: index, reserved, data

State = TypeVar("State")


# -- exits ----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class IoExit:
    """Port access: *count* items of *size* bytes each, one behind the other in *data*."""

    port: int
    size: int
    count: int
    is_write: bool
    data: memoryview


@dataclass(slots=True)
class MmioExit:
    """Access to guest-physical memory where no slot is; *data* has *size* bytes."""

    address: int
    size: int
    is_write: bool
    data: memoryview


@dataclass(slots=True)
class HaltExit:
    """HLT; only without an interrupt chip in the kernel."""


@dataclass(slots=True)
class ShutdownExit:
    """Triple fault."""


@dataclass(slots=True)
class InterruptedExit:
    """EINTR: a kick, or some other signal; the last access is complete."""


@dataclass(slots=True)
class RetryExit:
    """EAGAIN: this vCPU's state changed (INIT, SIPI) before it ran; run it again."""


@dataclass(slots=True)
class FailEntryExit:
    """The processor refused the guest's state; *reason* is the hardware's number."""

    reason: int


@dataclass(slots=True)
class InternalErrorExit:
    """KVM gave up: KVM_INTERNAL_ERROR_… and words that depend on it."""

    suberror: int
    data: tuple[int, ...]


@dataclass(slots=True)
class SystemEventExit:
    """KVM_SYSTEM_EVENT_…"""

    type: int


@dataclass(slots=True)
class IoapicEoiExit:
    """The guest ended interrupt *vector*, and an I/O APIC outside the kernel wants to know."""

    vector: int


@dataclass(slots=True)
class UnknownExit:
    """KVM_EXIT_… that has no type of its own here."""

    reason: int


Exit = (
    IoExit
    | MmioExit
    | HaltExit
    | ShutdownExit
    | InterruptedExit
    | RetryExit
    | FailEntryExit
    | InternalErrorExit
    | SystemEventExit
    | IoapicEoiExit
    | UnknownExit
)

_HALT, _SHUTDOWN, INTERRUPTED, RETRY = HaltExit(), ShutdownExit(), InterruptedExit(), RetryExit()


# -- the vCPU -------------------------------------------------------------------------------------------------


class Vcpu:
    """One vCPU; `run` is the structure shared with the kernel.  Made by Vm.create_vcpu."""

    def __init__(self, vm: Vm, index: int) -> None:
        self.vm = vm
        self.index = index
        self._where = f" (vCPU {index})"
        self._xsave_size = 0
        self.fd = call(vm.fd, ioctls.KVM_CREATE_VCPU, index, self._where)
        try:
            self._map_run(vm.kvm.vcpu_mmap_size)
        except OSError as error:
            os.close(self.fd)
            self.fd = -1
            raise KvmError(error.errno or 0, f"mmap of kvm_run{self._where}") from error

    def _map_run(self, size: int) -> None:
        mapping = mmap.mmap(self.fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self._page = memoryview(mapping)
        self.run = kvm_run.from_buffer(mapping)
        # Members of the union, looked up once: an exit reads several of their fields.
        self._io, self._mmio = self.run.io, self.run.mmio
        self._mmio_data = addressof(self._mmio.data) - addressof(self.run)

    # -- running

    def run_once(self) -> Exit:
        """Run the guest until something needs us.  EINTR and EAGAIN are exits; other errors KvmError."""
        if raw_ioctl(self.fd, ioctls.KVM_RUN, 0) < 0:
            number = ctypes.get_errno()
            if number == errno.EINTR:
                return INTERRUPTED
            if number == errno.EAGAIN:
                return RETRY
            raise KvmError(number, ioctls.KVM_RUN.name + self._where)
        reason = self.run.exit_reason
        if reason == structs.KVM_EXIT_IO:
            return self._io_exit()
        if reason == structs.KVM_EXIT_MMIO:
            return self._mmio_exit()
        return self._other_exit(reason)

    def _io_exit(self) -> IoExit:
        io = self._io
        size, count, start = io.size, io.count, io.data_offset
        data = self._page[start : start + size * count]
        return IoExit(io.port, size, count, io.direction == structs.KVM_EXIT_IO_OUT, data)

    def _mmio_exit(self) -> MmioExit:
        mmio = self._mmio
        start, size = self._mmio_data, mmio.len
        return MmioExit(mmio.phys_addr, size, mmio.is_write != 0, self._page[start : start + size])

    def _other_exit(self, reason: int) -> Exit:
        run = self.run
        if reason == structs.KVM_EXIT_HLT:
            return _HALT
        if reason == structs.KVM_EXIT_SHUTDOWN:
            return _SHUTDOWN
        if reason == structs.KVM_EXIT_INTR:
            return INTERRUPTED
        if reason == structs.KVM_EXIT_FAIL_ENTRY:
            return FailEntryExit(run.fail_entry.hardware_entry_failure_reason)
        if reason == structs.KVM_EXIT_INTERNAL_ERROR:
            words = min(run.internal.ndata, len(run.internal.data))
            return InternalErrorExit(run.internal.suberror, tuple(run.internal.data[:words]))
        if reason == structs.KVM_EXIT_SYSTEM_EVENT:
            return SystemEventExit(run.system_event.type)
        if reason == structs.KVM_EXIT_IOAPIC_EOI:
            return IoapicEoiExit(run.eoi.vector)
        return UnknownExit(reason)

    # -- registers

    def get_regs(self) -> kvm_regs:
        """General registers, RIP and RFLAGS."""
        return self._get(ioctls.KVM_GET_REGS, kvm_regs())

    def set_regs(self, regs: kvm_regs) -> None:
        self._set(ioctls.KVM_SET_REGS, regs)

    def get_sregs(self) -> kvm_sregs:
        """Segments, descriptor tables, control registers, EFER, the APIC's base."""
        return self._get(ioctls.KVM_GET_SREGS, kvm_sregs())

    def set_sregs(self, sregs: kvm_sregs) -> None:
        self._set(ioctls.KVM_SET_SREGS, sregs)

    def get_sregs2(self) -> kvm_sregs2:
        """The same with the PDPTRs in place of pending interrupts; needs KVM_CAP_SREGS2."""
        return self._get(ioctls.KVM_GET_SREGS2, kvm_sregs2())

    def set_sregs2(self, sregs: kvm_sregs2) -> None:
        self._set(ioctls.KVM_SET_SREGS2, sregs)

    def get_debugregs(self) -> kvm_debugregs:
        return self._get(ioctls.KVM_GET_DEBUGREGS, kvm_debugregs())

    def set_debugregs(self, debugregs: kvm_debugregs) -> None:
        self._set(ioctls.KVM_SET_DEBUGREGS, debugregs)

    def get_xcrs(self) -> kvm_xcrs:
        return self._get(ioctls.KVM_GET_XCRS, kvm_xcrs())

    def set_xcrs(self, xcrs: kvm_xcrs) -> None:
        self._set(ioctls.KVM_SET_XCRS, xcrs)

    @property
    def xsave_size(self) -> int:
        """Bytes of the XSAVE image that get_xsave gives and set_xsave takes."""
        if not self._xsave_size:
            self._xsave_size = self.vm.check_extension(Cap.KVM_CAP_XSAVE2) or XSAVE_SIZE
        return self._xsave_size

    def get_xsave(self) -> bytearray:
        """FPU and vector registers as an XSAVE image in the standard format."""
        image = bytearray(self.xsave_size)
        request = ioctls.KVM_GET_XSAVE2 if len(image) > XSAVE_SIZE else ioctls.KVM_GET_XSAVE
        self._get(request, (c_uint8 * len(image)).from_buffer(image))
        return image

    def set_xsave(self, image: bytes | bytearray | memoryview) -> None:
        """Load an XSAVE image of exactly `xsave_size` bytes."""
        size = memoryview(image).nbytes
        if size != self.xsave_size:
            what = f"{ioctls.KVM_SET_XSAVE.name} (vCPU {self.index}: {size} bytes, expected {self.xsave_size})"
            raise KvmError(errno.EINVAL, what)
        self._set(ioctls.KVM_SET_XSAVE, (c_uint8 * size).from_buffer_copy(image))

    # -- MSRs

    def get_msrs(self, indices: Iterable[int]) -> dict[int, int]:
        """The values of those MSRs among *indices* that KVM can read."""
        wanted = list(indices)
        values: dict[int, int] = {}
        while wanted:
            batch = wanted[: MAX_MSRS - 1]
            request = _msr_request((index, 0) for index in batch)
            done = call(self.fd, ioctls.KVM_GET_MSRS, byref(_in_place(request)), self._where)
            entries = memoryview(request)[_MSRS_HEAD.size : _MSRS_HEAD.size + done * _MSR_ENTRY.size]
            values.update((index, value) for index, _, value in _MSR_ENTRY.iter_unpack(entries))
            # KVM stops at the first MSR it will not read: step over it.
            wanted = wanted[done if done == len(batch) else done + 1 :]
        return values

    def set_msrs(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Write (index, value) pairs in their order; a KvmError names the first that KVM refuses."""
        left = list(pairs)
        while left:
            batch = left[: MAX_MSRS - 1]
            request = _msr_request(batch)
            done = call(self.fd, ioctls.KVM_SET_MSRS, byref(_in_place(request)), self._where)
            if done < len(batch):
                index, value = batch[done]
                what = f"{ioctls.KVM_SET_MSRS.name} (vCPU {self.index}, MSR {index:#x} = {value:#x})"
                raise KvmError(errno.EINVAL, what)
            left = left[len(batch) :]

    # -- interrupts and run state

    def get_lapic(self) -> kvm_lapic_state:
        """The local APIC's registers; needs one in the kernel."""
        return self._get(ioctls.KVM_GET_LAPIC, kvm_lapic_state())

    def set_lapic(self, lapic: kvm_lapic_state) -> None:
        self._set(ioctls.KVM_SET_LAPIC, lapic)

    def get_vcpu_events(self) -> kvm_vcpu_events:
        """Exceptions, interrupts and NMIs under way."""
        return self._get(ioctls.KVM_GET_VCPU_EVENTS, kvm_vcpu_events())

    def set_vcpu_events(self, events: kvm_vcpu_events) -> None:
        self._set(ioctls.KVM_SET_VCPU_EVENTS, events)

    def get_mp_state(self) -> int:
        """KVM_MP_STATE_…; asking may deliver a pending INIT or SIPI, so ask before the registers."""
        return self._get(ioctls.KVM_GET_MP_STATE, kvm_mp_state()).mp_state

    def set_mp_state(self, state: int) -> None:
        self._set(ioctls.KVM_SET_MP_STATE, kvm_mp_state(mp_state=state))

    def interrupt(self, vector: int) -> None:
        """Queue an external interrupt; only without an interrupt chip in the kernel."""
        self._set(ioctls.KVM_INTERRUPT, kvm_interrupt(irq=vector))

    def nmi(self) -> None:
        """Queue an NMI."""
        call(self.fd, ioctls.KVM_NMI, 0, self._where)

    def setup_mce(self, mcg_cap: int) -> None:
        """Give the guest machine-check banks as *mcg_cap* (MSR 0x179) says."""
        self._set(ioctls.KVM_X86_SETUP_MCE, c_uint64(mcg_cap))

    # -- CPUID and clock

    def get_cpuid(self) -> list[kvm_cpuid_entry2]:
        """The leaves the guest sees."""
        return read_cpuid(self.fd, ioctls.KVM_GET_CPUID2, self._where)

    def set_cpuid(self, entries: Sequence[kvm_cpuid_entry2]) -> None:
        """Set them; once, before the vCPU runs."""
        table = with_array(kvm_cpuid2, "entries", kvm_cpuid_entry2, len(entries))
        self._set(ioctls.KVM_SET_CPUID2, table(nent=len(entries), entries=tuple(entries)))

    def get_tsc_khz(self) -> int:
        """Frequency of the guest's TSC in kHz."""
        return call(self.fd, ioctls.KVM_GET_TSC_KHZ, 0, self._where)

    def set_tsc_khz(self, khz: int) -> None:
        """Set it; another than the host's needs KVM_CAP_TSC_CONTROL."""
        call(self.fd, ioctls.KVM_SET_TSC_KHZ, khz, f" (vCPU {self.index}, {khz} kHz)")

    def kvmclock_ctrl(self) -> bool:
        """Tell the guest that it was stopped, so its watchdogs forgive; False when it has no kvmclock."""
        try:
            call(self.fd, ioctls.KVM_KVMCLOCK_CTRL, 0, self._where)
        except KvmError as error:
            if error.errno != errno.EINVAL:
                raise
            return False
        return True

    # -- the end, and what the wrappers share

    def close(self) -> None:
        """Close the descriptor; the shared page goes with the last exit that shows it.  Twice is allowed."""
        if self.fd < 0:
            return
        os.close(self.fd)
        self.fd = -1
        del self.run, self._io, self._mmio, self._page

    def _get(self, request: Request, state: State) -> State:
        call(self.fd, request, byref(cast(Any, state)), self._where)
        return state

    def _set(self, request: Request, state: Any) -> None:
        call(self.fd, request, byref(state), self._where)


def _msr_request(pairs: Iterable[tuple[int, int]]) -> bytearray:
    """A `kvm_msrs` with those entries; packed, for it is made while a guest stands still."""
    entries = b"".join(_MSR_ENTRY.pack(index, 0, value) for index, value in pairs)
    return bytearray(_MSRS_HEAD.pack(len(entries) // _MSR_ENTRY.size, 0) + entries)


def _in_place(data: bytearray) -> Any:
    """The bytes themselves, for a system call to read and write."""
    return (c_uint8 * len(data)).from_buffer(data)
