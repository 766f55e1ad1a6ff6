"""Small VMs made with the lower floor alone: a few bytes of real-mode code, or the tiny guest."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from kvm import Kvm, Vcpu
from kvm.memory import HostMemory
from kvm.structs import kvm_regs
from kvm.vcpu import IoExit

needs_kvm = pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="/dev/kvm is missing or not accessible")

CODE = 0x1000  # guest address where a program starts
RAM_SIZE = 0x8000  # what lies above has no slot: an access there is an MMIO exit

# Programs.
OUT_A = "b041 e610 f4"  # mov al,'A'; out 0x10,al; hlt
IN_TO_2000 = "e420 a20020 f4"  # in al,0x20; mov [0x2000],al; hlt
SPIN = "ebfe"  # jmp $
OUT_FOREVER = "e610 ebfc"  # out 0x10,al; jmp back

IMAGE = Path(__file__).parent.parent / "guests" / "tinyguest.bin"
SERIAL = 0x3F8
LINE_STATUS = 0x3FD
TRANSMITTER_EMPTY = b"\x60"


class Program:
    """A VM of one vCPU without an interrupt chip that runs *code* in real mode; a context manager."""

    def __init__(self, code: str = "f4", ram_size: int = RAM_SIZE) -> None:
        """*code*: machine code in hexadecimal, blanks allowed."""
        self.kvm = Kvm()
        self.vm = self.kvm.create_vm()
        self.ram = HostMemory.anonymous(ram_size)
        self.ram.write(CODE, bytes.fromhex(code))
        self.vm.set_memory_slot(0, 0, ram_size, self.ram.host_address)
        self.vcpu = self.vm.create_vcpu(0)
        sregs = self.vcpu.get_sregs()
        sregs.cs.base, sregs.cs.selector = 0, 0
        self.vcpu.set_sregs(sregs)
        self.vcpu.set_regs(kvm_regs(rip=CODE, rflags=2, rsp=RAM_SIZE))

    def close(self) -> None:
        self.vm.close()
        self.ram.close()
        self.kvm.close()

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class TinyGuest:
    """The tiny guest in 64 MiB, with in-kernel chips; `output` holds what it printed.  A context manager."""

    def __init__(self, cpus: int = 1, print_every: int = 100, pages: int = 64) -> None:
        self.kvm = Kvm()
        self.vm = self.kvm.create_vm()
        self.ram = HostMemory.anonymous(64 << 20)
        image = bytearray(IMAGE.read_bytes())
        struct.pack_into("<QQ", image, 0x10, pages, print_every)
        struct.pack_into("<I", image, 0x40, cpus)
        self.rom = HostMemory.anonymous(len(image))
        self.rom.write(0, image)
        self._map()
        self.vm.set_identity_map_address(0xFEFFC000)
        self.vm.set_tss_address(0xFEFFD000)
        self.vm.create_irqchip()
        self.vcpus = [self._vcpu(index) for index in range(cpus)]
        self.output = bytearray()

    def _map(self) -> None:
        slots = (
            (0, self.ram.host_address, 0xF0000),
            (0xF0000, self.rom.host_address, self.rom.size),
            (0x100000, self.ram.host_address + 0x100000, self.ram.size - 0x100000),
            ((4 << 30) - self.rom.size, self.rom.host_address, self.rom.size),
        )
        for slot, (guest_address, host_address, size) in enumerate(slots):
            self.vm.set_memory_slot(slot, guest_address, size, host_address)

    def _vcpu(self, index: int) -> Vcpu:
        vcpu = self.vm.create_vcpu(index)
        entries = self.kvm.supported_cpuid()
        for entry in entries:
            if entry.function == 1:  # the initial APIC id, in bits 31-24
                entry.ebx = entry.ebx & 0x00FFFFFF | index << 24
            elif entry.function in (0xB, 0x1F):
                entry.edx = index
        vcpu.set_cpuid(entries)
        return vcpu

    def handle_exit(self, exit: object) -> None:
        """A serial port that is always ready; every other port reads as ones; nothing else may happen."""
        assert isinstance(exit, IoExit), exit
        if exit.is_write:
            if exit.port == SERIAL:
                self.output += exit.data
        else:
            ready = exit.port == LINE_STATUS
            exit.data[:] = TRANSMITTER_EMPTY if ready else b"\xff" * len(exit.data)

    def status(self, cpu: int = 0) -> tuple[int, int]:
        """Completed passes of a vCPU, and the character of the error it found (0: none)."""
        block = self.ram.read(0x1000 + 64 * cpu, 24)
        passes, _, error = struct.unpack("<3Q", block)
        return passes, error

    def close(self) -> None:
        self.vm.close()
        self.ram.close()
        self.rom.close()
        self.kvm.close()

    def __enter__(self) -> TinyGuest:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
