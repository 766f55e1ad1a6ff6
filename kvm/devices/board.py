"""The board: all devices of the machine but its vCPUs, wired to buses, interrupt lines and sections (machine.md §3, §4).

    ports        0x3F8 serial   0x510 fw_cfg   0x514 fw_cfg DMA                     elsewhere ones
    memory       0xFEB00000 + 512 i, i = 0 … 7: virtio-mmio slots, a disk or empty  elsewhere zeroes
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
from qemumig.savevm.devices.virtio_mmio import VIRTIO_BLK

from ..config import VIRTIO_MMIO_SLOTS, DiskConfig, MachineConfig
from ..vm import Vm
from . import fw_cfg, serial, virtio_mmio
from .bus import Bus
from .irqchip import Irqchip
from .kvmclock import Kvmclock
from .memory import GuestMemory, memory_map
from .timer import VirtualClock
from .vapic import Vapic
from .virtio_blk import DiskEvents, OnError, VirtioBlk
from .virtio_mmio import EmptySlot

_PORTS_IDLE, _MEMORY_IDLE = 0xFF, 0x00  # what reads where nobody answers


@dataclass(frozen=True)
class BoardSection:
    """A section and the device behind it."""

    section: DeviceSection
    save: Callable[[], Any]
    load: Callable[[Any], None]


class Board:
    """Made before the first vCPU, for the interrupt chips."""

    def __init__(
        self,
        vm: Vm,
        config: MachineConfig,
        memory: GuestMemory,
        disk_events: DiskEvents,
        warn: Callable[[str], None],
    ) -> None:
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
        self._disks: dict[int, VirtioBlk] = {}
        self._register_devices(EmptySlot(config.legacy_virtio), {disk.slot for disk in config.disks})
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
        try:
            for disk in config.disks:
                self._add_disk(disk, config.legacy_virtio, disk_events, warn)
        except BaseException:
            self.close()
            raise

    def start(self) -> None:
        """The vCPUs are about to run."""
        self.memory.not_fresh()
        self._kvmclock.start()
        self.clock.start()
        if self._serial is not None:
            self._serial.start()
        for disk in self._disks.values():
            disk.start()

    def stop(self) -> None:
        """No vCPU runs any more: disks end what they are at, the clocks stand still."""
        for disk in self._disks.values():
            disk.stop()
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
        for disk in self._disks.values():
            disk.hard_reset()

    def claim_disks(self) -> None:
        """The images are this machine's; MachineError when somebody else has one."""
        for disk in self._disks.values():
            disk.claim()

    def release_disks(self) -> None:
        """The images are about to be another machine's."""
        for disk in self._disks.values():
            disk.release()

    def close(self) -> None:
        """End the threads of devices; twice is allowed."""
        for disk in self._disks.values():
            disk.close()

    def _make_serial(self, config: MachineConfig) -> serial.Serial:
        backend = config.serial
        send = backend.write if backend is not None else len
        uart = serial.Serial(send, self._irqchip.line(serial.GSI))
        if backend is not None:
            uart.connect(backend)
        return uart

    def _add_disk(self, disk: DiskConfig, legacy: bool, events: DiskEvents, warn: Callable[[str], None]) -> None:
        memory = DmaMemory(self.memory)
        line = self._irqchip.line(virtio_mmio.FIRST_GSI + disk.slot)
        transport = virtio_mmio.Transport(f"disk '{disk.name}'", memory, line, warn, legacy=legacy)
        made = VirtioBlk(
            disk.name,
            disk.image,
            transport,
            memory,
            events,
            warn,
            on_read_error=OnError(disk.on_read_error),
            on_write_error=OnError(disk.on_write_error),
            writeback=disk.writeback,
            serial=disk.serial,
        )
        self._disks[disk.slot] = made
        address = virtio_mmio.slot_address(disk.slot)
        self.mmio.register(address, virtio_mmio.SLOT_SIZE, transport, widest=4)
        self.last_sections.append(_section(f"virtio-mmio@{address:016x}/virtio-blk", VIRTIO_BLK, made))

    def _register_devices(self, empty: EmptySlot, taken: set[int]) -> None:
        self.ports.register(*fw_cfg.PORTS, self._fw_cfg, widest=2)
        self.ports.register(*fw_cfg.DMA_PORTS, fw_cfg.DmaPorts(self._fw_cfg), widest=8)
        if self._serial is not None:
            self.ports.register(*serial.PORTS, self._serial, widest=1)
        for slot in set(range(VIRTIO_MMIO_SLOTS)) - taken:
            self.mmio.register(virtio_mmio.slot_address(slot), virtio_mmio.SLOT_SIZE, empty, widest=4)


class DmaMemory:
    """*memory* as a device with DMA wants it: it asks first whether a range is RAM."""

    def __init__(self, memory: GuestMemory) -> None:
        self.read = memory.read
        self.write = memory.write
        self._extents: list[tuple[int, int]] = []  # start and end of RAM without a gap
        for piece in memory_map(memory.ram_block.used_length, memory.firmware_block.used_length):
            end = piece.guest_address + piece.size
            if self._extents and self._extents[-1][1] == piece.guest_address:
                self._extents[-1] = self._extents[-1][0], end
            else:
                self._extents.append((piece.guest_address, end))

    def holds(self, guest_address: int, length: int) -> bool:
        """Whether all of the range is RAM."""
        return any(start <= guest_address and guest_address + length <= end for start, end in self._extents)


def _section(idstr: str, vmstate: Any, device: Any) -> BoardSection:
    return BoardSection(DeviceSection(idstr, 0, vmstate), device.save, device.load)
