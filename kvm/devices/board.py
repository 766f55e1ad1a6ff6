"""The board: all devices of the machine but its vCPUs, wired to buses, interrupt lines and sections (machine.md §3, §4).

    ports        0x3F8 serial   0x510 fw_cfg   0x514 fw_cfg DMA                     elsewhere ones
    memory       0xFEB00000 + 512 i, i = 0 … 7: empty virtio-mmio slots             elsewhere zeroes
    in KVM       both APICs, kvmclock

Threads   Built, started, stopped, reset, saved and loaded by whoever holds the machine's transition lock; the buses are
          for all vCPU threads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qemumig.machine import DeviceSection
from qemumig.savevm.devices.fw_cfg import FW_CFG
from qemumig.savevm.devices.ioapic import IOAPIC
from qemumig.savevm.devices.kvm_tpr_opt import KVM_TPR_OPT
from qemumig.savevm.devices.kvmclock import KVMCLOCK
from qemumig.savevm.devices.serial import SERIAL
from qemumig.savevm.devices.timer import TIMER

from ..config import MachineConfig
from ..vm import Vm
from . import fw_cfg, serial, virtio_mmio
from .bus import Bus
from .irqchip import Irqchip
from .kvmclock import Kvmclock
from .memory import GuestMemory
from .timer import VirtualClock
from .vapic import Vapic

_PORTS_IDLE, _MEMORY_IDLE = 0xFF, 0x00  # what reads where nobody answers
_VIRTIO_MMIO, _VIRTIO_SLOTS = 0xFEB00000, 8


@dataclass(frozen=True)
class BoardSection:
    """A section and the device behind it."""

    section: DeviceSection
    save: Callable[[], Any]
    load: Callable[[Any], None]


class Board:
    """Made before the first vCPU, for the interrupt chips."""

    def __init__(self, vm: Vm, config: MachineConfig, memory: GuestMemory) -> None:
        self.memory = memory
        self.ports = Bus("port", _PORTS_IDLE)
        self.mmio = Bus("memory", _MEMORY_IDLE)
        self.clock = VirtualClock()
        self._irqchip = Irqchip(vm)
        self._kvmclock = Kvmclock(vm)
        self._vapic = Vapic()
        access = fw_cfg.GuestAccess(memory.read, memory.write)
        self._fw_cfg = fw_cfg.FwCfg(config.ram_size, config.cpus, config.max_cpus, access)
        self._serial = self._make_serial(config) if config.isa_serial else None
        self._register_devices()
        # In the order of the wire: before the vCPUs, after the first of them, after all of them.
        self.first_sections = [
            _section("timer", TIMER, self.clock),
            _section("fw_cfg", FW_CFG, self._fw_cfg),
        ]
        self.sections_after_first_cpu = [_section("kvm-tpr-opt", KVM_TPR_OPT, self._vapic)] if config.vapic else []
        self.last_sections = [
            _section("ioapic", IOAPIC, self._irqchip),
            _section("kvmclock", KVMCLOCK, self._kvmclock),
        ]
        if self._serial is not None:
            self.last_sections.append(_section("serial", SERIAL, self._serial))

    def start(self) -> None:
        """The vCPUs are about to run."""
        self.memory.not_fresh()
        self._kvmclock.start()
        self.clock.start()
        if self._serial is not None:
            self._serial.start()

    def stop(self) -> None:
        """No vCPU runs any more: the clocks stand still."""
        self.clock.stop()
        self._kvmclock.stop()

    def reset(self, firmware: bytes) -> None:
        """As after power-on, the firmware in its place; RAM and clocks stay."""
        self.memory.load_firmware(firmware)
        self._irqchip.reset()
        self._vapic.reset()
        self._fw_cfg.reset()
        if self._serial is not None:
            self._serial.reset()

    def _make_serial(self, config: MachineConfig) -> serial.Serial:
        backend = config.serial
        send = backend.write if backend is not None else len
        uart = serial.Serial(send, self._irqchip.line(serial.GSI))
        if backend is not None:
            uart.connect(backend)
        return uart

    def _register_devices(self) -> None:
        self.ports.register(*fw_cfg.PORTS, self._fw_cfg, widest=2)
        self.ports.register(*fw_cfg.DMA_PORTS, fw_cfg.DmaPorts(self._fw_cfg), widest=8)
        if self._serial is not None:
            self.ports.register(*serial.PORTS, self._serial, widest=1)
        slots = virtio_mmio.SLOT_SIZE * _VIRTIO_SLOTS
        empty = virtio_mmio.EmptySlot()
        for start in range(_VIRTIO_MMIO, _VIRTIO_MMIO + slots, virtio_mmio.SLOT_SIZE):
            self.mmio.register(start, virtio_mmio.SLOT_SIZE, empty, widest=8)


def _section(idstr: str, vmstate: Any, device: Any) -> BoardSection:
    return BoardSection(DeviceSection(idstr, 0, vmstate), device.save, device.load)
