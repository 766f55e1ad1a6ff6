"""What a machine is built from: the command line fills this in, kvm.machine reads it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .machine_types import MICROVM, MachineType

if TYPE_CHECKING:
    from .block import RawImage
    from .chardev import CharBackend
    from .memory import HostMemory


VIRTIO_MMIO_SLOTS = 8  # with one I/O APIC
_IOAPIC_PINS = 24


@dataclass(frozen=True)
class Chipset:
    """Which of its optional devices the machine has; without any it is the smallest there is.

    Slots of virtio-mmio lead to the second I/O APIC when there is one, else to lines that ACPI leaves free.
    """

    acpi: bool = False  # tables, and the generic event device
    ioapic2: bool = False  # the second I/O APIC, which comes with ACPI only
    pit: bool = False
    pic: bool = False
    rtc: bool = False

    @property
    def virtio_slots(self) -> int:
        """How many virtio-mmio slots there are."""
        return _IOAPIC_PINS if self.ioapic2 else VIRTIO_MMIO_SLOTS

    @property
    def first_virtio_gsi(self) -> int:
        """The GSI of slot 0; the other slots follow (machine.md §3)."""
        if self.ioapic2:
            return _IOAPIC_PINS
        return 16 if self.acpi else 5


@dataclass(frozen=True)
class DiskConfig:
    """A disk; *slot* counts its kind's places from 0, error actions are as -device says them."""

    name: str  # of the block node or drive
    image: RawImage
    slot: int
    on_read_error: str = "report"
    on_write_error: str = "enospc"
    writeback: bool = True
    serial: str = ""
    kind: str = "virtio-blk-device"  # or "ide-hd"
    boot_index: int | None = None  # a PC boots the disk with the lowest, else the first one


@dataclass(frozen=True)
class Blob:
    """Bytes that are put at *address* at each reset (-device loader)."""

    address: int
    data: bytes


@dataclass
class MachineConfig:
    """A machine in plain words; sizes in bytes."""

    machine_type: MachineType = MICROVM
    ram_size: int = 128 << 20
    cpus: int = 1
    max_cpus: int = 1
    runs_guest: bool = True  # False: vCPUs never run
    bios: str = ""  # path of the firmware image, a multiple of 64 KiB long; "" for a PC's own
    cpu_model: str = "qemu64"
    cpu_features: dict[str, bool] = field(default_factory=dict)  # "pni": False, …
    ram_backend: HostMemory | None = None  # from -object memory-backend-*; None: anonymous memory of ram_size
    ram_idstr: str = "microvm.ram"  # name of the main RAM block on the wire
    kernel_irqchip: str = "split"  # "on" or "split", as on the command line; both run in the kernel here
    chipset: Chipset = field(default_factory=Chipset)
    isa_serial: bool = True
    serial: CharBackend | None = None  # back end of the serial port
    disks: list[DiskConfig] = field(default_factory=list)
    blobs: list[Blob] = field(default_factory=list)
    entry_points: dict[int, int] = field(default_factory=dict)  # vCPU → its instruction pointer after a reset
    legacy_virtio: bool = True  # virtio-mmio slots are of version 1
    vapic: bool = True  # the kvm-tpr-opt section exists
    uuid: bytes | None = None  # 16 bytes
    name: str | None = None
    incoming: bool = False  # memory stays empty: the stream fills it, the firmware too
    manual_dirty_log: bool = True  # KVM_CLEAR_DIRTY_LOG where the kernel has it
