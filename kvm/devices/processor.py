"""A vCPU as part of the machine: its thread, what it was when the machine stopped, its three sections.

The TSC runs on while the machine is stopped.  What a migration sends is its value at the stop, so that is read then, and
kept; a load sets it, and a save before the machine has run gives the same value again.

Threads   Whoever holds the machine's transition lock; the thread inside runs the guest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from qemumig.machine import DeviceSection
from qemumig.savevm.devices.apic import APIC, ApicState
from qemumig.savevm.devices.cpu import CPU
from qemumig.savevm.devices.cpu_common import CPU_COMMON, CpuCommonState
from qemumig.savevm.devices.cpu_state import CpuState

from ..cpuid import CpuModel
from ..state.apic import load_apic, save_apic
from ..state.cpu import load_cpu, read_tsc, save_cpu
from ..state.errors import refusals
from ..state.host import HostState
from ..structs import KVM_MP_STATE_HALTED
from ..vcpu import Exit
from ..vcpu_thread import VcpuThread
from ..vm import Vm

_RDX = 2
_LINT0, _LVT_MASKED = 3, 0x10000
_INTERRUPT_HARD = 2  # in cpu_common: an interrupt that no APIC keeps


class Processor:
    """vCPU *index* of *cpus*, out of reset, its thread parked."""

    def __init__(
        self,
        vm: Vm,
        index: int,
        cpus: int,
        model: CpuModel,
        host: HostState,
        *,
        handle_exit: Callable[[Processor, Exit], None],
        on_error: Callable[[Processor, BaseException], None],
        warn: Callable[[str], None],
    ) -> None:
        self.index = index
        self.vcpu = vm.create_vcpu(index)
        self._host = host
        self._warn = warn
        self._tsc = 0
        if host.mcg_cap:
            self.vcpu.setup_mce(host.mcg_cap)
        self.vcpu.set_cpuid(model.entries(index, cpus))
        # A new vCPU is in reset state but for RDX, which tells the processor's signature, and for LINT0, where the
        # PICs ask: KVM leaves it open on vCPU 0 for firmware that never heard of APICs, QEMU and real ones do not.
        self._reset_apic = save_apic(self.vcpu)
        self._reset_apic.lvt[_LINT0] = _LVT_MASKED
        self._reset_cpu = save_cpu(self.vcpu, host, 0)
        self._reset_cpu.regs[_RDX] = model.signature
        self.thread = VcpuThread(
            self.vcpu,
            lambda exit: handle_exit(self, exit),
            name=f"CPU {index}/KVM",
            on_error=lambda error: on_error(self, error),
        )
        self.common_section = DeviceSection("cpu_common", index, CPU_COMMON)
        self.cpu_section = DeviceSection("cpu", index, CPU)
        self.apic_section = DeviceSection("apic", index, APIC)

    def reset(self, entry_point: int | None = None) -> None:
        """Registers as after power-on, but for the instruction pointer if *entry_point* says so; the machine is paused."""
        self.load_apic(self._reset_apic)
        reset = self._reset_cpu if entry_point is None else replace(self._reset_cpu, eip=entry_point)
        self.load_cpu(reset)

    def note_stop(self) -> None:
        """The machine has just stopped: note the TSC."""
        self._tsc = read_tsc(self.vcpu)

    def note_start(self) -> None:
        """The machine is about to run: tell a guest with kvmclock that it was stopped."""
        with refusals(self.index, "starting"):
            self.vcpu.kvmclock_ctrl()

    def save(self, pic_asks: bool = False) -> tuple[CpuCommonState, CpuState, ApicState]:
        """The records of its sections; *pic_asks*: the PICs have something for it, which a QEMU wants to be told here."""
        cpu = save_cpu(self.vcpu, self._host, self._tsc)
        halted = int(cpu.mp_state == KVM_MP_STATE_HALTED)
        return CpuCommonState(halted, _INTERRUPT_HARD if pic_asks else 0), cpu, save_apic(self.vcpu)

    def load_apic(self, record: ApicState) -> None:
        """Set the local APIC; before the other registers."""
        load_apic(self.vcpu, record)

    def load_cpu(self, record: CpuState) -> None:
        """Set the other registers."""
        load_cpu(self.vcpu, self._host, record, self._warn)
        self._tsc = record.tsc

    def load_common(self, record: Any) -> None:
        """Nothing: the run state in `cpu` says whether it is halted."""
