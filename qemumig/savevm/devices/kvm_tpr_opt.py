"""`kvm-tpr-opt`: a helper for 32-bit guests that write their task priority often (machine.md §4); version 1.

All zero unless such a guest uses the patching ROM; sent for the sake of receivers that expect it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..fields import struct, uint32, unused
from ..vmstate import VMState


@dataclass
class Handlers:
    """Addresses of the routines that guest code is patched to call."""

    set_tpr: int = 0
    set_tpr_eax: int = 0
    get_tpr: list[int] = field(default_factory=lambda: [0] * 8)
    get_tpr_stack: int = 0


@dataclass
class GuestRom:
    """The table that was copied from the option ROM."""

    vaddr: int = 0
    fixup_start: int = 0
    fixup_end: int = 0
    vapic_vaddr: int = 0
    vapic_size: int = 0
    vcpu_shift: int = 0
    real_tpr_addr: int = 0
    up: Handlers = field(default_factory=Handlers)
    mp: Handlers = field(default_factory=Handlers)


@dataclass
class KvmTprOptState:
    """The state of the helper, and where its table lies in the guest."""

    rom_state: GuestRom = field(default_factory=GuestRom)
    state: int = 0
    real_tpr_addr: int = 0
    rom_state_vaddr: int = 0
    vapic_paddr: int = 0
    rom_state_paddr: int = 0


_HANDLERS = VMState(
    "kvmvapic-handlers",
    1,
    (uint32("set_tpr"), uint32("set_tpr_eax"), uint32("get_tpr", count=8), uint32("get_tpr_stack")),
    record=Handlers,
)

_GUEST_ROM = VMState(
    "kvmvapic-guest-rom",
    1,
    (
        unused(8),  # the ROM's signature
        uint32("vaddr"),
        uint32("fixup_start"),
        uint32("fixup_end"),
        uint32("vapic_vaddr"),
        uint32("vapic_size"),
        uint32("vcpu_shift"),
        uint32("real_tpr_addr"),
        struct("up", _HANDLERS),
        struct("mp", _HANDLERS),
    ),
    record=GuestRom,
)

KVM_TPR_OPT = VMState(
    "kvm-tpr-opt",
    1,
    (
        struct("rom_state", _GUEST_ROM),
        uint32("state"),
        uint32("real_tpr_addr"),
        uint32("rom_state_vaddr"),
        uint32("vapic_paddr"),
        uint32("rom_state_paddr"),
    ),
    record=KvmTprOptState,
)
