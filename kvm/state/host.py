"""What this machine can hold of a vCPU's state: asked once per VM, looked up at every save and load."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..cpuid import CpuModel, physical_bits, xsave_components
from ..ioctls import Cap
from ..structs import kvm_cpuid_entry2
from ..vm import Vm
from .msrs import ALWAYS_THERE, FEATURE_OF, MACHINE_CHECK_BANKS

MCG_CAP = 0x100010A  # ten banks of machine check registers, MCG_CTL, software recovery


@dataclass(frozen=True)
class HostState:
    """Facts about the kernel, the processor under it, and the CPU model on top."""

    msrs: frozenset[int]  # indices that can be read and written
    xsave_components: dict[int, tuple[int, int]]  # number → offset and size in the XSAVE image
    physical_bits: int  # width of guest-physical addresses
    has_sregs2: bool
    has_smm: bool
    has_triple_fault: bool  # KVM tells of a pending one; enabled for the VM
    has_payload: bool  # KVM leaves pending exceptions' side effects to us; enabled for the VM
    mcg_cap: int  # 0: no machine check registers

    @classmethod
    def of(cls, vm: Vm, model: CpuModel, supported_cpuid: Sequence[kvm_cpuid_entry2]) -> HostState:
        """Ask *vm*'s kernel, and turn on what has to be turned on; before the first vCPU."""
        has_mce = vm.check_extension(Cap.KVM_CAP_MCE) >= MCG_CAP & 0xFF
        return cls(
            msrs=_msrs(vm, model, has_mce),
            xsave_components=xsave_components(supported_cpuid),
            physical_bits=physical_bits(supported_cpuid),
            has_sregs2=bool(vm.check_extension(Cap.KVM_CAP_SREGS2)),
            has_smm=bool(vm.check_extension(Cap.KVM_CAP_X86_SMM)),
            has_triple_fault=_enable(vm, Cap.KVM_CAP_X86_TRIPLE_FAULT_EVENT),
            has_payload=_enable(vm, Cap.KVM_CAP_EXCEPTION_PAYLOAD),
            mcg_cap=MCG_CAP if has_mce else 0,
        )


def _msrs(vm: Vm, model: CpuModel, has_mce: bool) -> frozenset[int]:
    """Registers that KVM has, less those whose feature the guest's CPU has not."""
    listed = {*vm.kvm.msr_index_list(), *ALWAYS_THERE, *(MACHINE_CHECK_BANKS if has_mce else ())}
    return frozenset(index for index in listed if index not in FEATURE_OF or model.has(FEATURE_OF[index]))


def _enable(vm: Vm, capability: Cap) -> bool:
    """Turn *capability* on where it is offered."""
    if not vm.check_extension(capability):
        return False
    vm.enable_cap(capability, 1)
    return True
