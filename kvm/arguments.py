"""What the command line asked for, as plain records: options.py fills them in, main.py reads them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .config import Chipset
from .keyval import UsageError, switch
from .machine_types import DEFAULT, MachineType


class HelpRequested(Exception):
    """The command line asks for text instead of a machine."""


@dataclass(frozen=True)
class MonitorRequest:
    """A monitor: on the -chardev called *chardev*, or on its own *device*; *option* made it.

    *human*: for people (HMP), else for programs (QMP).
    """

    option: str
    chardev: str = ""
    device: str = ""
    pretty: bool = False
    human: bool = False


@dataclass(frozen=True)
class ObjectRequest:
    """An object to be made: its QOM type, its id, its other properties by name, checked."""

    kind: str
    id: str
    properties: dict[str, Any]


@dataclass(frozen=True)
class DriveRequest:
    """A -drive in its own words, or a shorter option that means one; *option* as it was typed, for messages."""

    option: str
    text: str


@dataclass(frozen=True)
class Actions:
    """What follows on events in the guest (-action)."""

    reboot: str = "reset"
    shutdown: str = "poweroff"
    panic: str = "shutdown"
    watchdog: str = "reset"


@dataclass(frozen=True)
class RunWith:
    """What the process does to itself (-run-with)."""

    exit_with_parent: bool = False
    chroot: str | None = None
    user: str | None = None


@dataclass
class Arguments:
    """What the command line asked for; sizes in bytes."""

    machine_type: MachineType = DEFAULT
    machine: dict[str, str | None] = field(default_factory=dict)
    accelerators: list[tuple[str, str]] = field(default_factory=list)  # option as typed, value
    enable_kvm: bool = False
    runs_guest: bool = True  # False with -accel qtest
    memory: dict[str, str | None] = field(default_factory=dict)
    topology: dict[str, str | None] = field(default_factory=dict)
    ram_size: int = 0  # 0: not said
    cpus: int = 1
    max_cpus: int = 1
    cpu_model: str = "qemu64"
    cpu_features: dict[str, bool] = field(default_factory=dict)
    kernel_irqchip: str = "split"
    chipset: Chipset = field(default_factory=Chipset)
    bios: str | None = None
    kernel: str | None = None
    serials: list[str] = field(default_factory=list)
    chardevs: list[str] = field(default_factory=list)
    monitors: list[MonitorRequest] = field(default_factory=list)
    default_monitor: bool = True  # nobody asked for one, nor for none
    qtest: str | None = None
    qtest_log: str | None = None  # None: standard error
    objects: list[ObjectRequest] = field(default_factory=list)
    descriptors: list[tuple[int, int, str | None]] = field(default_factory=list)  # -add-fd: fd, set, opaque
    blockdevs: list[str] = field(default_factory=list)
    drives: list[DriveRequest] = field(default_factory=list)
    devices: list[str] = field(default_factory=list)
    snapshot: bool = False  # what is written to drives is forgotten at the end
    legacy_virtio: bool = True
    incoming: str | None = None
    incoming_channels: list[dict[str, Any]] | None = None  # when it is no URI
    loadvm: str | None = None
    paused: bool = False
    only_migratable: bool = False
    name: str | None = None
    process_name: str | None = None
    uuid: bytes | None = None
    defaults: bool = True
    nographic: bool = False
    pidfile: str | None = None
    daemonize: bool = False
    actions: Actions = Actions()
    run_with: RunWith = RunWith()
    timestamps: bool = False
    names_guest: bool = False  # -msg guest-name=on
    migration_properties: list[tuple[str, str]] = field(default_factory=list)
    vapic: bool = True
    traces: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)  # as typed, by key
    log_file: str | None = None  # -D
    warnings: list[str] = field(default_factory=list)

    @property
    def memory_backend(self) -> str | None:
        """The id of the backend that is the machine's RAM."""
        return self.machine.get("memory-backend")

    def machine_switch(self, name: str, default: bool) -> bool:
        """Machine property *name*, which is on or off."""
        return switch(name, self.machine[name]) if name in self.machine else default

    def serial_devices(self) -> list[str]:
        """The DEVs of the serial ports, what applies without -serial included."""
        if self.serials or not self.defaults:
            return self.serials
        return [("mon:stdio" if self.default_monitor else "stdio") if self.nographic else "null"]

    def require_object(self, name: str) -> ObjectRequest:
        """The -object of that id."""
        for one in self.objects:
            if one.id == name:
                return one
        raise UsageError(f"Memory backend '{name}' not found")
