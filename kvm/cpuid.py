"""What the guest's CPUID instruction says: a CPU model, cut down to what this KVM offers.

In    the leaves that KVM supports; a model's name; features switched on or off by name
Out   the leaves of one vCPU

    model        leaves                                                 machine.md §3
    qemu64       a fixed list, features of the model ∩ KVM's            the same on every host with those features
    host, max    everything KVM supports                                only for hosts of one kind

Both get the topology of the machine (one socket, vCPU n has APIC id n) and KVM's own leaves.  Nothing of this is in a
stream: the user sees to it that both ends show the guest the same processor.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

from qemumig.errors import MachineError

from .structs import KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2

Register = tuple[int, int, str]  # leaf, sub-leaf, register's name
Leaf = tuple[int, int, int, int]  # eax, ebx, ecx, edx


class CpuModelError(MachineError):
    """There is no such CPU model, or no such feature; the text is the diagnostic."""


_F1_ECX, _F1_EDX = (1, 0, "ecx"), (1, 0, "edx")
_F7_EBX, _F7_ECX, _F7_EDX = (7, 0, "ebx"), (7, 0, "ecx"), (7, 0, "edx")
_F7_1_EAX = (7, 1, "eax")
_F6_EAX, _FD_1_EAX = (6, 0, "eax"), (0xD, 1, "eax")
_F8_1_ECX, _F8_1_EDX = (0x80000001, 0, "ecx"), (0x80000001, 0, "edx")
_F8_7_EDX, _F8_8_EBX = (0x80000007, 0, "edx"), (0x80000008, 0, "ebx")
_F8_A_EDX, _F8_21_EAX = (0x8000000A, 0, "edx"), (0x80000021, 0, "eax")
_KVM_EAX = (0x40000001, 0, "eax")

_NAMES: dict[Register, str] = {
    # QEMU's names from bit 0 up; "-" has none.
    _F1_EDX: "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov pat pse36 pn clflush - ds acpi "
    "mmx fxsr sse sse2 ss ht tm ia64 pbe",
    _F1_ECX: "pni pclmulqdq dtes64 monitor ds-cpl vmx smx est tm2 ssse3 cid - fma cx16 xtpr pdcm - pcid dca "
    "sse4.1 sse4.2 x2apic movbe popcnt tsc-deadline aes xsave - avx f16c rdrand hypervisor",
    _F6_EAX: "- - arat",
    _F7_EBX: "fsgsbase tsc-adjust sgx bmi1 hle avx2 fdp-excptn-only smep bmi2 erms invpcid rtm - zero-fcs-fds "
    "mpx - avx512f avx512dq rdseed adx smap avx512ifma pcommit clflushopt clwb intel-pt avx512pf "
    "avx512er avx512cd sha-ni avx512bw avx512vl",
    _F7_ECX: "- avx512vbmi umip pku - waitpkg avx512vbmi2 - gfni vaes vpclmulqdq avx512vnni avx512bitalg - "
    "avx512-vpopcntdq - la57 - - - - - rdpid - bus-lock-detect cldemote - movdiri movdir64b - sgxlc "
    "pks",
    _F7_EDX: "- - avx512-4vnniw avx512-4fmaps fsrm - - - avx512-vp2intersect - md-clear - - - serialize - "
    "tsx-ldtrk - - arch-lbr - - amx-bf16 avx512-fp16 amx-tile amx-int8 spec-ctrl stibp flush-l1d "
    "arch-capabilities core-capability ssbd",
    _F7_1_EAX: "sha512 sm3 sm4 - avx-vnni avx512-bf16 - cmpccxadd - - fzrm fsrs fsrc - - - - fred lkgs wrmsrns - "
    "amx-fp16 - avx-ifma - - lam",
    _FD_1_EAX: "xsaveopt xsavec xgetbv1 xsaves xfd",
    _F8_1_ECX: "lahf-lm cmp-legacy svm extapic cr8legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop skinit "
    "wdt - lwp fma4 tce - nodeid-msr - tbm topoext perfctr-core perfctr-nb",
    _F8_1_EDX: "- - - - - - - - - - - syscall - - - - - - - - nx - mmxext - - fxsr-opt pdpe1gb rdtscp - lm 3dnowext 3dnow",
    _F8_7_EDX: "- - - - - - - - invtsc",
    _F8_8_EBX: "clzero - xsaveerptr - - - - - - wbnoinvd - - ibpb - ibrs amd-stibp - stibp-always-on - - - - - - "
    "amd-ssbd virt-ssbd amd-no-ssb - amd-psfd",
    _F8_A_EDX: "npt lbrv svm-lock nrip-save tsc-scale vmcb-clean flushbyasid decodeassists - - pause-filter - "
    "pfthreshold avic - v-vmsave-vmload vgif - - - - - - - - vnmi - - svme-addr-chk",
    _F8_21_EAX: "no-nested-data-bp - lfence-always-serializing - - - null-sel-clr-base - auto-ibrs",
    _KVM_EAX: "kvmclock kvm-nopiodelay kvm-mmu - kvm-asyncpf kvm-steal-time kvm-pv-eoi kvm-pv-unhalt - "
    "kvm-pv-tlb-flush kvm-asyncpf-vmexit kvm-pv-ipi kvm-poll-control kvm-pv-sched-yield "
    "kvm-asyncpf-int kvm-msi-ext-dest-id - - - - - - - - kvmclock-stable-bit",
}

FEATURES: dict[str, tuple[Register, int]] = {
    name: (register, 1 << bit)
    for register, names in _NAMES.items()
    for bit, name in enumerate(names.split())
    if name != "-"
}
_KVMCLOCK_NEW_MSRS = 1 << 3  # comes and goes with kvmclock

_QEMU64: dict[Register, int] = {
    _F1_EDX: 0x078BFBFD,
    _F1_ECX: 0x80202001,
    _F8_1_ECX: 0x00000001,
    _F8_1_EDX: 0x20100800,
    _KVM_EAX: 0x0100807B,
}
_QEMU64_SIGNATURE = 0x00060FB1
_QEMU64_BRAND = "QEMU Virtual CPU version 2.5+"
_QEMU64_HIGHEST, _QEMU64_HIGHEST_EXTENDED = 0xD, 0x8000000A

# Features with state that kvm/state/ does not move: no guest gets them, whatever the host has.
_NOT_MODELLED: dict[Register, tuple[str, ...]] = {
    _F1_ECX: ("vmx",),
    _F7_EBX: ("mpx", "sgx", "intel-pt"),
    _F7_ECX: ("sgxlc",),
    _F7_EDX: ("arch-lbr", "amx-tile", "amx-bf16", "amx-int8"),
    _F7_1_EAX: ("amx-fp16", "fred"),
    _FD_1_EAX: ("xfd",),
    _F8_1_ECX: ("svm", "topoext", "perfctr-core", "perfctr-nb"),
    _F8_A_EDX: tuple(name for name in _NAMES[_F8_A_EDX].split() if name != "-"),
}

# Given by the hypervisor, whatever the hardware: KVM's list may lack them.
_ALWAYS: dict[Register, int] = {_F1_ECX: 0x80200000, _KVM_EAX: 1 << 15}

_HT, _CMP_LEGACY, _INVTSC = 1 << 28, 1 << 1, 1 << 8
_XSAVE = FEATURES["xsave"][1]
_AMD_ALIASES = 0x0183F3FF  # bits of leaf 1 EDX that AMD repeats in leaf 0x80000001
_AMD_VENDORS = {b"AuthenticAMD", b"HygonGenuine"}

_KVM_SIGNATURE = 0x40000000
_KVM_LEAF: Leaf = (0x40000001, *struct.unpack("<III", b"KVMKVMKVM\0\0\0"))

# What enables each XSAVE component; x87 and SSE have no switch.
_XSAVE_COMPONENTS = {2: "avx", 5: "avx512f", 6: "avx512f", 7: "avx512f", 9: "pku"}


class CpuModel:
    """A model with its switches, resolved against what KVM supports.

    `warnings`: one line for each feature that was asked for and is not to be had.
    """

    def __init__(
        self,
        name: str,
        switches: Mapping[str, bool],
        supported: Sequence[kvm_cpuid_entry2],
        *,
        host_brand: str = "",
    ) -> None:
        """Raises CpuModelError for a name, or the name of a feature, that does not exist."""
        if name not in ("qemu64", "host", "max"):
            raise CpuModelError(f"unable to find CPU model '{name}'")
        for feature in switches:
            if feature not in FEATURES:
                raise CpuModelError(f"Property '{name}-x86_64-cpu.{feature}' not found")
        self.name = name
        self.warnings: list[str] = []
        self._supported = {
            (entry.function, entry.index): (entry.eax, entry.ebx, entry.ecx, entry.edx) for entry in supported
        }
        self._is_host = name != "qemu64"
        self._brand = host_brand if self._is_host else _QEMU64_BRAND
        self._features = {register: self._resolve(register, switches) for register in _NAMES}

    def has(self, feature: str) -> bool:
        """True when the guest sees the feature of that name."""
        register, bit = FEATURES[feature]
        return bool(self._features[register] & bit)

    @property
    def signature(self) -> int:
        """Family, model and stepping; RDX holds it after a reset."""
        return self._leaf(1)[0] if self._is_host else _QEMU64_SIGNATURE

    @property
    def vendor(self) -> bytes:
        """The host's: some instructions differ, so a guest must not be told another."""
        _, ebx, ecx, edx = self._leaf(0)
        return struct.pack("<III", ebx, edx, ecx)

    def entries(self, index: int, cpus: int) -> list[kvm_cpuid_entry2]:
        """The leaves of vCPU *index* of *cpus*, for KVM_SET_CPUID2."""
        leaves = self._host_leaves() if self._is_host else self._qemu64_leaves()
        self._add_features(leaves, cpus)
        self._add_topology(leaves, index, cpus)
        self._add_xsave(leaves)
        return [_entry(leaf, values) for leaf, values in sorted(leaves.items())]

    # -- features

    def _resolve(self, register: Register, switches: Mapping[str, bool]) -> int:
        """The feature bits of one register: the model's, as switched, as far as KVM has them."""
        offered = self._offered(register)
        wanted = self._default(register, offered)
        for feature, (where, bit) in FEATURES.items():
            if where == register and feature in switches:
                wanted = wanted | bit if switches[feature] else wanted & ~bit
        self._warn(register, wanted & ~offered, switches)
        bits = wanted & offered
        if register == _KVM_EAX:
            bits = bits | _KVMCLOCK_NEW_MSRS if bits & 1 else bits & ~_KVMCLOCK_NEW_MSRS
        return bits

    def _offered(self, register: Register) -> int:
        leaf, index, name = register
        values = self._leaf(leaf, index)
        bits = values[("eax", "ebx", "ecx", "edx").index(name)] | _ALWAYS.get(register, 0)
        return bits & ~sum(FEATURES[name][1] for name in _NOT_MODELLED.get(register, ()))

    def _default(self, register: Register, offered: int) -> int:
        if not self._is_host:
            return _QEMU64.get(register, 0)
        return offered & ~(_INVTSC if register == _F8_7_EDX else 0)  # which would bar migration

    def _warn(self, register: Register, missing: int, switches: Mapping[str, bool]) -> None:
        leaf, _, name = register
        for feature, (where, bit) in FEATURES.items():
            if where == register and missing & bit:
                self.warnings.append(
                    f"host doesn't support requested feature: CPUID.{leaf:02X}H:{name.upper()}.{feature} "
                    f"[bit {bit.bit_length() - 1}]"
                )

    # -- leaves

    def _leaf(self, function: int, index: int = 0) -> Leaf:
        return self._supported.get((function, index), (0, 0, 0, 0))

    @property
    def _is_amd(self) -> bool:
        return self.vendor in _AMD_VENDORS

    def _qemu64_leaves(self) -> dict[tuple[int, int], Leaf]:
        _, ebx, ecx, edx = self._leaf(0)
        caches = [(0, 0, 0, 0)]
        if not self._is_amd:
            caches = [
                (0x04000121, 0x01C0003F, 0x3F, 1),
                (0x04000122, 0x01C0003F, 0x3F, 1),
                (0x04000143, 0x03C0003F, 0xFFF, 1),
                (0x04004163, 0x03C0003F, 0x3FFF, 6),
            ]
        return {
            (0, 0): (_QEMU64_HIGHEST, ebx, ecx, edx),
            (1, 0): (_QEMU64_SIGNATURE, 0x800, 0, 0),
            (2, 0): (0, 0, 0, 0) if self._is_amd else (1, 0, 0x4D, 0x002C307D),
            **{(4, index): cache for index, cache in enumerate(caches)},
            (5, 0): (0, 0, 3, 0),
            (7, 0): (0, 0, 0, 0),
            **self._kvm_leaves(),
            (0x80000000, 0): (_QEMU64_HIGHEST_EXTENDED, ebx, ecx, edx),
            **self._brand_leaves(),
            (0x80000001, 0): (_QEMU64_SIGNATURE, 0, 0, 0),
            (0x80000005, 0): (0x01FF01FF, 0x01FF01FF, 0x40020140, 0x40020140),
            (0x80000006, 0): (0, 0x42004200, 0x02008140, 0x00808140),
            (0x80000008, 0): (self._leaf(0x80000008)[0], 0, 0, 0),
        }

    def _host_leaves(self) -> dict[tuple[int, int], Leaf]:
        # Counters, enclaves, traces, tiles, nesting; and the host's own topology.
        unmodelled = (0xA, 0x12, 0x14, 0x1C, 0x1D, 0x1E, 0x1F, 0x8000000A, 0x8000001D, 0x8000001E)
        leaves = {key: values for key, values in self._supported.items() if key[0] not in unmodelled}
        return {**leaves, **self._kvm_leaves(), **self._brand_leaves()}

    def _kvm_leaves(self) -> dict[tuple[int, int], Leaf]:
        return {(_KVM_SIGNATURE, 0): _KVM_LEAF, (_KVM_SIGNATURE + 1, 0): (0, 0, 0, 0)}

    def _brand_leaves(self) -> dict[tuple[int, int], Leaf]:
        """The name of the processor, 48 bytes; leaves that would be all zero are left out."""
        text = self._brand.encode("ascii", "replace")[:47].ljust(48, b"\0")
        words = [struct.unpack_from("<IIII", text, 16 * part) for part in range(3)]
        return {(0x80000002 + part, 0): leaf for part, leaf in enumerate(words) if any(leaf)}

    def _add_features(self, leaves: dict[tuple[int, int], Leaf], cpus: int) -> None:
        for (leaf, index, name), bits in self._features.items():
            if (leaf, index) in leaves or bits:
                _put(leaves, leaf, index, name, bits)
        if not self._is_host and self._is_amd:
            aliases = self._features[_F1_EDX] & _AMD_ALIASES
            _put(leaves, 0x80000001, 0, "edx", self._features[_F8_1_EDX] | aliases)
        several = cpus > 1
        _put(leaves, 1, 0, "edx", leaves[1, 0][3] & ~_HT | (_HT if several else 0))
        ecx = leaves[0x80000001, 0][2] & ~_CMP_LEGACY
        _put(leaves, 0x80000001, 0, "ecx", ecx | (_CMP_LEGACY if several and self._is_amd else 0))

    def _add_topology(self, leaves: dict[tuple[int, int], Leaf], index: int, cpus: int) -> None:
        """One socket of *cpus* cores; APIC ids count from 0."""
        id_bits = (cpus - 1).bit_length()
        count = cpus if cpus > 1 else 0
        _put(leaves, 1, 0, "ebx", index << 24 | (count & 0xFF) << 16 | leaves[1, 0][1] & 0xFF00)
        leaves[0xB, 0] = (0, 1, 0x100, index)
        leaves[0xB, 1] = (id_bits, cpus, 0x201, index)
        leaves[0xB, 2] = (0, 0, 2, index)
        _put(leaves, 0x80000008, 0, "ecx", id_bits << 12 | cpus - 1 if cpus > 1 else 0)
        for level in range(4):
            if (4, level) in leaves and leaves[4, level][0] & 0x1F:
                eax = leaves[4, level][0] & 0x3FFF | (cpus - 1) << 26 | ((cpus - 1) << 14 if level == 3 else 0)
                _put(leaves, 4, level, "eax", eax)

    def _add_xsave(self, leaves: dict[tuple[int, int], Leaf]) -> None:
        """Leaf 0xD, as far as the features need it: which components there are, and where they lie."""
        instructions = self._features[_FD_1_EAX]
        for key in [key for key in leaves if key[0] == 0xD]:
            del leaves[key]
        if not self._features[_F1_ECX] & _XSAVE:
            return
        eax, ebx, ecx, edx = self._leaf(0xD)
        shown = {part for part, feature in _XSAVE_COMPONENTS.items() if self.has(feature) and eax >> part & 1}
        leaves[0xD, 0] = (3 | sum(1 << part for part in shown), ebx, ecx, edx)
        leaves[0xD, 1] = (instructions, *self._leaf(0xD, 1)[1:])
        for part in shown:
            leaves[0xD, part] = self._leaf(0xD, part)


def host_brand() -> str:
    """The processor's name as the host's kernel prints it; empty when it does not."""
    with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
        for line in file:
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return ""


def physical_bits(supported: Sequence[kvm_cpuid_entry2]) -> int:
    """Width of guest-physical addresses; 36 when the host does not say."""
    for entry in supported:
        if entry.function == 0x80000008 and entry.eax & 0xFF:
            return entry.eax & 0xFF
    return 36


def xsave_components(supported: Sequence[kvm_cpuid_entry2]) -> dict[int, tuple[int, int]]:
    """Offset and size in bytes of each extended component in an XSAVE image, by its number (leaf 0xD)."""
    return {
        entry.index: (entry.ebx, entry.eax)
        for entry in supported
        if entry.function == 0xD and entry.index >= 2 and entry.eax and not entry.ecx & 1
    }


def _put(leaves: dict[tuple[int, int], Leaf], leaf: int, index: int, name: str, value: int) -> None:
    values = list(leaves.get((leaf, index), (0, 0, 0, 0)))
    values[("eax", "ebx", "ecx", "edx").index(name)] = value
    leaves[leaf, index] = (values[0], values[1], values[2], values[3])


_WITH_SUBLEAVES = {4, 7, 0xB, 0xD, 0xF, 0x10, 0x12, 0x14, 0x17, 0x18, 0x1D, 0x8000001D}


def _entry(leaf: tuple[int, int], values: Leaf) -> kvm_cpuid_entry2:
    flags = KVM_CPUID_FLAG_SIGNIFCANT_INDEX if leaf[0] in _WITH_SUBLEAVES else 0
    eax, ebx, ecx, edx = values
    return kvm_cpuid_entry2(leaf[0], leaf[1], flags, eax, ebx, ecx, edx)
