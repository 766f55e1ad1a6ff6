"""What the machine is made of, as clients ask for it: vCPUs, memory, disks, character devices, machine types (qmp.md §14).

A machine of this kind has no network, no PCI bus, no balloon: the commands about those say so, in QEMU's words, so that
a client that looks everywhere finds nothing instead of an error.

Threads   the loop's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from qemumig.commands.command import BOOL, INT, STR, UINT64, Argument, Command, CommandError, ListOf, Struct
from qemumig.qapi import RunState

from ..chardev_options import CharDevices
from ..config import MachineConfig
from ..machine_options import CPU_MODELS
from ..machine_types import DEFAULT, MACHINES, MachineType
from . import types
from .disks import Disk, describe_node

ELSEWHERE = frozenset({RunState.INMIGRATE, RunState.FINISH_MIGRATE, RunState.POSTMIGRATE})  # the disks are another's


class CountedMachine(Protocol):
    """What is asked of the machine."""

    @property
    def runstate(self) -> RunState: ...

    def vcpu_thread_ids(self) -> list[int]: ...


class Inventory:
    """The commands about the parts of *machine*, which was made from *config*.

    *memories* describes the memory backends that there are now.
    """

    def __init__(
        self,
        machine: CountedMachine,
        config: MachineConfig,
        *,
        devices: CharDevices,
        disks: Sequence[Disk],
        memories: Callable[[], list[dict[str, Any]]],
    ) -> None:
        self._machine = machine
        self._config = config
        self._devices = devices
        self._disks = disks
        self._memories = memories

    def commands(self) -> list[Command]:
        """The commands, for a registry."""
        compat = (Argument("compat-props", BOOL, optional=True),)
        wakeup = Struct(Argument("wakeup-suspend-support", BOOL))
        return [
            Command("query-cpus-fast", self.query_cpus, returns=types.CPUS),
            Command("query-cpu-definitions", query_cpu_definitions, returns=types.CPU_DEFINITIONS),
            Command("query-machines", self.query_machines, compat, returns=types.MACHINES),
            Command("query-current-machine", self.query_current_machine, returns=wakeup),
            Command("query-memdev", self.query_memdev, returns=types.MEMDEVS),
            Command("query-memory-size-summary", self.query_memory_size, returns=types.MEMORY_SIZE),
            Command("query-chardev", self.query_chardev, returns=types.CHARDEVS),
            Command("query-block", self.query_block, returns=types.BLOCKS),
            Command(
                "query-named-block-nodes",
                self.query_named_block_nodes,
                (Argument("flat", BOOL, optional=True),),
                returns=ListOf(types.BLOCK_NODE),
            ),
            *absent_parts(),
        ]

    # ---- vCPUs and memory ----

    def query_cpus(self) -> list[dict[str, Any]]:
        return [
            {
                "cpu-index": index,
                "thread-id": thread_id,
                "qom-path": cpu_path(index, self._config.vapic),
                "props": {"socket-id": 0, "core-id": index, "thread-id": 0},
                "target": "x86_64",
            }
            for index, thread_id in enumerate(self._machine.vcpu_thread_ids())
        ]

    def query_machines(self, compat_props: bool = False) -> list[dict[str, Any]]:
        return [describe_machine(one) | ({"compat-props": []} if compat_props else {}) for one in MACHINES]

    def query_current_machine(self) -> dict[str, bool]:
        return {"wakeup-suspend-support": self._config.machine_type.is_pc}

    def query_memdev(self) -> list[dict[str, Any]]:
        return [{**memory, "host-nodes": [], "policy": "default"} for memory in self._memories()]

    def query_memory_size(self) -> dict[str, int]:
        return {"base-memory": self._config.ram_size, "plugged-memory": 0}

    # ---- character devices and disks ----

    def query_chardev(self) -> list[dict[str, Any]]:
        return [
            {"label": backend.label, "filename": backend.description, "frontend-open": backend.in_use}
            for backend in self._devices
        ]

    def query_block(self) -> list[dict[str, Any]]:
        return [
            {
                "device": disk.drive,
                "qdev": disk.device,
                "type": "unknown",
                "removable": False,
                "locked": False,
                "io-status": "ok",
                "inserted": node,
            }
            for disk, node in zip(self._disks, self.query_named_block_nodes(), strict=True)
        ]

    def query_named_block_nodes(self, flat: bool = False) -> list[dict[str, Any]]:
        active = self._machine.runstate not in ELSEWHERE
        return [describe_node(disk, active) for disk in self._disks]


def cpu_path(index: int, vapic: bool) -> str:
    """Where vCPU *index* is in the tree of objects: the second device made is a helper of the first vCPU."""
    return f"/machine/unattached/device[{index + (1 if index and vapic else 0)}]"


def describe_machine(machine: MachineType) -> dict[str, Any]:
    """A machine as `query-machines` shows it."""
    entry: dict[str, Any] = {"name": machine.name}
    if machine.alias:
        entry["alias"] = machine.alias
    if machine is DEFAULT:
        entry["is-default"] = True
    entry |= {
        "cpu-max": machine.max_cpus,
        "hotpluggable-cpus": False,
        "numa-mem-supported": False,
        "deprecated": False,
        "acpi": not machine.is_empty,
    }
    if not machine.is_empty:
        entry |= {"default-cpu-type": "qemu64-x86_64-cpu", "default-ram-id": machine.ram_idstr}
    return entry


def query_cpu_definitions() -> list[dict[str, Any]]:
    """The CPU models there are."""
    return [
        {
            "name": name,
            "typename": f"{name}-x86_64-cpu",
            "static": False,
            "migration-safe": name not in ("host", "max"),
            "unavailable-features": [],
            "deprecated": False,
        }
        | ({"alias-of": "qemu64-v1"} if name == "qemu64" else {})
        for name in CPU_MODELS
    ]


# ---- what there is none of ----


def absent_parts() -> Iterable[Command]:
    """Commands about parts that this machine never has."""
    announcement = tuple(Argument(name, INT) for name in ("initial", "max", "rounds", "step"))
    chosen = (Argument("interfaces", ListOf(STR), optional=True), Argument("id", STR, optional=True))
    return [
        Command("query-balloon", no_balloon, returns=Struct(Argument("actual", UINT64))),
        Command("query-iothreads", list, returns=ListOf(Struct(Argument("id", STR), Argument("thread-id", INT)))),
        Command("query-pci", list, returns=ListOf(Struct(Argument("bus", INT)))),
        Command(
            "query-rx-filter",
            no_network_card,
            (Argument("name", STR, optional=True),),
            returns=ListOf(Struct(Argument("name", STR))),
        ),
        Command("announce-self", announce_nothing, (*announcement, *chosen)),
    ]


def no_balloon() -> None:
    """Ask how large a balloon is."""
    raise CommandError("No balloon device has been activated", "DeviceNotActive")


def no_network_card(name: str | None = None) -> list[dict[str, Any]]:
    """List network cards, or look for the one called *name*."""
    if name is not None:
        raise CommandError(f"invalid net client name: {name}")
    return []


def announce_nothing(**_schedule: Any) -> None:
    """Have every network card tell the switches where it is: there is none."""
