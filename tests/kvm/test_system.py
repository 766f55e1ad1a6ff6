import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from kvm import Kvm, KvmError
from kvm.ioctls import Cap

from .machines import needs_kvm


def test_missing_device_is_named_with_advice(tmp_path: Path) -> None:
    path = str(tmp_path / "kvm")
    with pytest.raises(KvmError) as caught:
        Kvm(path)
    assert caught.value.errno == errno.ENOENT
    assert path in str(caught.value)
    assert "load the module" in str(caught.value)


def test_forbidden_device_is_named_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, flags: int) -> int:  # root, too, is to see it
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(KvmError, match=r"open /dev/kvm \(join the group .*\): Permission denied"):
        Kvm()


def test_other_device_is_refused_and_closed() -> None:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(KvmError, match="KVM_GET_API_VERSION: Inappropriate ioctl"):
        Kvm("/dev/null")
    assert os.listdir("/proc/self/fd") == before


@needs_kvm
def test_device_tells_version_and_run_size() -> None:
    with Kvm() as kvm:
        assert kvm.api_version == 12
        assert kvm.vcpu_mmap_size >= 4096


@needs_kvm
def test_capabilities_are_asked_for() -> None:
    with Kvm() as kvm:
        assert kvm.check_extension(Cap.KVM_CAP_USER_MEMORY) == 1
        assert kvm.check_extension(Cap.KVM_CAP_NR_MEMSLOTS) > 4
        assert kvm.check_extension(Cap.KVM_CAP_IMMEDIATE_EXIT) == 1


@needs_kvm
def test_msr_lists_hold_what_every_vcpu_has() -> None:
    with Kvm() as kvm:
        indices = kvm.msr_index_list()
        assert {0x10, 0x174, 0xC0000081} <= set(indices)
        assert len(indices) == len(set(indices))
        assert isinstance(kvm.msr_feature_index_list(), list)


@needs_kvm
def test_supported_cpuid_entries_are_copies() -> None:
    with Kvm() as kvm:
        entries = kvm.supported_cpuid()
    first = next(entry for entry in entries if entry.function == 1)
    assert first.edx & 1  # FPU
    others = [entry.eax for entry in entries if entry is not first]
    first.eax ^= 0xFFFFFFFF
    assert [entry.eax for entry in entries if entry is not first] == others


@needs_kvm
def test_closing_twice_is_allowed() -> None:
    kvm = Kvm()
    kvm.close()
    kvm.close()


@needs_kvm
@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("KVM_CHECK_EXTENSION (KVM_CAP_IRQCHIP)", lambda kvm: kvm.check_extension(Cap.KVM_CAP_IRQCHIP)),
        ("KVM_GET_MSR_INDEX_LIST", Kvm.msr_index_list),
        ("KVM_GET_MSR_FEATURE_INDEX_LIST", Kvm.msr_feature_index_list),
        ("KVM_GET_SUPPORTED_CPUID", Kvm.supported_cpuid),
        ("KVM_CREATE_VM", Kvm.create_vm),
    ],
)
def test_dead_descriptor_names_the_request(name: str, use: Callable[[Kvm], object]) -> None:
    kvm = Kvm()
    kvm.close()
    with pytest.raises(KvmError) as caught:
        use(kvm)
    assert str(caught.value) == f"[Errno 9] {name}: Bad file descriptor"
