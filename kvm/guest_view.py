"""Guest memory as somebody sees it who looks on from outside: by physical address, or by a vCPU's virtual one.

Threads   any; a running machine stands still for the moment in which a vCPU's registers are read.
"""

from __future__ import annotations

from .machine import MicroVM
from .paging import PAGE_SIZE, ControlRegisters, translate


class GuestView:
    """The view of *machine*."""

    def __init__(self, machine: MicroVM) -> None:
        self._machine = machine

    def covers(self, address: int, size: int) -> bool:
        """Whether there is memory at all of these guest-physical addresses."""
        blocks = self._machine.ram_blocks
        end = address + size
        while address < end:
            reached = [
                block.guest_address + block.used_length
                for block in blocks
                if block.guest_address <= address < block.guest_address + block.used_length
            ]
            if not reached:
                return False
            address = max(reached)
        return True

    def read(self, address: int, size: int) -> bytes:
        """*size* bytes at a guest-physical address; zeroes where there is no memory."""
        return self._machine.read_physical(address, size)

    def translate(self, cpu: int, address: int) -> int | None:
        """The guest-physical address behind a virtual one of vCPU *cpu*; None when there is none."""
        return translate(self._control_registers(cpu), self.read, address)

    def read_virtual(self, cpu: int, address: int, size: int) -> bytes | None:
        """*size* bytes at a virtual address of vCPU *cpu*; None when something of it is not mapped."""
        registers = self._control_registers(cpu)
        data = bytearray()
        while len(data) < size:
            at = (address + len(data)) & (1 << 64) - 1
            physical = translate(registers, self.read, at)
            if physical is None:
                return None
            data += self.read(physical, min(size - len(data), PAGE_SIZE - at % PAGE_SIZE))
        return bytes(data)

    def _control_registers(self, cpu: int) -> ControlRegisters:
        machine = self._machine
        with machine._transition:
            was_running = machine.running
            if was_running:
                machine._pause()
            try:
                sregs = machine._processors[cpu].vcpu.get_sregs()
            finally:
                if was_running:
                    machine._resume()
        return ControlRegisters(sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer)
