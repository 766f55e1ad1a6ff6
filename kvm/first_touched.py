"""The guest memory that a vCPU touches first when it goes on, so that a postcopy can bring it before all the rest.

    tables        those that translate the addresses below, level by level
    code, stack   the pages of RIP and RSP, and the neighbours that the next instructions are likely to reach
    data          what the other general registers point at, if they do: most code keeps there what it works on
    descriptors   GDT, IDT and TSS: the first interrupt reads all three
    for KVM       what it writes itself when a vCPU begins: the clock, stolen time, the words of interrupts

It is advice: a page too many costs its bytes, one too few a page fault.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

from .paging import PAGE_SIZE, ControlRegisters, Read, translate
from .structs import kvm_sregs
from .vcpu import Vcpu

_WALL_CLOCK = 0x11  # its value is an address, 0 for none
_ENABLED_BY_BIT_0 = (0x12, 0x4B564D02, 0x4B564D03, 0x4B564D04)  # system time, async page faults, steal time, PV EOI
_ENABLED = 1
_FLAGS = 0x3F  # below the address, in those
_GENERAL = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", *(f"r{number}" for number in range(8, 16)))


def first_touched(vcpu: Vcpu, read: Read) -> list[int]:
    """Guest-physical addresses of pages, each once; the vCPU is parked.  *read* gives guest memory."""
    sregs = vcpu.get_sregs()
    registers = ControlRegisters(sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer)
    found: dict[int, None] = {}  # in the order of finding

    def note(address: int) -> None:
        found[address & ~(PAGE_SIZE - 1)] = None

    @cache
    def read_table(address: int, size: int) -> bytes:
        note(address)
        return read(address, size)

    for address in dict.fromkeys(address & ~(PAGE_SIZE - 1) for address in _linear(vcpu, sregs)):
        physical = translate(registers, read_table, address)
        if physical is not None:
            note(physical)
    for address in _of_kvm(vcpu):
        note(address)
    return list(found)


def _linear(vcpu: Vcpu, sregs: kvm_sregs) -> Iterator[int]:
    regs = vcpu.get_regs()
    code, stack = sregs.cs.base + regs.rip, sregs.ss.base + regs.rsp
    for address in (code, code + PAGE_SIZE, stack, stack - PAGE_SIZE, sregs.gdt.base, sregs.idt.base, sregs.tr.base):
        yield address & (1 << 64) - 1
    for name in _GENERAL:
        address = getattr(regs, name)
        if address >= PAGE_SIZE:
            yield address


def _of_kvm(vcpu: Vcpu) -> Iterator[int]:
    values = vcpu.get_msrs((_WALL_CLOCK, *_ENABLED_BY_BIT_0))
    if values.get(_WALL_CLOCK):
        yield values[_WALL_CLOCK]
    for index in _ENABLED_BY_BIT_0:
        if values.get(index, 0) & _ENABLED:
            yield values[index] & ~_FLAGS
