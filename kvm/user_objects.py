"""Objects that users make, with -object or object-add: below /objects in the tree, by their id (cli.md §4, qmp.md §14).

    Creatable     one kind: its QOM type, what may be said about a new one, who makes it
    UserObjects   those that there are; deleting one gives back what it holds

There are memory backends, and what migration channels use: credentials, authorization, secrets.

Threads   the loop's.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from qemumig.channels.objects import TYPES, create_object
from qemumig.channels.objects import Property as ChannelProperty
from qemumig.commands.command import BOOL, INT, SIZE, STR, UINT32, Argument, CommandError, Enum, ListOf, Struct, Type
from qemumig.errors import MigrationError

from .errors import KvmError
from .keyval import IDENTIFIER, UsageError
from .memory import PAGE_SIZE, HostMemory
from .qom import Node, Property, constant

POLICIES = Enum(("default", "preferred", "bind", "interleave"))
DEFAULTS = {"share": False, "dump": True, "merge": True, "prealloc": False, "reserve": True}
CANONICAL_PATH = "x-use-canonical-path-for-ramblock-id"

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class UserObject:
    """An object that somebody made: what the tree shows, *value* for who uses it, and what to do when it goes."""

    def __init__(self, node: Node, value: Any, close: Callable[[], None] = lambda: None) -> None:
        self.node = node
        self.value = value
        self.close = close
        self.in_use = False


@dataclass(frozen=True)
class Creatable:
    """A kind of object: its QOM type, the type above that, its members, and who makes one from an id and them."""

    name: str
    parent: str
    members: tuple[Argument, ...]
    create: Callable[[str, dict[str, Any]], UserObject]


class UserObjects:
    """All of them, and the kinds there are."""

    def __init__(self) -> None:
        self.container = Node("container")  # /objects
        self._objects: dict[str, UserObject] = {}
        self.kinds: dict[str, Creatable] = {}
        for kind in (*memory_backends(), *channel_objects(self.find)):
            self.kinds[kind.name] = kind

    def arguments(self) -> Struct:
        """What object-add takes."""
        return Struct(
            Argument("qom-type", Enum(self.kinds)),
            Argument("id", STR),
            tag="qom-type",
            variants={name: Struct(*kind.members) for name, kind in self.kinds.items()},
        )

    def create(self, kind: str, name: str, values: dict[str, Any]) -> None:
        """Make one, its values being checked already; CommandError says why not."""
        if not IDENTIFIER.fullmatch(name):
            raise CommandError("Parameter 'id' expects an identifier")
        if name in self._objects:
            self.container.add(name, self._objects[name].node)  # refuses
        try:
            self.add(name, self.kinds[kind].create(name, values))
        except (KvmError, UsageError, MigrationError, ValueError) as error:
            raise CommandError(str(error)) from error

    def add(self, name: str, made: UserObject) -> None:
        """Take an object in that was made already."""
        self.container.add(name, made.node)
        self._objects[name] = made

    def delete(self, name: str) -> None:
        """Let one go; CommandError while something uses it."""
        made = self._objects.get(name)
        if made is None:
            raise CommandError(f"object '{name}' not found")
        if made.in_use:
            raise CommandError(f"object '{name}' is in use, can not be deleted")
        del self._objects[name], self.container.children[name]
        made.close()

    def get(self, name: str) -> UserObject | None:
        """The object of that id."""
        return self._objects.get(name)

    def find(self, name: str) -> Any:
        """What the object of that id is to its users; None without one."""
        made = self._objects.get(name)
        return None if made is None else made.value

    def memories(self) -> list[dict[str, Any]]:
        """The memory backends among them, for query-memdev."""
        return [made.describe(name) for name, made in self._objects.items() if isinstance(made, MemoryBackend)]

    def close(self) -> None:
        """Give back what they hold."""
        while self._objects:
            _, made = self._objects.popitem()
            made.close()


# ---- what channels use ----

PARENTS = {"tls-creds": "tls-creds", "authz": "authz", "secret": "secret_common"}  # by the start of the name
RULE = Struct(
    Argument("match", STR),
    Argument("policy", Enum(("deny", "allow"))),
    Argument("format", Enum(("exact", "glob")), optional=True),
)
WORDS = {  # properties whose type has a name of its own
    "endpoint": "QCryptoTLSCredsEndpoint",
    "policy": "QAuthZListPolicy",
    "rules": "QAuthZListRule",
    "format": "QCryptoSecretFormat",
}


def channel_objects(find: Callable[[str], Any]) -> list[Creatable]:
    """Credentials, authorization and secrets; *find* gives those that there are already."""

    def create(kind: str, name: str, values: dict[str, Any]) -> UserObject:
        made = create_object(kind, name, values, find)
        known = {one.name: values.get(one.name, one.default) for one in TYPES[kind][0]}
        return UserObject(Node(kind, {key: _shown(key, value) for key, value in known.items()}), made)

    return [
        Creatable(
            name,
            next(parent for start, parent in PARENTS.items() if name.startswith(start)),
            tuple(Argument(one.name, _type_of(one), optional=not one.is_required) for one in properties),
            partial(create, name),
        )
        for name, (properties, _) in TYPES.items()
    ]


def _type_of(entry: ChannelProperty) -> Type:
    if isinstance(entry.kind, tuple):
        return Enum(entry.kind)
    types: dict[str, Type] = {"string": STR, "switch": BOOL, "list": ListOf(RULE)}
    return types[entry.kind]


def _shown(name: str, value: Any) -> Property:
    word = WORDS.get(name, "bool" if isinstance(value, bool) else "string")
    return constant(word, "" if value is None else value)


# ---- memory backends ----


def memory_backends() -> list[Creatable]:
    """The kinds of memory that the machine's RAM can be."""
    switches = tuple(Argument(name, BOOL, optional=True) for name in (*DEFAULTS, CANONICAL_PATH))
    numa = (
        Argument("policy", POLICIES, optional=True),
        Argument("host-nodes", ListOf(INT), optional=True),
        Argument("prealloc-threads", UINT32, optional=True),
    )
    common = (Argument("size", SIZE), *switches, *numa)
    file = (
        Argument("mem-path", STR),
        Argument("align", SIZE, optional=True),
        Argument("offset", SIZE, optional=True),
        Argument("discard-data", BOOL, optional=True),
        Argument("readonly", BOOL, optional=True),
        Argument("rom", Enum(("auto", "on", "off")), optional=True),
    )
    memfd = (
        Argument("hugetlb", BOOL, optional=True),
        Argument("hugetlbsize", SIZE, optional=True),
        Argument("seal", BOOL, optional=True),
    )
    members = {
        "memory-backend-ram": common,
        "memory-backend-file": common + file,
        "memory-backend-memfd": common + memfd,
        "memory-backend-shm": common,
    }
    return [
        Creatable(name, "memory-backend", arguments, partial(create_memory, name)) for name, arguments in members.items()
    ]


def create_memory(kind: str, name: str, values: dict[str, Any]) -> MemoryBackend:
    """A memory backend of *kind*; raises KvmError or CommandError."""
    if not values["size"]:
        raise CommandError(f"property 'size' of {kind} doesn't take value '0'")
    policy = values.get("policy", "default")
    if policy != "default" and not values.get("host-nodes"):
        raise CommandError(f"host-nodes must be set for policy {policy}")
    _refuse_policy("bind" if values.get("host-nodes") else policy)
    whole = {**values, "size": -(-values["size"] // PAGE_SIZE) * PAGE_SIZE}
    return MemoryBackend(kind, map_memory(kind, name, whole), values)


def map_memory(kind: str, name: str, values: dict[str, Any]) -> HostMemory:
    """The memory that such a backend has; raises KvmError."""
    ignored = ("size", "share", "policy", "host-nodes", "prealloc-threads", CANONICAL_PATH)
    wanted = {key.replace("-", "_"): value for key, value in values.items() if key not in ignored}
    if "share" in values:
        wanted["shared"] = values["share"]
    if kind == "memory-backend-memfd":
        return HostMemory.memfd(values["size"], name=name, **wanted)
    if kind == "memory-backend-shm":
        return HostMemory.shm(values["size"], **wanted)
    if kind == "memory-backend-ram":
        return HostMemory.anonymous(values["size"], **wanted)
    wanted["rom"] = {"auto": None, "on": True, "off": False}[wanted.get("rom", "auto")]
    return HostMemory.file(wanted.pop("mem_path"), values["size"], **wanted)


class MemoryBackend(UserObject):
    """Memory that is mapped already, and what its maker said about it."""

    def __init__(self, kind: str, memory: HostMemory, values: dict[str, Any]) -> None:
        self._memory = memory
        self._size = values["size"]  # as it was asked for
        self._state = {**DEFAULTS, **{key: values[key] for key in DEFAULTS if key in values}, "share": memory.shared}
        super().__init__(Node(kind, self._properties(kind, values)), memory, memory.close)

    def describe(self, name: str) -> dict[str, Any]:
        """What query-memdev shows."""
        return {"id": name, "size": self._size, **self._state}

    def _properties(self, kind: str, values: dict[str, Any]) -> dict[str, Property]:
        shown = {key: Property("bool", partial(self._state.get, key), partial(self._set, key), BOOL) for key in DEFAULTS}
        return {
            **shown,
            "size": Property("int", lambda: self._size, partial(_refuse_size, kind), SIZE),
            "policy": Property("HostMemPolicy", lambda: "default", _refuse_policy, POLICIES),
            "host-nodes": constant("int", []),
            CANONICAL_PATH: constant("bool", bool(values.get(CANONICAL_PATH, False))),
        }

    def _set(self, key: str, value: bool) -> None:
        """What can still be changed is advice to the kernel, which it may not take."""
        if key in ("share", "reserve"):
            raise CommandError("cannot change property value")
        if key == "prealloc" and value:
            self._memory.populate()
        if key in _ADVICE:
            _libc.madvise(self._memory.host_address, self._memory.size, _ADVICE[key][value])
        self._state[key] = value


_ADVICE = {
    "dump": (mmap.MADV_DONTDUMP, mmap.MADV_DODUMP),
    "merge": (mmap.MADV_UNMERGEABLE, mmap.MADV_MERGEABLE),
}


def _refuse_size(kind: str, value: int) -> None:
    raise CommandError(f"cannot change property size of {kind} ")


def _refuse_policy(policy: str) -> None:
    if policy != "default":
        raise CommandError("binding memory to host nodes is not built in this version of qemumig")
