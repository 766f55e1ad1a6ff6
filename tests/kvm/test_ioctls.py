import errno

import pytest

from kvm import KvmError, ioctls
from kvm.ioctls import Cap, Request, call

# What the kernel's headers say for x86-64.
NUMBERS = {
    "KVM_GET_API_VERSION": 0xAE00,
    "KVM_CREATE_VM": 0xAE01,
    "KVM_GET_MSR_INDEX_LIST": 0xC004AE02,
    "KVM_CHECK_EXTENSION": 0xAE03,
    "KVM_GET_VCPU_MMAP_SIZE": 0xAE04,
    "KVM_GET_SUPPORTED_CPUID": 0xC008AE05,
    "KVM_GET_MSR_FEATURE_INDEX_LIST": 0xC004AE0A,
    "KVM_CREATE_VCPU": 0xAE41,
    "KVM_GET_DIRTY_LOG": 0x4010AE42,
    "KVM_SET_USER_MEMORY_REGION": 0x4020AE46,
    "KVM_SET_TSS_ADDR": 0xAE47,
    "KVM_SET_IDENTITY_MAP_ADDR": 0x4008AE48,
    "KVM_CREATE_IRQCHIP": 0xAE60,
    "KVM_IRQ_LINE": 0x4008AE61,
    "KVM_GET_IRQCHIP": 0xC208AE62,
    "KVM_SET_IRQCHIP": 0x8208AE63,
    "KVM_SET_GSI_ROUTING": 0x4008AE6A,
    "KVM_IRQFD": 0x4020AE76,
    "KVM_CREATE_PIT2": 0x4040AE77,
    "KVM_IOEVENTFD": 0x4040AE79,
    "KVM_SET_CLOCK": 0x4030AE7B,
    "KVM_GET_CLOCK": 0x8030AE7C,
    "KVM_GET_PIT2": 0x8070AE9F,
    "KVM_SET_PIT2": 0x4070AEA0,
    "KVM_ENABLE_CAP": 0x4068AEA3,
    "KVM_SIGNAL_MSI": 0x4020AEA5,
    "KVM_CLEAR_DIRTY_LOG": 0xC018AEC0,
    "KVM_RUN": 0xAE80,
    "KVM_GET_REGS": 0x8090AE81,
    "KVM_SET_REGS": 0x4090AE82,
    "KVM_GET_SREGS": 0x8138AE83,
    "KVM_SET_SREGS": 0x4138AE84,
    "KVM_INTERRUPT": 0x4004AE86,
    "KVM_GET_MSRS": 0xC008AE88,
    "KVM_SET_MSRS": 0x4008AE89,
    "KVM_GET_FPU": 0x81A0AE8C,
    "KVM_SET_FPU": 0x41A0AE8D,
    "KVM_GET_LAPIC": 0x8400AE8E,
    "KVM_SET_LAPIC": 0x4400AE8F,
    "KVM_SET_CPUID2": 0x4008AE90,
    "KVM_GET_CPUID2": 0xC008AE91,
    "KVM_GET_MP_STATE": 0x8004AE98,
    "KVM_SET_MP_STATE": 0x4004AE99,
    "KVM_NMI": 0xAE9A,
    "KVM_X86_SETUP_MCE": 0x4008AE9C,
    "KVM_X86_GET_MCE_CAP_SUPPORTED": 0x8008AE9D,
    "KVM_GET_VCPU_EVENTS": 0x8040AE9F,
    "KVM_SET_VCPU_EVENTS": 0x4040AEA0,
    "KVM_GET_DEBUGREGS": 0x8080AEA1,
    "KVM_SET_DEBUGREGS": 0x4080AEA2,
    "KVM_SET_TSC_KHZ": 0xAEA2,
    "KVM_GET_TSC_KHZ": 0xAEA3,
    "KVM_GET_XSAVE": 0x9000AEA4,
    "KVM_SET_XSAVE": 0x5000AEA5,
    "KVM_GET_XCRS": 0x8188AEA6,
    "KVM_SET_XCRS": 0x4188AEA7,
    "KVM_KVMCLOCK_CTRL": 0xAEAD,
    "KVM_GET_SREGS2": 0x8140AECC,
    "KVM_SET_SREGS2": 0x4140AECD,
    "KVM_GET_XSAVE2": 0x9000AECF,
}


def requests() -> dict[str, Request]:
    return {name: value for name, value in vars(ioctls).items() if isinstance(value, Request)}


@pytest.mark.parametrize(("name", "number"), NUMBERS.items())
def test_number_follows_from_the_structure(name: str, number: int) -> None:
    assert requests()[name] == number


def test_every_request_is_pinned_and_knows_its_name() -> None:
    assert set(requests()) == set(NUMBERS)
    assert all(request.name == name for name, request in requests().items())


def test_request_shows_name_and_number() -> None:
    assert repr(ioctls.KVM_RUN) == "KVM_RUN (0xae80)"


def test_refusal_names_request_and_object() -> None:
    with pytest.raises(KvmError) as caught:
        call(-1, ioctls.KVM_GET_DIRTY_LOG, 0, " (slot 7)")
    assert str(caught.value) == "[Errno 9] KVM_GET_DIRTY_LOG (slot 7): Bad file descriptor"
    assert caught.value.errno == errno.EBADF


def test_error_is_an_os_error_with_its_parts() -> None:
    error = KvmError(errno.ENOENT, "KVM_GET_DIRTY_LOG (slot 7)")
    assert isinstance(error, OSError)
    assert (error.errno, error.strerror) == (2, "No such file or directory")
    assert error.what == "KVM_GET_DIRTY_LOG (slot 7)"


def test_capabilities_have_the_kernels_numbers() -> None:
    assert Cap.KVM_CAP_IMMEDIATE_EXIT == 136
    assert Cap.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 == 168
    assert Cap.KVM_CAP_XSAVE2 == 208
