"""The tree of objects, and the commands that walk it and make new ones (qmp.md §14).

    /machine                      the machine's properties, as the command line has them
    /machine/unattached           vCPUs
    /machine/peripheral           devices with an id; those without are in peripheral-anon
    /objects                      what users made
    /chardevs                     character devices by label

Devices that clients have no reason to look at are not in the tree.

Threads   the loop's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qemumig.commands.command import ANY, BOOL, STR, Argument, Command

from ..chardev import CharBackend, FileBackend, PipeBackend, SocketBackend, StdioBackend
from ..chardev_options import CharDevices
from ..config import MachineConfig
from ..machine_options import CPU_MODELS
from ..machine_types import MACHINES
from ..qom import Node, Property, Tree, constant
from ..user_objects import Creatable, UserObjects
from .disks import Disk
from .inventory import cpu_path
from .types import PROPERTIES, QOM_TYPES

SWITCHES = {  # machine properties that are on or off, and what silence means
    "isa-serial": True,
    "x-option-roms": True,
    "auto-kernel-cmdline": True,
    "usb": False,
    "mem-merge": True,
    "dump-guest-core": True,
}
CHARDEV_TYPES: tuple[tuple[type[CharBackend], str], ...] = (
    (SocketBackend, "chardev-socket"),
    (FileBackend, "chardev-file"),
    (PipeBackend, "chardev-pipe"),
    (StdioBackend, "chardev-stdio"),
)
TYPES = {  # name → the type above it; of abstract ones there are no objects
    "container": "object",
    "accel": "object",
    "kvm-accel": "accel",
    "qtest-accel": "accel",
    "machine": "object",
    "x86-machine": "machine",
    **{f"{one.name}-machine": "machine" if one.is_empty else "x86-machine" for one in MACHINES},
    "memory-backend": "object",
    "chardev": "object",
    "chardev-fd": "chardev",
    "chardev-null": "chardev",
    "chardev-socket": "chardev",
    "chardev-file": "chardev-fd",
    "chardev-pipe": "chardev-fd",
    "chardev-stdio": "chardev-fd",
    "device": "object",
    "cpu": "device",
    "x86_64-cpu": "cpu",
    **{f"{name}-x86_64-cpu": "max-x86_64-cpu" if name == "host" else "x86_64-cpu" for name in CPU_MODELS},
    "sys-bus-device": "device",
    "virtio-mmio": "sys-bus-device",
    "kvmclock": "sys-bus-device",
    "kvmvapic": "sys-bus-device",
    "fw_cfg": "sys-bus-device",
    "fw_cfg_io": "fw_cfg",
    "ioapic-common": "sys-bus-device",
    "kvm-ioapic": "ioapic-common",
    "isa-device": "device",
    "isa-serial": "isa-device",
    "virtio-device": "device",
    "virtio-blk-device": "virtio-device",
    "ide-hd": "device",
    "loader": "device",
}
ABSTRACT = frozenset(
    (
        *("object", "machine", "x86-machine", "memory-backend", "chardev", "chardev-fd", "device", "cpu", "x86_64-cpu"),
        *(
            "sys-bus-device",
            "fw_cfg",
            "ioapic-common",
            "isa-device",
            "virtio-device",
            "tls-creds",
            "authz",
            "secret_common",
        ),
    )
)


class ObjectCommands:
    """The commands about the tree of *objects*, whose root is *tree*'s."""

    def __init__(self, tree: Tree, objects: UserObjects) -> None:
        self._tree = tree
        self._objects = objects

    def commands(self) -> list[Command]:
        """The commands, for a registry."""
        path, name = Argument("path", STR), Argument("property", STR)
        kinds = (Argument("implements", STR, optional=True), Argument("abstract", BOOL, optional=True))
        return [
            Command("qom-list", self.qom_list, (path,), returns=PROPERTIES),
            Command("qom-get", self._tree.get, (path, name), returns=ANY),
            Command("qom-set", self._tree.set, (path, name, Argument("value", ANY))),
            Command("qom-list-types", self.qom_list_types, kinds, returns=QOM_TYPES),
            Command("object-add", self.object_add, self._objects.arguments()),
            Command("object-del", lambda id: self._objects.delete(id), (Argument("id", STR),)),
        ]

    def qom_list(self, path: str) -> list[dict[str, str]]:
        return self._tree.find(path)[1].describe()

    def object_add(self, qom_type: str, id: str, **values: Any) -> None:
        self._objects.create(qom_type, id, {name.replace("_", "-"): value for name, value in values.items()})

    def qom_list_types(self, implements: str = "object", abstract: bool = False) -> list[dict[str, Any]]:
        parents = type_parents(self._objects.kinds)
        return [
            describe_type(name, parents)
            for name in (*parents, "object")
            if implements in lineage(name, parents, self._objects.kinds) and (abstract or name not in ABSTRACT)
        ]


def type_parents(kinds: Mapping[str, Creatable]) -> dict[str, str]:
    """Every type there is and the one above it."""
    return {**TYPES, **{kind.parent: "object" for kind in kinds.values()}, **{name: kinds[name].parent for name in kinds}}


def lineage(name: str, parents: Mapping[str, str], kinds: Mapping[str, Creatable]) -> Iterator[str]:
    """What a type implements: itself, the types above it, and that users may make one."""
    if name in kinds:
        yield "user-creatable"
    yield name
    while name in parents:
        name = parents[name]
        yield name


def describe_type(name: str, parents: Mapping[str, str]) -> dict[str, Any]:
    """A type as `qom-list-types` shows it."""
    entry: dict[str, Any] = {"name": name}
    if name in ABSTRACT:
        entry["abstract"] = True
    if name in parents:
        entry["parent"] = parents[name]
    return entry


# ---- the tree of a machine ----


def make_tree(
    config: MachineConfig,
    properties: Mapping[str, str | None],
    objects: UserObjects,
    devices: CharDevices,
    disks: Sequence[Disk],
) -> Tree:
    """The tree of a machine of *config*; *properties* are those of -machine."""
    root = Node("container")
    root.add("machine", machine_node(config, properties, disks))
    root.add("objects", objects.container)
    chardevs = root.add("chardevs", Node("container"))
    root.add("backend", Node("container"))
    for backend in devices:
        chardevs.add(backend.label, Node(chardev_type(backend)))
    return Tree(root)


def machine_node(config: MachineConfig, properties: Mapping[str, str | None], disks: Sequence[Disk]) -> Node:
    """/machine and what is below it."""
    machine = Node(f"{config.machine_type.name}-machine", machine_properties(config, properties))
    peripheral = machine.add("peripheral", Node("container"))
    anonymous = machine.add("peripheral-anon", Node("container"))
    unattached = machine.add("unattached", Node("container"))
    for disk in disks:
        place = peripheral if disk.path.startswith("/machine/peripheral/") else anonymous
        place.add(disk.path.rpartition("/")[2], Node(disk.model, {"drive": constant("str", disk.drive or disk.node)}))
    for index in range(config.cpus):
        unattached.add(cpu_path(index, config.vapic).rpartition("/")[2], cpu_node(config.cpu_model, index))
    return machine


def machine_properties(config: MachineConfig, given: Mapping[str, str | None]) -> dict[str, Property]:
    """What may be asked of /machine."""
    kind = config.machine_type
    backend = given.get("memory-backend") or kind.ram_idstr
    topology = ("threads", "cores", "modules", "clusters", "dies", "sockets", "books", "drawers")
    smp = {"cpus": config.cpus, "maxcpus": config.max_cpus, **dict.fromkeys(topology, 1), "cores": config.max_cpus}
    words = {"on": True, "yes": True, "true": True, "y": True, None: True}
    return {
        "firmware": constant("string", config.bios),
        "memory": constant("MemorySizeConfiguration", {"size": config.ram_size}),
        "memory-backend": constant("link<memory-backend>", f"/objects/{backend}" if backend else ""),
        "smp": constant("SMPConfiguration", smp),
        **{name: constant("OnOffAuto", given.get(name, "auto")) for name in kind.tristates},
        **{
            name: constant("bool", words.get(given[name], False) if name in given else default)
            for name, default in SWITCHES.items()
            if name in kind.switches
        },
    }


def cpu_node(model: str, index: int) -> Node:
    """A vCPU."""
    return Node(
        f"{model}-x86_64-cpu",
        {
            "realized": constant("bool", True),
            "hotplugged": constant("bool", False),
            "socket-id": constant("int32", 0),
            "core-id": constant("int32", index),
            "thread-id": constant("int32", 0),
        },
    )


def chardev_type(backend: CharBackend) -> str:
    """The QOM type of a character device."""
    return next((name for kind, name in CHARDEV_TYPES if isinstance(backend, kind)), "chardev-null")
