"""Guest memory as somebody sees it who looks on from outside: by physical address, or by a vCPU's virtual one.

Threads   any; a running machine stands still for the moment in which a vCPU's registers are read.
"""

from __future__ import annotations

from typing import Protocol

from .paging import PAGE_SIZE, ControlRegisters, translate


class PhysicalMemory(Protocol):
    """Memory and devices by physical address."""

    def covers(self, address: int, size: int) -> bool: ...


class ViewedMachine(Protocol):
    """What is asked of a machine."""

    @property
    def physical(self) -> PhysicalMemory: ...

    def read_physical(self, address: int, size: int) -> bytes: ...

    def control_registers(self, cpu: int) -> ControlRegisters | None: ...


class GuestView:
    """The view of *machine*."""

    def __init__(self, machine: ViewedMachine) -> None:
        self._machine = machine

    def covers(self, address: int, size: int) -> bool:
        """Whether there is memory or a device at all of these guest-physical addresses."""
        return self._machine.physical.covers(address, size)

    def read(self, address: int, size: int) -> bytes:
        """*size* bytes at a guest-physical address; zeroes where there is no memory."""
        return self._machine.read_physical(address, size)

    def translate(self, cpu: int, address: int) -> int | None:
        """The guest-physical address behind a virtual one of vCPU *cpu*; None when there is none."""
        registers = self._machine.control_registers(cpu)
        return None if registers is None else translate(registers, self.read, address)

    def read_virtual(self, cpu: int, address: int, size: int) -> bytes | None:
        """*size* bytes at a virtual address of vCPU *cpu*; None when something of it is not mapped."""
        registers = self._machine.control_registers(cpu)
        data = bytearray()
        while len(data) < size:
            at = (address + len(data)) & (1 << 64) - 1
            physical = None if registers is None else translate(registers, self.read, at)
            if physical is None:
                return None
            data += self.read(physical, min(size - len(data), PAGE_SIZE - at % PAGE_SIZE))
        return bytes(data)
