from __future__ import annotations

import struct

import pytest

from kvm.cpuid import FEATURES, CpuModel, CpuModelError, host_brand, physical_bits, xsave_components
from kvm.structs import kvm_cpuid_entry2
from kvm.system import Kvm

Leaves = dict[tuple[int, int], tuple[int, int, int, int]]

# What a real qemu64,pni=off shows one vCPU on an AMD host, the same but for topology on every number of vCPUs.
AMD = {
    (0, 0): (0xD, 0x68747541, 0x444D4163, 0x69746E65),
    (1, 0): (0x60FB1, 0x800, 0x80202000, 0x78BFBFD),
    (2, 0): (0, 0, 0, 0),
    (4, 0): (0, 0, 0, 0),
    (5, 0): (0, 0, 3, 0),
    (7, 0): (0, 0, 0, 0),
    (0xB, 0): (0, 1, 0x100, 0),
    (0xB, 1): (0, 1, 0x201, 0),
    (0xB, 2): (0, 0, 2, 0),
    (0x40000000, 0): (0x40000001, 0x4B4D564B, 0x564B4D56, 0x4D),
    (0x40000001, 0): (0x100807B, 0, 0, 0),
    (0x80000000, 0): (0x8000000A, 0x68747541, 0x444D4163, 0x69746E65),
    (0x80000001, 0): (0x60FB1, 0, 1, 0x2193FBFD),
    (0x80000002, 0): (0x554D4551, 0x72695620, 0x6C617574, 0x55504320),
    (0x80000003, 0): (0x72657620, 0x6E6F6973, 0x352E3220, 0x2B),
    (0x80000005, 0): (0x1FF01FF, 0x1FF01FF, 0x40020140, 0x40020140),
    (0x80000006, 0): (0, 0x42004200, 0x2008140, 0x808140),
    (0x80000008, 0): (0x3030, 0, 0, 0),
}


def entry(leaf: int, index: int, eax: int = 0, ebx: int = 0, ecx: int = 0, edx: int = 0) -> kvm_cpuid_entry2:
    return kvm_cpuid_entry2(leaf, index, 0, eax, ebx, ecx, edx)


def supported(vendor: bytes, *, address_bits: int = 0x30, lacking: int = 1) -> list[kvm_cpuid_entry2]:
    """A KVM that offers everything but the features of leaf 1 ECX in *lacking*."""
    ebx, edx, ecx = struct.unpack("<III", vendor)
    everything = 0xFFFFFFFF
    return [
        entry(0, 0, 0x1F, ebx, ecx, edx),
        entry(1, 0, 0xA10F11, 0x12345678, everything & ~lacking & ~(1 << 31), everything),
        entry(7, 0, 1, everything, everything, everything),
        entry(7, 1, everything),
        entry(0xA, 0, 0x07300404),
        entry(0xB, 0, 1, 2, 3, 4),
        entry(0xD, 0, 0xE7, 0x980, 0x980),
        entry(0xD, 1, 0x1F),
        entry(0xD, 2, 256, 576),
        entry(0xD, 5, 64, 832),
        entry(0xD, 11, 16, 0, 1),
        entry(0x40000001, 0, 0x01007EFB),
        entry(0x80000000, 0, 0x80000021, ebx, ecx, edx),
        entry(0x80000001, 0, 0xA10F11, 0, everything, everything),
        entry(0x80000007, 0, 0, 0, 0, 0x100),
        entry(0x80000008, 0, 0x3000 | address_bits, 0, 0x7001),
    ]


def leaves(model: CpuModel, index: int = 0, cpus: int = 1) -> Leaves:
    return {(one.function, one.index): (one.eax, one.ebx, one.ecx, one.edx) for one in model.entries(index, cpus)}


def test_qemu64_shows_what_the_real_one_shows_on_amd() -> None:
    model = CpuModel("qemu64", {"pni": False}, supported(b"AuthenticAMD"))
    assert leaves(model) == AMD
    assert model.warnings == []
    assert model.signature == 0x60FB1


@pytest.mark.parametrize(("cpus", "id_bits"), [(2, 1), (4, 2)])
def test_several_vcpus_show_as_cores_of_one_socket_on_amd(cpus: int, id_bits: int) -> None:
    model = CpuModel("qemu64", {"pni": False}, supported(b"AuthenticAMD"))
    for index in range(cpus):
        assert leaves(model, index, cpus) == AMD | {
            (1, 0): (0x60FB1, index << 24 | cpus << 16 | 0x800, 0x80202000, 0x178BFBFD),
            (0xB, 0): (0, 1, 0x100, index),
            (0xB, 1): (id_bits, cpus, 0x201, index),
            (0xB, 2): (0, 0, 2, index),
            (0x80000001, 0): (0x60FB1, 0, 3, 0x2193FBFD),
            (0x80000008, 0): (0x3030, 0, id_bits << 12 | cpus - 1, 0),
        }


def test_qemu64_shows_what_the_real_one_shows_on_intel() -> None:
    shown = leaves(CpuModel("qemu64", {"pni": False}, supported(b"GenuineIntel", address_bits=0x2E)), 1, 2)
    assert shown[0, 0] == (0xD, 0x756E6547, 0x6C65746E, 0x49656E69)
    assert shown[1, 0] == (0x60FB1, 0x01020800, 0x80202000, 0x178BFBFD)
    assert shown[2, 0] == (1, 0, 0x4D, 0x2C307D)
    assert shown[4, 0] == (0x04000121, 0x01C0003F, 0x3F, 1)
    assert shown[4, 3] == (0x04004163, 0x03C0003F, 0x3FFF, 6)
    assert shown[0x80000001, 0] == (0x60FB1, 0, 1, 0x20100800)
    assert shown[0x80000008, 0] == (0x302E, 0, 0x1001, 0)


def test_a_feature_that_kvm_lacks_is_left_out_with_a_warning() -> None:
    model = CpuModel("qemu64", {}, supported(b"AuthenticAMD"))
    assert model.warnings == ["host doesn't support requested feature: CPUID.01H:ECX.pni [bit 0]"]
    assert not model.has("pni")


def test_switches_turn_features_on_and_off() -> None:
    model = CpuModel("qemu64", {"pni": True, "sse4.2": True, "nx": False}, supported(b"AuthenticAMD", lacking=0))
    assert (model.has("pni"), model.has("sse4.2"), model.has("nx")) == (True, True, False)
    shown = leaves(model)
    assert shown[1, 0][2] == 0x80202001 | 1 << 20
    assert not shown[0x80000001, 0][3] & 1 << 20


def test_xsave_brings_its_leaf_with_the_components_of_the_features_alone() -> None:
    plain = leaves(CpuModel("qemu64", {}, supported(b"AuthenticAMD")))
    assert not [key for key in plain if key[0] == 0xD]
    shown = leaves(CpuModel("qemu64", {"xsave": True, "avx": True}, supported(b"AuthenticAMD")))
    assert shown[0xD, 0][0] == 7
    assert shown[0xD, 2] == (256, 576, 0, 0)
    assert (0xD, 5) not in shown


def test_without_kvmclock_neither_of_its_bits_is_shown() -> None:
    model = CpuModel("qemu64", {"kvmclock": False}, supported(b"AuthenticAMD"))
    assert leaves(model)[0x40000001, 0][0] & 0b1001 == 0


def test_host_shows_what_kvm_has_less_what_could_not_be_migrated() -> None:
    model = CpuModel("host", {}, supported(b"AuthenticAMD"), host_brand="Some Processor 9000")
    shown = leaves(model)
    assert shown[0, 0][0] == 0x1F and model.signature == 0xA10F11
    assert (0xA, 0) not in shown
    for feature in ("vmx", "svm", "sgx", "intel-pt", "arch-lbr", "amx-tile", "invtsc", "topoext", "mpx", "npt"):
        assert not model.has(feature), feature
    for feature in ("avx512f", "avx2", "tsc-deadline", "kvm-pv-eoi"):
        assert model.has(feature), feature
    brand = b"".join(struct.pack("<4I", *shown[0x80000002 + part, 0]) for part in (0, 1))
    assert brand.rstrip(b"\0") == b"Some Processor 9000"


@pytest.mark.parametrize("name", ["foo", "", "qemu32", "Host"])
def test_an_unknown_model_is_refused(name: str) -> None:
    with pytest.raises(CpuModelError) as caught:
        CpuModel(name, {}, supported(b"AuthenticAMD"))
    assert str(caught.value) == f"unable to find CPU model '{name}'"


def test_an_unknown_feature_is_refused() -> None:
    with pytest.raises(CpuModelError) as caught:
        CpuModel("qemu64", {"foo": False}, supported(b"AuthenticAMD"))
    assert str(caught.value) == "Property 'qemu64-x86_64-cpu.foo' not found"


def test_feature_names_stand_at_the_bits_of_the_manuals() -> None:
    places = {name: (register[0], register[2], bit.bit_length() - 1) for name, (register, bit) in FEATURES.items()}
    assert places["sse2"] == (1, "edx", 26)
    assert places["x2apic"] == (1, "ecx", 21)
    assert places["avx512vl"] == (7, "ebx", 31)
    assert places["rdpid"] == (7, "ecx", 22)
    assert places["ssbd"] == (7, "edx", 31)
    assert places["lm"] == (0x80000001, "edx", 29)
    assert places["topoext"] == (0x80000001, "ecx", 22)
    assert places["kvmclock-stable-bit"] == (0x40000001, "eax", 24)


def test_widths_and_places_come_from_the_leaves() -> None:
    entries = supported(b"AuthenticAMD")
    assert physical_bits(entries) == 48
    assert physical_bits([]) == 36
    assert xsave_components(entries) == {2: (576, 256), 5: (832, 64)}


@pytest.mark.needs("kvm")
@pytest.mark.parametrize("name", ["qemu64", "host", "max"])
def test_kvm_takes_the_leaves_and_gives_them_back(name: str) -> None:
    with Kvm() as kvm, kvm.create_vm() as vm:
        model = CpuModel(name, {}, kvm.supported_cpuid(), host_brand=host_brand())
        vcpu = vm.create_vcpu(0)
        vcpu.set_cpuid(model.entries(0, 2))
        shown = {(one.function, one.index): one for one in vcpu.get_cpuid()}
        assert shown[1, 0].eax == model.signature
        assert shown[1, 0].ebx >> 16 == 2
