"""General, segment, control and debug registers between KVM's structures and a CpuState (cpu-state.md §2)."""

from __future__ import annotations

from qemumig.savevm.devices.cpu_state import CpuState, Segment

from ..structs import (
    KVM_SREGS2_FLAGS_PDPTRS_VALID,
    kvm_debugregs,
    kvm_dtable,
    kvm_regs,
    kvm_segment,
    kvm_sregs,
    kvm_sregs2,
)

# The order in which instructions encode them, and so the wire's.
_GENERAL = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{number}" for number in range(8, 16)))
_SEGMENTS = ("es", "cs", "ss", "ds", "fs", "gs")

_CR0_PE = 1
_EFLAGS_VM = 1 << 17
_DPL = 3 << 13
_PRESENT = 1 << 15
_VIRTUAL_8086_FLAGS = 3 << 8 | 1 << 12 | _DPL | _PRESENT  # read/write data, DPL 3


def take_regs(cpu: CpuState, regs: kvm_regs) -> None:
    """Fill *cpu* from *regs*."""
    cpu.regs = [getattr(regs, name) for name in _GENERAL]
    cpu.eip, cpu.eflags = regs.rip, regs.rflags


def regs_of(cpu: CpuState) -> kvm_regs:
    return kvm_regs(rip=cpu.eip, rflags=cpu.eflags, **dict(zip(_GENERAL, cpu.regs, strict=True)))


def take_sregs(cpu: CpuState, sregs: kvm_sregs | kvm_sregs2) -> None:
    """Fill *cpu* from *sregs*; general registers are there already.  APIC base and CR8 are the APIC's."""
    mask = ~_DPL if not sregs.cr0 & _CR0_PE else ~0  # real mode has no privilege levels
    cpu.segs = [_segment(getattr(sregs, name), mask) for name in _SEGMENTS]
    cpu.ldt, cpu.tr = _segment(sregs.ldt), _segment(sregs.tr)
    cpu.gdt = Segment(0, sregs.gdt.base, sregs.gdt.limit, 0)
    cpu.idt = Segment(0, sregs.idt.base, sregs.idt.limit, 0)
    cpu.cr0, cpu.cr2, cpu.cr3, cpu.cr4 = sregs.cr0, sregs.cr2, sregs.cr3, sregs.cr4
    cpu.efer = sregs.efer
    if isinstance(sregs, kvm_sregs2) and sregs.flags & KVM_SREGS2_FLAGS_PDPTRS_VALID:
        cpu.pdptrs = list(sregs.pdptrs)


def put_sregs(cpu: CpuState, sregs: kvm_sregs | kvm_sregs2) -> None:
    """Overwrite *sregs*, read from the vCPU, with *cpu*; its APIC base and CR8 stay."""
    for name, segment in zip(_SEGMENTS, cpu.segs, strict=True):
        setattr(sregs, name, _kvm_segment(segment, _segment_flags(cpu, segment)))
    sregs.ldt, sregs.tr = _kvm_segment(cpu.ldt, cpu.ldt.flags), _kvm_segment(cpu.tr, cpu.tr.flags)
    sregs.gdt = kvm_dtable(base=cpu.gdt.base, limit=cpu.gdt.limit & 0xFFFF)
    sregs.idt = kvm_dtable(base=cpu.idt.base, limit=cpu.idt.limit & 0xFFFF)
    sregs.cr0, sregs.cr2, sregs.cr3, sregs.cr4 = cpu.cr0, cpu.cr2, cpu.cr3, cpu.cr4
    sregs.efer = cpu.efer
    if isinstance(sregs, kvm_sregs2):
        sregs.flags = KVM_SREGS2_FLAGS_PDPTRS_VALID if cpu.pdptrs is not None else 0
        for index, pdptr in enumerate(cpu.pdptrs or ()):
            sregs.pdptrs[index] = pdptr
    else:
        _put_pending_interrupt(cpu, sregs)


def take_debugregs(cpu: CpuState, debugregs: kvm_debugregs) -> None:
    """DR4 and DR5 are other names of DR6 and DR7."""
    cpu.dr = [*debugregs.db, debugregs.dr6, debugregs.dr7, debugregs.dr6, debugregs.dr7]


def debugregs_of(cpu: CpuState) -> kvm_debugregs:
    debugregs = kvm_debugregs(dr6=cpu.dr[6], dr7=cpu.dr[7])
    for index in range(4):
        debugregs.db[index] = cpu.dr[index]
    return debugregs


def _segment(kvm: kvm_segment, mask: int = ~0) -> Segment:
    """Attributes gathered as in the upper word of a descriptor, less what *mask* takes away."""
    present = kvm.present and not kvm.unusable
    flags = kvm.type << 8 | kvm.s << 12 | kvm.dpl << 13 | (_PRESENT if present else 0)
    flags |= kvm.avl << 20 | kvm.l << 21 | kvm.db << 22 | kvm.g << 23
    return Segment(kvm.selector, kvm.base, kvm.limit, flags & mask)


def _segment_flags(cpu: CpuState, segment: Segment) -> int:
    """What *segment* is loaded with: some modes leave no choice."""
    if cpu.eflags & _EFLAGS_VM:
        return _VIRTUAL_8086_FLAGS
    return segment.flags if cpu.cr0 & _CR0_PE else segment.flags & ~_DPL


def _kvm_segment(segment: Segment, flags: int) -> kvm_segment:
    present = flags >> 15 & 1
    return kvm_segment(
        base=segment.base,
        limit=segment.limit,
        selector=segment.selector & 0xFFFF,
        type=flags >> 8 & 0xF,
        present=present,
        dpl=flags >> 13 & 3,
        db=flags >> 22 & 1,
        s=flags >> 12 & 1,
        l=flags >> 21 & 1,
        g=flags >> 23 & 1,
        avl=flags >> 20 & 1,
        unusable=1 - present,
    )


def _put_pending_interrupt(cpu: CpuState, sregs: kvm_sregs) -> None:
    """The older structure has a bit for the vector under way."""
    for word in range(len(sregs.interrupt_bitmap)):
        sregs.interrupt_bitmap[word] = 0
    if 0 <= cpu.interrupt_injected <= 0xFF:
        sregs.interrupt_bitmap[cpu.interrupt_injected // 64] |= 1 << cpu.interrupt_injected % 64
