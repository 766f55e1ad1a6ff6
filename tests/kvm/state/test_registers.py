from __future__ import annotations

import pytest

from kvm.state.registers import (
    debugregs_of,
    put_sregs,
    regs_of,
    take_debugregs,
    take_regs,
    take_sregs,
)
from kvm.structs import kvm_debugregs, kvm_regs, kvm_segment, kvm_sregs, kvm_sregs2
from qemumig.savevm.devices.cpu_state import CpuState, Segment

LONG_MODE = {"cr0": 0x80010033, "cr2": 0x77000, "cr3": 0x10000, "cr4": 0x40620, "efer": 0xD01}
ORDER = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15")


def in_long_mode() -> CpuState:
    return CpuState(
        regs=[0x1111111111111111 * number for number in range(16)],
        eip=0xF09FA,
        eflags=0x202,
        segs=[
            Segment(0x10, 0, 0xFFFFFFFF, 0x00C09300),
            Segment(0x2B, 0, 0xFFFFFFFF, 0x00A0FB00),
            Segment(0x23, 0, 0xFFFFFFFF, 0x00C0F300),
            Segment(0x10, 0, 0xFFFFFFFF, 0x00C09300),
            Segment(0x10, 0x1000, 0xFFFFFFFF, 0x00D09300),
            Segment(0, 0xF0000, 0, 0x00000000),
        ],
        ldt=Segment(0, 0, 0xFFFF, 0x8200),
        tr=Segment(0x30, 0x2400, 0xE8, 0x8B00),
        gdt=Segment(0, 0x2000, 0x12F, 0),
        idt=Segment(0, 0x4000, 0x40F, 0),
        **LONG_MODE,
    )


def test_general_registers_keep_the_order_of_the_wire() -> None:
    regs = kvm_regs(rip=99, rflags=2, **{name: number for number, name in enumerate(ORDER)})
    cpu = CpuState()
    take_regs(cpu, regs)
    assert (cpu.regs, cpu.eip, cpu.eflags) == (list(range(16)), 99, 2)
    assert bytes(regs_of(cpu)) == bytes(regs)


@pytest.mark.parametrize("kind", [kvm_sregs, kvm_sregs2])
def test_special_registers_come_out_as_they_went_in(kind: type) -> None:
    cpu, again, sregs = in_long_mode(), CpuState(), kind(cr8=3, apic_base=0xFEE00900)
    put_sregs(cpu, sregs)
    take_sregs(again, sregs)
    again.regs, again.eip, again.eflags = cpu.regs, cpu.eip, cpu.eflags
    assert again == cpu
    assert (sregs.cr8, sregs.apic_base) == (3, 0xFEE00900)


def test_attributes_are_the_bits_of_a_descriptor() -> None:
    sregs = kvm_sregs(cr0=1)
    sregs.cs = kvm_segment(0xF0000, 0xFFFFFFFF, 0x2B, 11, 1, 3, 0, 1, 1, 1, 0)
    sregs.es = kvm_segment(0, 0, 0, 1, 1, 0, 1, 0, 0, 0, 1, 1)
    cpu = CpuState()
    take_sregs(cpu, sregs)
    assert cpu.segs[1] == Segment(0x2B, 0xF0000, 0xFFFFFFFF, 0x00A0FB00)
    assert cpu.segs[0].flags == 0x00500100  # unusable: not present, all else kept


def test_a_segment_that_is_not_present_is_loaded_as_unusable() -> None:
    sregs = kvm_sregs()
    put_sregs(in_long_mode(), sregs)
    assert (sregs.gs.present, sregs.gs.unusable, sregs.fs.present, sregs.fs.unusable) == (0, 1, 1, 0)


def test_real_mode_has_no_privilege_levels_on_either_side() -> None:
    cpu, sregs = CpuState(), kvm_sregs()
    cpu.segs[1].flags |= 3 << 13
    put_sregs(cpu, sregs)
    assert sregs.cs.dpl == 0
    sregs.cs.dpl = 3
    take_sregs(cpu, sregs)
    assert cpu.segs[1].flags == 0x9B00


def test_virtual_8086_mode_has_fixed_attributes() -> None:
    cpu, sregs = in_long_mode(), kvm_sregs()
    cpu.eflags |= 1 << 17
    put_sregs(cpu, sregs)
    for name in ("cs", "ds", "gs"):
        segment = getattr(sregs, name)
        assert (segment.type, segment.s, segment.dpl, segment.present, segment.unusable) == (3, 1, 3, 1, 0)


def test_pdptrs_travel_only_when_kvm_calls_them_valid() -> None:
    cpu, sregs = CpuState(pdptrs=[1, 2, 3, 4]), kvm_sregs2()
    put_sregs(cpu, sregs)
    assert (sregs.flags, list(sregs.pdptrs)) == (1, [1, 2, 3, 4])
    again = CpuState()
    take_sregs(again, sregs)
    assert again.pdptrs == [1, 2, 3, 4]
    sregs.flags = 0
    again = CpuState()
    take_sregs(again, sregs)
    assert again.pdptrs is None


@pytest.mark.parametrize(("vector", "bitmap"), [(-1, [0, 0, 0, 0]), (0, [1, 0, 0, 0]), (200, [0, 0, 0, 1 << 8])])
def test_the_older_structure_names_the_interrupt_under_way(vector: int, bitmap: list[int]) -> None:
    sregs = kvm_sregs()
    sregs.interrupt_bitmap[2] = 77
    put_sregs(CpuState(interrupt_injected=vector), sregs)
    assert list(sregs.interrupt_bitmap) == bitmap


def test_debug_registers_have_their_aliases() -> None:
    debugregs = kvm_debugregs(dr6=0xFFFF0FF1, dr7=0x402)
    for index in range(4):
        debugregs.db[index] = 0x1000 * (index + 1)
    cpu = CpuState()
    take_debugregs(cpu, debugregs)
    assert cpu.dr == [0x1000, 0x2000, 0x3000, 0x4000, 0xFFFF0FF1, 0x402, 0xFFFF0FF1, 0x402]
    assert bytes(debugregs_of(cpu)) == bytes(debugregs)
