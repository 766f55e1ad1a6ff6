"""The board: all devices of the machine but its vCPUs, wired to buses, interrupt lines and sections (machine.md §3, §4).

    ports        0x3F8 serial   0x510 fw_cfg   0x514 fw_cfg DMA                     elsewhere ones
                 0x40 pit       0x70 rtc
    memory       0xFEB00000 + 512 i, i = 0 … 7: virtio-mmio slots, a disk or empty  elsewhere zeroes
                 0xFEA00000 ged   0xFEC10000 second ioapic, with which there are 24 slots
    in KVM       local APICs, first I/O APIC, pic, kvmclock

What stands in the second lines is there if the machine's Chipset says so.  A PC has PIT, PICs and RTC, no virtio-mmio
slots, and the devices of pc.py.

Threads   Built, started, stopped, reset, saved and loaded by whoever holds the machine's transition lock; the buses are
          for all vCPU threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from qemumig.errors import MachineError
from qemumig.savevm.devices.acpi_ged import ACPI_GED
from qemumig.savevm.devices.fw_cfg import FW_CFG
from qemumig.savevm.devices.i8254 import I8254
from qemumig.savevm.devices.i8259 import I8259
from qemumig.savevm.devices.ioapic import IOAPIC
from qemumig.savevm.devices.kvm_tpr_opt import KVM_TPR_OPT
from qemumig.savevm.devices.kvmclock import KVMCLOCK
from qemumig.savevm.devices.mc146818rtc import MC146818RTC
from qemumig.savevm.devices.serial import SERIAL
from qemumig.savevm.devices.timer import TIMER
from qemumig.savevm.devices.virtio_mmio import VIRTIO_BLK

from ..config import Blob, DiskConfig, MachineConfig
from ..vm import Vm
from . import acpi_pm, fw_cfg, ged, ioapic, pit, rtc, serial, virtio_mmio
from .acpi.tables import Described
from .acpi.tables import build as build_tables
from .blobs import Blobs
from .bus import Bus
from .client_time import ClientTime
from .deadlines import Deadlines
from .fdt import build as build_tree
from .irqchip import InputPins, Irqchip
from .kvmclock import Kvmclock
from .memory import GuestMemory
from .pc import PcDevices, PcRequests
from .section import BoardSection, board_section
from .timer import VirtualClock
from .vapic import Vapic
from .virtio_blk import DiskEvents, OnError, VirtioBlk
from .virtio_mmio import EmptySlot

_PORTS_IDLE, _MEMORY_IDLE = 0xFF, 0x00  # what reads where nobody answers


@dataclass(frozen=True)
class BoardEvents:
    """What devices ask of the machine, each from a thread that must not wait: the machine does it later."""

    disks: DiskEvents
    power_off: Callable[[], None]
    suspend: Callable[[], None]
    reset: Callable[[], None]
    failed: Callable[[Exception], None]  # a timer's call raised this


class Board:
    """Made before the first vCPU, for the interrupt chips; `blobs` are its RAM blocks, None without ACPI."""

    def __init__(
        self,
        vm: Vm,
        config: MachineConfig,
        memory: GuestMemory,
        events: BoardEvents,
        warn: Callable[[str], None],
    ) -> None:
        self.memory = memory
        self.ports = Bus("port", _PORTS_IDLE)
        self.mmio = Bus("memory", _MEMORY_IDLE)
        self.client_time = None if config.runs_guest else ClientTime()
        self.clock = self.client_time.clock if self.client_time is not None else VirtualClock()
        self._chipset = config.chipset
        self._irqchip = Irqchip(vm, config.chipset)
        self._kvmclock = Kvmclock(vm)
        self._vapic = Vapic()
        self._deadlines = Deadlines(events.failed)
        self._disks: dict[int, VirtioBlk] = {}
        self._loaded = _require_ram(config.blobs, DmaMemory(memory))
        self.blobs = self._make_blobs(config)
        try:
            self._make_devices(config, events, warn)
        except BaseException:
            self.close()
            raise

    def _make_devices(self, config: MachineConfig, events: BoardEvents, warn: Callable[[str], None]) -> None:
        chipset, line, deadlines = config.chipset, self._irqchip.line, self._deadlines
        self._fw_cfg = self._make_fw_cfg(config)
        self._serial = self._make_serial(config) if config.isa_serial else None
        self._ged = ged.Ged(line(ged.GSI), events.power_off, events.reset) if chipset.acpi else None
        virtual = self.client_time or deadlines
        self._pit = pit.Pit(lambda: self.clock.now, line(pit.GSI), virtual) if chipset.pit else None
        self._rtc = rtc.Rtc(rtc.memory_bytes(config.ram_size), line(rtc.GSI), deadlines) if chipset.rtc else None
        self._pc = self._make_pc(config, events, warn) if config.machine_type.is_pc else None
        self._register_devices()
        if self._pc is None:
            self._register_slots(EmptySlot(config.legacy_virtio), {disk.slot for disk in config.disks})
        # In the order of the wire: before the vCPUs, after the first of them, after all of them.
        self.first_sections = [
            board_section("timer", TIMER, self.clock),
            board_section("fw_cfg", FW_CFG, self._fw_cfg),
        ]
        self.sections_after_first_cpu = [board_section("kvm-tpr-opt", KVM_TPR_OPT, self._vapic)] if config.vapic else []
        self.last_sections = list(self._device_sections())
        self.migration_blockers: list[str] = []
        for disk in config.disks if self._pc is None else ():
            self._add_disk(disk, config.legacy_virtio, events.disks, warn)
            if disk.image.forgets:
                self.migration_blockers.append(
                    f"State blocked by the temporary snapshot of '{disk.image.path}': what the guest writes is nowhere else"
                )

    def _device_sections(self) -> Iterator[BoardSection]:
        """Those after the vCPUs' but for the disks'."""
        yield board_section("ioapic", IOAPIC, self._irqchip)
        if self._irqchip.second is not None:
            yield board_section("ioapic", IOAPIC, self._irqchip.second, instance=1)
        yield board_section("kvmclock", KVMCLOCK, self._kvmclock)
        if self._ged is not None:
            yield board_section("acpi-ged", ACPI_GED, self._ged)
        for instance, pic in enumerate(self._irqchip.pics):
            yield board_section("i8259", I8259, pic, instance=instance)
        if self._pit is not None:
            yield board_section("i8254", I8254, self._pit)
        if self._rtc is not None:
            yield board_section("mc146818rtc", MC146818RTC, self._rtc)
        if self._serial is not None:
            yield board_section("serial", SERIAL, self._serial)
        if self._pc is not None:
            yield from self._pc.sections()

    def start(self) -> None:
        """The vCPUs are about to run."""
        self.memory.not_fresh()
        if self.blobs is not None:
            self.blobs.not_fresh()
        self._kvmclock.start()
        self.clock.start()
        for timer in (self._pit, self._rtc):
            if timer is not None:
                timer.start()
        if self._serial is not None:
            self._serial.start()
        for disk in self._disks.values():
            disk.start()

    def stop(self) -> None:
        """No vCPU runs any more: disks end what they are at, timers ask for nothing, the clocks stand still."""
        for disk in self._disks.values():
            disk.stop()
        for timer in (self._pit, self._rtc):
            if timer is not None:
                timer.stop()
        self.clock.stop()
        self._kvmclock.stop()

    def reset(self, firmware: bytes) -> None:
        """As after power-on, the firmware in its place; RAM and clocks stay."""
        self.memory.load_firmware(firmware)
        if self.blobs is not None:
            self.blobs.fill()
        self._irqchip.reset()
        self._vapic.reset()
        self._fw_cfg.reset()
        for device in (self._ged, self._pit, self._rtc, self._serial):
            if device is not None:
                device.reset()
        if self._pc is not None:
            self._pc.reset()
        for blob in self._loaded:
            self.memory.write(blob.address, blob.data)
        for disk in self._disks.values():
            disk.hard_reset()

    @property
    def asleep(self) -> bool:
        """Whether the guest has suspended itself, and nobody has woken it yet."""
        return self._pc is not None and self._pc.asleep

    @asleep.setter
    def asleep(self, asleep: bool) -> None:
        if self._pc is not None:
            self._pc.asleep = asleep

    def wake(self, firmware: bytes) -> None:
        """Out of suspend: as after a reset, but for what tells the guest that it slept."""
        self.reset(firmware)
        if self._pc is not None:
            self._pc.wake()

    def claim_disks(self) -> None:
        """The images are this machine's; MachineError when somebody else has one."""
        for disk in self._disks.values():
            disk.claim()
        if self._pc is not None:
            self._pc.claim()

    def release_disks(self) -> None:
        """The images are about to be another machine's."""
        for disk in self._disks.values():
            disk.release()
        if self._pc is not None:
            self._pc.release()

    def close(self) -> None:
        """End the threads of devices, give their memory back; twice is allowed."""
        for disk in self._disks.values():
            disk.close()
        self._deadlines.close()
        if self.client_time is not None:
            self.client_time.close()
        if self.blobs is not None:
            self.blobs.close()

    @property
    def pins(self) -> InputPins:
        """The input pins of the first I/O APIC."""
        return self._irqchip.pins

    @property
    def pic_asks(self) -> bool:
        """Whether the PICs ask vCPU 0 for something."""
        return self._irqchip.pic_asks

    def press_power_button(self) -> bool:
        """Tell the guest that somebody wants it to end; False when it cannot be told, for want of ACPI."""
        button = self._ged or self._pc
        if button is None:
            return False
        button.press_power_button()
        return True

    def _make_blobs(self, config: MachineConfig) -> Blobs | None:
        if not config.chipset.acpi:
            return None
        slots = [disk.slot for disk in config.disks]
        described = Described(config.chipset, config.cpus, config.max_cpus, config.isa_serial, slots)
        return Blobs(build_tables(described))

    def _make_fw_cfg(self, config: MachineConfig) -> fw_cfg.FwCfg:
        access = fw_cfg.GuestAccess(self.memory.read, self.memory.write)
        files: dict[str, fw_cfg.Item | bytes] = {}
        if not config.machine_type.is_pc:
            files["etc/fdt"] = build_tree(config.chipset, config.isa_serial, [disk.slot for disk in config.disks])
        if self.blobs is not None:
            files |= {blob.name: blob for blob in self.blobs.files}
        return fw_cfg.FwCfg(config.ram_size, config.cpus, config.max_cpus, access, files, self.blobs)

    def _make_pc(self, config: MachineConfig, events: BoardEvents, warn: Callable[[str], None]) -> PcDevices:
        requests = PcRequests(
            reset=events.reset,
            power_off=events.power_off,
            suspend=events.suspend,
            sci=self._irqchip.line(acpi_pm.GSI),
            now=lambda: self.clock.now,
        )
        return PcDevices(config.disks, not config.bios, self.memory.write, warn, requests)

    def _make_serial(self, config: MachineConfig) -> serial.Serial:
        backend = config.serial
        send = backend.write if backend is not None else len
        uart = serial.Serial(send, self._irqchip.line(serial.GSI))
        if backend is not None:
            uart.connect(backend)
        return uart

    def _add_disk(self, disk: DiskConfig, legacy: bool, events: DiskEvents, warn: Callable[[str], None]) -> None:
        memory = DmaMemory(self.memory)
        line = self._irqchip.line(self._chipset.first_virtio_gsi + disk.slot)
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
        self.last_sections.append(board_section(f"virtio-mmio@{address:016x}/virtio-blk", VIRTIO_BLK, made))

    def _register_devices(self) -> None:
        self.ports.register(*fw_cfg.PORTS, self._fw_cfg, widest=2)
        self.ports.register(*fw_cfg.DMA_PORTS, fw_cfg.DmaPorts(self._fw_cfg), widest=8)
        if self._serial is not None:
            self.ports.register(*serial.PORTS, self._serial, widest=1)
        if self._pit is not None:
            self.ports.register(*pit.PORTS, self._pit, widest=1)
        if self._rtc is not None:
            self.ports.register(*rtc.PORTS, self._rtc, widest=1)
        if self._ged is not None:
            self.mmio.register(*ged.EVENTS, self._ged, widest=4)
            self.mmio.register(*ged.REGISTERS, ged.GedRegisters(self._ged), widest=1)
        if self._irqchip.second is not None:
            self.mmio.register(*ioapic.ADDRESS, self._irqchip.second, widest=4)
        if self._pc is not None:
            self._pc.register(self.ports)

    def _register_slots(self, empty: EmptySlot, taken: set[int]) -> None:
        for slot in set(range(self._chipset.virtio_slots)) - taken:
            self.mmio.register(virtio_mmio.slot_address(slot), virtio_mmio.SLOT_SIZE, empty, widest=4)


class DmaMemory:
    """*memory* as a device with DMA wants it: it asks first whether a range is RAM."""

    def __init__(self, memory: GuestMemory) -> None:
        self.read = memory.read
        self.write = memory.write
        self._extents: list[tuple[int, int]] = []  # start and end of RAM without a gap
        for piece in memory.pieces:
            end = piece.guest_address + piece.size
            if self._extents and self._extents[-1][1] == piece.guest_address:
                self._extents[-1] = self._extents[-1][0], end
            else:
                self._extents.append((piece.guest_address, end))

    def holds(self, guest_address: int, length: int) -> bool:
        """Whether all of the range is RAM."""
        return any(start <= guest_address and guest_address + length <= end for start, end in self._extents)


def _require_ram(blobs: Sequence[Blob], ram: DmaMemory) -> Sequence[Blob]:
    """*blobs*, all of which are in RAM and apart from each other; else MachineError."""
    for blob in blobs:
        if not ram.holds(blob.address, len(blob.data)):
            end = blob.address + len(blob.data)
            raise MachineError(f"-device loader: {blob.address:#x} … {end:#x} is not all RAM of this machine")
    ordered = sorted(blobs, key=lambda blob: blob.address)
    for one, other in pairwise(ordered):
        if one.address + len(one.data) > other.address:
            where = " and ".join(f"{each.address:#x} … {each.address + len(each.data):#x}" for each in (one, other))
            raise MachineError(f"-device loader: {where} overlap")
    return blobs
