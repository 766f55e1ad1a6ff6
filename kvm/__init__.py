"""A small hypervisor: KVM through ctypes, nothing compiled.

Two floors.  The lower one is a binding that would serve any program and imports nothing of ours but itself:

    ioctls       request numbers, each with its kernel name; call()
    structs      the kernel's structures, field for field
    system       Kvm: /dev/kvm, capabilities, create a VM
    vm           Vm: memory slots, interrupt chips, clock, create a vCPU
    vcpu         Vcpu: registers, KVM_RUN, exits as small typed values; VcpuThread: runs one, parks it at once
    memory       HostMemory: guest RAM as the host maps it; AddressSpace: guest-physical → host, checked
    dirty_log    DirtyLog: which pages were written, slot by slot
    errors       KvmError: what was asked of the kernel, of which object, and what it said

The upper floor (machine, devices, state, monitor, main) is the machine that embeds the migration.

    with Kvm() as kvm, kvm.create_vm() as vm, HostMemory.anonymous(1 << 20) as ram:
        vm.set_memory_slot(0, 0, ram.size, ram.host_address)
        vcpu = vm.create_vcpu(0)
        …
        exit = vcpu.run_once()
"""

from .errors import KvmError
from .system import Kvm
from .vcpu import Vcpu
from .vm import Vm

__all__ = ["Kvm", "KvmError", "Vcpu", "Vm"]
