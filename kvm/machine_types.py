"""The machines that -machine can name, each with what the command line and the monitor must know of it.

    microvm           QEMU's machine of that name, state for state                          machine.md
    pc-q35-…, pc-…    a minimal PC: found where harnesses for QEMU look for one,            qtest.md §3.5
                      but with devices of its own
    none              no vCPU, no memory: for those who only ask

The minimal PC has QEMU's name towards users and one of its own in the stream: a PC of QEMU's must refuse its state, and
it theirs, before anything else is looked at.  Its memory is split as in QEMU's PC of that name.
"""

from __future__ import annotations

from dataclasses import dataclass

from .monitor.session import EMULATED

MAX_CPUS = 255
GIB = 1 << 30
_VERSION = "{major}.{minor}".format(**EMULATED)
_SWITCHES = ("usb", "mem-merge", "dump-guest-core", "suppress-vmdesc", "aux-ram-share")
_COMMON = ("accel", "kernel-irqchip", "memory-backend", *_SWITCHES)
_HONEST = "minimal PC of qemumig: boots a disk's first sector; not QEMU's device model"

# Devices that the machine may have, and what `auto`, or silence, means; ioapic2 comes with acpi only.
OPTIONAL_DEVICES = {"acpi": True, "ioapic2": True, "pit": True, "pic": True, "rtc": False}
MISSING_DEVICES = ("pcie",)  # `auto` and silence mean off, in QEMU too
MICROVM_SWITCHES = ("isa-serial", "x-option-roms", "auto-kernel-cmdline")
PC_SWITCHES = ("hpet", "smm", "vmport", "smbus", "sata", "fd-bootchk", "acpi")  # accepted: what they ask about is not there


@dataclass(frozen=True)
class MachineType:
    """A machine: its name for users and *wire_name* in the stream, what -machine may say about it."""

    name: str
    description: str
    wire_name: str
    switches: tuple[str, ...]
    tristates: tuple[str, ...] = ()  # on, off or auto
    alias: str = ""
    ram_idstr: str = ""  # of its main RAM block; "" for a machine without memory
    low_limit: int = 3 * GIB  # so much memory, or more, does not fit below 4 GiB: then only …
    low_split: int = 3 * GIB  # … so much of it is there
    max_cpus: int = MAX_CPUS
    is_pc: bool = False

    @property
    def properties(self) -> tuple[str, ...]:
        """All keys of -machine."""
        return (*_COMMON, *self.tristates, *self.switches)

    def low_memory(self, ram_size: int) -> int:
        """How much of *ram_size* bytes is below 4 GiB."""
        return ram_size if ram_size < self.low_limit else self.low_split

    @property
    def is_empty(self) -> bool:
        """Whether it has neither vCPU nor memory."""
        return not self.ram_idstr


def _pc(chipset: str, alias: str, low_limit: int, low_split: int) -> MachineType:
    return MachineType(
        f"pc-{chipset}-{_VERSION}",
        _HONEST,
        f"qemumig-{chipset}",
        (*_SWITCHES, *PC_SWITCHES),
        alias=alias,
        ram_idstr="pc.ram",
        low_limit=low_limit,
        low_split=low_split,
        is_pc=True,
    )


MICROVM = MachineType(
    "microvm",
    "microvm (i386)",
    "microvm",
    (*_SWITCHES, *MICROVM_SWITCHES),
    (*OPTIONAL_DEVICES, *MISSING_DEVICES),
    ram_idstr="microvm.ram",
)
NONE = MachineType("none", "empty machine", "none", _SWITCHES, max_cpus=1)
DEFAULT = MICROVM
MACHINES = (MICROVM, _pc("q35", "q35", 0xB000_0000, 2 * GIB), _pc("i440fx", "pc", 0xE000_0000, 3 * GIB), NONE)


def find_machine(name: str) -> MachineType | None:
    """The machine of that name or alias."""
    return next((one for one in MACHINES if name in (one.name, one.alias or None)), None)


def list_machines() -> str:
    """What `-machine help` prints."""
    lines = ["Supported machines are:"]
    for one in MACHINES:
        if one.alias:
            lines.append(f"{one.alias:20} {one.description} (alias of {one.name})")
        lines.append(f"{one.name:20} {one.description}{' (default)' if one is DEFAULT else ''}")
    return "\n".join(lines)
