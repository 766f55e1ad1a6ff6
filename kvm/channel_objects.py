"""The objects of migration's channels, as users make them: TLS credentials, authorizers, secrets (cli.md §4, qmp.md §14).

What they are and do is `qemumig.channels.objects`'s; here is only how a user says it and what the tree shows.

Threads   the loop's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from qemumig.channels.objects import TYPES, Property, create_object
from qemumig.commands.command import BOOL, STR, Argument, Enum, ListOf, Struct, Type

from . import qom
from .user_objects import Creatable, UserObject

RULES = ListOf(
    Struct(
        Argument("match", STR),
        Argument("policy", Enum(("deny", "allow"))),
        Argument("format", Enum(("exact", "glob")), optional=True),
    )
)
PARENTS = {"tls-creds": "tls-creds", "authz": "authz"}  # by how a type's name begins
HIDDEN = ("data", "file")  # of a secret


def channel_objects(find: Callable[[str], Any]) -> list[Creatable]:
    """Every kind; *find* gives the object with an id, or None, to those that refer to one."""
    return [
        Creatable(name, parent_of(name), tuple(map(argument, entries)), partial(make, name, find))
        for name, (entries, _) in TYPES.items()
    ]


def parent_of(name: str) -> str:
    return next((parent for start, parent in PARENTS.items() if name.startswith(start)), "object")


def argument(entry: Property) -> Argument:
    """What QMP takes for *entry*."""
    kinds: dict[Any, Type] = {"string": STR, "switch": BOOL, "list": RULES}
    kind = Enum(entry.kind) if isinstance(entry.kind, tuple) else kinds[entry.kind]
    return Argument(entry.name, kind, optional=not entry.is_required)


def make(name: str, find: Callable[[str], Any], object_id: str, values: dict[str, Any]) -> UserObject:
    """An object of type *name*; OptionError when it cannot be."""
    made = create_object(name, object_id, values, find)
    words = {"switch": "bool", "list": "list", "string": "string"}
    shown = {
        entry.name: qom.constant(
            words.get(str(entry.kind), "string"), values.get(entry.name, "" if entry.is_required else entry.default)
        )
        for entry in TYPES[name][0]
        if entry.name not in HIDDEN
    }
    return UserObject(qom.Node(name, shown), made)
