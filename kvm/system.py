"""/dev/kvm: what this host's KVM can do, and new VMs."""

from __future__ import annotations

import errno
import os
from ctypes import byref, c_uint32
from typing import TYPE_CHECKING

from . import ioctls
from .errors import KvmError
from .ioctls import Cap, Request, call
from .structs import kvm_cpuid2, kvm_cpuid_entry2, kvm_msr_list, with_array

if TYPE_CHECKING:
    from .vm import Vm

API_VERSION = 12  # the only one there ever was
MAX_CPUID_ENTRIES = 256  # the kernel refuses more

_ADVICE = {
    errno.ENOENT: "load the module kvm_intel or kvm_amd, or turn virtualisation on in the firmware",
    errno.ENODEV: "load the module kvm_intel or kvm_amd, or turn virtualisation on in the firmware",
    errno.EACCES: "join the group that owns it, usually kvm, or run as root",
    errno.EPERM: "let this container or sandbox use the device",
}


class Kvm:
    """The KVM device, open; a context manager."""

    def __init__(self, path: str = "/dev/kvm") -> None:
        """Raises KvmError that names *path* and what may be done about it."""
        self.path = path
        self.fd = -1
        try:
            self.fd = os.open(path, os.O_RDWR)
        except OSError as error:
            advice = _ADVICE.get(error.errno or 0)
            raise KvmError(error.errno or 0, f"open {path}" + (f" ({advice})" if advice else "")) from error
        self.api_version = self._checked_api_version()
        self.vcpu_mmap_size = call(self.fd, ioctls.KVM_GET_VCPU_MMAP_SIZE)  # bytes

    def _checked_api_version(self) -> int:
        try:
            version = call(self.fd, ioctls.KVM_GET_API_VERSION)
            if version != API_VERSION:
                what = f"KVM_GET_API_VERSION ({self.path} speaks version {version}, expected {API_VERSION})"
                raise KvmError(errno.EPROTONOSUPPORT, what)
        except KvmError:
            self.close()
            raise
        return version

    def check_extension(self, capability: Cap) -> int:
        """0 when the host lacks *capability*, else 1 or the value that its documentation names."""
        return call(self.fd, ioctls.KVM_CHECK_EXTENSION, capability, f" ({capability.name})")

    def msr_index_list(self) -> list[int]:
        """MSRs that make up a vCPU's state here."""
        return self._msr_indices(ioctls.KVM_GET_MSR_INDEX_LIST)

    def msr_feature_index_list(self) -> list[int]:
        """MSRs that describe features of the host."""
        return self._msr_indices(ioctls.KVM_GET_MSR_FEATURE_INDEX_LIST)

    def _msr_indices(self, request: Request) -> list[int]:
        head = kvm_msr_list(nmsrs=0)
        try:
            call(self.fd, request, byref(head))
        except KvmError as error:
            if error.errno != errno.E2BIG:  # which comes with the number of them
                raise
        whole = with_array(kvm_msr_list, "indices", c_uint32, head.nmsrs)(nmsrs=head.nmsrs)
        call(self.fd, request, byref(whole))
        return list(whole.indices[: whole.nmsrs])

    def supported_cpuid(self) -> list[kvm_cpuid_entry2]:
        """CPUID leaves with every feature that this KVM can give a guest."""
        return read_cpuid(self.fd, ioctls.KVM_GET_SUPPORTED_CPUID)

    def create_vm(self) -> Vm:
        """A new VM without memory and vCPUs."""
        from .vm import Vm

        return Vm(self)

    def close(self) -> None:
        """Close the device; its VMs live on.  Twice is allowed."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Kvm:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_cpuid(fd: int, request: Request, what: str = "") -> list[kvm_cpuid_entry2]:
    """The entries that *request* fills in; each is a copy of its own."""
    table = with_array(kvm_cpuid2, "entries", kvm_cpuid_entry2, MAX_CPUID_ENTRIES)(nent=MAX_CPUID_ENTRIES)
    call(fd, request, byref(table), what)
    return [kvm_cpuid_entry2.from_buffer_copy(entry) for entry in table.entries[: table.nent]]
