"""What makes a board a PC: its firmware, which boots a disk, and the devices that a microvm has not (qtest.md §3.5).

    ports       0x92 system control   0xCF9 reset control   0x600 ACPI power management
    firmware    out of reset ─▶ disk's first sector, at 0000:7C00 already, ends in 55 AA ─▶ jump to it, DL = 0x80
                                                                             else it halts for ever

The firmware is a few bytes of our own.  The board puts the sector of the first disk into memory when it is reset, or
wakes up; there is no disk controller, so that sector is all of a disk that a guest gets to see.  What real firmware sets
up otherwise is set up: address line 20, ACPI mode.  Interrupts are off, and none of its services exists.

Threads   As the board.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from qemumig.errors import MachineError
from qemumig.savevm.devices.port92 import PORT92
from qemumig.savevm.devices.qemumig_pm import QEMUMIG_PM

from ..block import SECTOR_SIZE, BlockError, RawImage
from ..config import DiskConfig
from . import acpi_pm, port92
from .bus import Bus
from .section import BoardSection, board_section

BOOT_ADDRESS = 0x7C00
FIRMWARE_SIZE = 64 << 10
_SIGNATURE = b"\x55\xaa"
_ENTRY = 0xE05B  # where a PC's firmware begins; in its own segment
_RESET_VECTOR = 0xFFF0
_JUMP_TO_ENTRY = bytes.fromhex("ea5be000f0")  # ljmp 0xF000:0xE05B
_CODE = bytes.fromhex(
    "fa fc 31c0 8ed8 8ec0 8ed0"  # cli; cld; xor ax, ax; mov ds, ax; mov es, ax; mov ss, ax
    "bc006f"  # mov sp, 0x6F00
    "813efe7d55aa 7507"  # cmp word [0x7DFE], 0xAA55; jne halt
    "b280 ea007c0000"  # mov dl, 0x80; ljmp 0:0x7C00
    "f4 ebfd"  # halt: hlt; jmp halt
)


def firmware() -> bytes:
    """The image, as -bios would name one."""
    image = bytearray(FIRMWARE_SIZE)
    image[_ENTRY : _ENTRY + len(_CODE)] = _CODE
    image[_RESET_VECTOR : _RESET_VECTOR + len(_JUMP_TO_ENTRY)] = _JUMP_TO_ENTRY
    return bytes(image)


@dataclass(frozen=True)
class PcRequests:
    """What the devices ask for, and of whom."""

    reset: Callable[[], None]
    power_off: Callable[[], None]
    suspend: Callable[[], None]
    sci: Callable[[bool], None]  # the interrupt line of ACPI
    now: Callable[[], int]  # the virtual clock


def _boot_order(disk: DiskConfig) -> tuple[bool, int, int]:
    return disk.boot_index is None, disk.boot_index or 0, disk.slot


class PcDevices:
    """The devices and disks; *write* puts bytes into guest memory.  None of the *requests* is carried out at once."""

    def __init__(
        self,
        disks: Sequence[DiskConfig],
        boots: bool,
        write: Callable[[int, bytes], None],
        warn: Callable[[str], None],
        requests: PcRequests,
    ) -> None:
        """*boots*: the firmware is ours and wants a sector."""
        in_order = sorted(disks, key=_boot_order)
        self._images: list[tuple[str, RawImage]] = [(disk.name, disk.image) for disk in in_order]
        self._boots = boots
        self._write = write
        self._warn = warn
        self._port92 = port92.Port92(requests.reset)
        self._reset_control = port92.ResetControl(requests.reset)
        self._pm = acpi_pm.PmBlock(requests.sci, requests.power_off, requests.suspend, requests.now)
        self.press_power_button = self._pm.press_power_button

    def register(self, ports: Bus) -> None:
        """Let the devices answer."""
        ports.register(*port92.PORTS, self._port92, widest=1)
        ports.register(*port92.RESET_PORTS, self._reset_control, widest=1)
        ports.register(*acpi_pm.PORTS, self._pm, widest=4)

    def sections(self) -> Iterator[BoardSection]:
        """In the order of the wire."""
        yield board_section("port92", PORT92, self._port92)
        yield board_section("qemumig-pm", QEMUMIG_PM, self._pm)

    def reset(self) -> None:
        """As after power-on, the boot sector in its place."""
        self._port92.reset()
        self._pm.reset()
        self._load_sector()

    def wake(self) -> None:
        """The board has been reset because the machine wakes up."""
        self._pm.wake()

    @property
    def asleep(self) -> bool:
        """Whether the guest has suspended itself, and nobody has woken it yet."""
        return self._pm.asleep

    @asleep.setter
    def asleep(self, asleep: bool) -> None:
        self._pm.asleep = asleep

    def _load_sector(self) -> None:
        if not self._boots:
            return
        sector = self._first_sector()
        self._write(BOOT_ADDRESS, sector)
        if not sector.endswith(_SIGNATURE):
            self._warn("no bootable disk: the first sector of the first disk does not end in 55 AA, or there is no disk")

    def _first_sector(self) -> bytes:
        if not self._images:
            return bytes(SECTOR_SIZE)
        name, image = self._images[0]
        try:
            return image.read(0, SECTOR_SIZE)
        except (OSError, ValueError) as error:
            self._warn(f"disk '{name}': its first sector cannot be read: {error}")
            return bytes(SECTOR_SIZE)

    def claim(self) -> None:
        """The images are this machine's; MachineError when somebody else has one."""
        for name, image in self._images:
            try:
                image.lock()
            except BlockError as error:
                raise MachineError(f"disk '{name}': {'; '.join((str(error), *error.hints))}") from error

    def release(self) -> None:
        """The images are about to be another machine's."""
        for _, image in self._images:
            image.unlock()
