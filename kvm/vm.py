"""A VM's descriptor: memory slots, interrupt chips, clock, new vCPUs.

Threads   Any thread may call anything; two that change the same slot must agree among themselves.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from ctypes import byref, c_uint64
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from . import ioctls
from .errors import KvmError
from .ioctls import Cap, Request, call
from .structs import (
    kvm_clock_data,
    kvm_enable_cap,
    kvm_irq_level,
    kvm_irq_routing,
    kvm_irq_routing_entry,
    kvm_irqchip,
    kvm_msi,
    kvm_userspace_memory_region,
    with_array,
)

if TYPE_CHECKING:
    from .system import Kvm
    from .vcpu import Vcpu

PAGE_SIZE = 4096


@dataclass(frozen=True, slots=True)
class MemorySlot:
    """What the kernel knows of a slot; addresses and size in bytes."""

    slot: int
    guest_address: int
    size: int
    host_address: int
    flags: int

    @property
    def pages(self) -> int:
        return self.size // PAGE_SIZE


class Vm:
    """One virtual machine; a context manager.  `slots` holds the memory slots by number."""

    def __init__(self, kvm: Kvm) -> None:
        self.kvm = kvm
        self.slots: dict[int, MemorySlot] = {}
        self.vcpus: list[Vcpu] = []
        self.fd = _create(kvm)

    # -- capabilities

    def check_extension(self, capability: Cap) -> int:
        """Like Kvm.check_extension, but for this VM: some answers depend on what was enabled."""
        return call(self.fd, ioctls.KVM_CHECK_EXTENSION, capability, f" ({capability.name})")

    def enable_cap(self, capability: Cap, *arguments: int) -> None:
        """Turn *capability* on with up to four *arguments*."""
        request = kvm_enable_cap(cap=capability, args=arguments)
        self._call(ioctls.KVM_ENABLE_CAP, request, f" ({capability.name})")

    # -- addresses that KVM keeps to itself (hosts without unrestricted real mode need them)

    def set_identity_map_address(self, address: int) -> None:
        """One page for KVM; to be set before the first vCPU."""
        self._call(ioctls.KVM_SET_IDENTITY_MAP_ADDR, c_uint64(address), f" ({address:#x})")

    def set_tss_address(self, address: int) -> None:
        """Three pages for KVM, below 4 GiB."""
        call(self.fd, ioctls.KVM_SET_TSS_ADDR, address, f" ({address:#x})")

    # -- interrupt chips

    def create_irqchip(self) -> None:
        """Both PICs, the I/O APIC and a local APIC per vCPU, all in the kernel; before the first vCPU."""
        call(self.fd, ioctls.KVM_CREATE_IRQCHIP)

    def split_irqchip(self, pins: int) -> None:
        """Only the local APICs in the kernel; *pins* lines of an I/O APIC that is the caller's."""
        self.enable_cap(Cap.KVM_CAP_SPLIT_IRQCHIP, pins)

    def get_irqchip(self, chip_id: int) -> kvm_irqchip:
        """State of chip KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE or KVM_IRQCHIP_IOAPIC."""
        chip = kvm_irqchip(chip_id=chip_id)
        self._call(ioctls.KVM_GET_IRQCHIP, chip, f" (chip {chip_id})")
        return chip

    def set_irqchip(self, chip: kvm_irqchip) -> None:
        """Set the state of the chip that *chip* names."""
        self._call(ioctls.KVM_SET_IRQCHIP, chip, f" (chip {chip.chip_id})")

    def set_gsi_routing(self, entries: Sequence[kvm_irq_routing_entry]) -> None:
        """Replace all routes from interrupt lines to chips and messages."""
        table = with_array(kvm_irq_routing, "entries", kvm_irq_routing_entry, len(entries))
        routes = table(nr=len(entries), entries=tuple(entries))
        self._call(ioctls.KVM_SET_GSI_ROUTING, routes, f" ({len(entries)} routes)")

    def irq_line(self, gsi: int, level: int) -> None:
        """Raise (1) or lower (0) an interrupt line; the chips must be in the kernel."""
        self._call(ioctls.KVM_IRQ_LINE, kvm_irq_level(irq=gsi, level=level), f" (GSI {gsi})")

    def signal_msi(self, address: int, data: int) -> bool:
        """Deliver a message-signalled interrupt; False when no local APIC took it."""
        message = kvm_msi(address_lo=address & 0xFFFFFFFF, address_hi=address >> 32, data=data)
        try:
            return self._call(ioctls.KVM_SIGNAL_MSI, message, f" (address {address:#x}, data {data:#x})") > 0
        except KvmError as error:
            if error.errno != errno.EPERM:  # what the kernel says when the message reaches nobody
                raise
            return False

    # -- clock

    def get_clock(self) -> kvm_clock_data:
        """The guest's kvmclock: `clock` in nanoseconds, `flags` say what else is valid."""
        clock = kvm_clock_data()
        self._call(ioctls.KVM_GET_CLOCK, clock)
        return clock

    def set_clock(self, nanoseconds: int, flags: int = 0) -> None:
        """Let the guest's kvmclock go on from *nanoseconds*."""
        self._call(ioctls.KVM_SET_CLOCK, kvm_clock_data(clock=nanoseconds, flags=flags), f" ({nanoseconds} ns)")

    # -- memory slots

    def set_memory_slot(self, slot: int, guest_address: int, size: int, host_address: int, flags: int = 0) -> None:
        """Show *size* bytes at *host_address* to the guest at *guest_address*; or change such a slot's flags.

        All three in whole pages.  The caller keeps the host memory mapped while the slot exists.
        """
        region = MemorySlot(slot, guest_address, size, host_address, flags)
        if size <= 0 or (guest_address | size | host_address) % PAGE_SIZE:
            what = f"expected a guest address, size and host address in whole pages of {PAGE_SIZE} bytes"
            raise KvmError(errno.EINVAL, f"{ioctls.KVM_SET_USER_MEMORY_REGION.name} ({region}: {what})")
        self._set_region(region)
        self.slots[slot] = region

    def set_slot_flags(self, slot: int, flags: int) -> None:
        """Change the flags of an existing slot, and nothing else."""
        old = self.slot(slot, ioctls.KVM_SET_USER_MEMORY_REGION)
        if old.flags != flags:
            region = replace(old, flags=flags)
            self._set_region(region)
            self.slots[slot] = region

    def delete_memory_slot(self, slot: int, guest_address: int = 0) -> None:
        """Take a slot away from the guest."""
        self._set_region(MemorySlot(slot, guest_address, 0, 0, 0))
        self.slots.pop(slot, None)

    def slot(self, slot: int, request: Request) -> MemorySlot:
        """The slot of that number; a KvmError in the name of *request* when there is none."""
        known = self.slots.get(slot)
        if known is None:
            raise KvmError(errno.ENOENT, f"{request.name} (slot {slot}, known are {sorted(self.slots)})")
        return known

    def _set_region(self, region: MemorySlot) -> None:
        argument = kvm_userspace_memory_region(
            slot=region.slot,
            flags=region.flags,
            guest_phys_addr=region.guest_address,
            memory_size=region.size,
            userspace_addr=region.host_address,
        )
        what = f" (slot {region.slot}: {region.size:#x} bytes at {region.guest_address:#x})"
        self._call(ioctls.KVM_SET_USER_MEMORY_REGION, argument, what)

    # -- vCPUs, and the end

    def create_vcpu(self, index: int) -> Vcpu:
        """The vCPU whose id, and initial APIC id, is *index*."""
        from .vcpu import Vcpu

        vcpu = Vcpu(self, index)
        self.vcpus.append(vcpu)
        return vcpu

    def close(self) -> None:
        """Close the vCPUs and the VM; no thread may be in any of them.  Twice is allowed."""
        for vcpu in self.vcpus:
            vcpu.close()
        self.vcpus.clear()
        self.slots.clear()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Vm:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _call(self, request: Request, argument: Any, what: str = "") -> int:
        return call(self.fd, request, byref(argument), what)


def _create(kvm: Kvm) -> int:
    while True:
        try:
            return call(kvm.fd, ioctls.KVM_CREATE_VM)
        except KvmError as error:
            if error.errno != errno.EINTR:  # a signal while the kernel waited for its own threads
                raise
