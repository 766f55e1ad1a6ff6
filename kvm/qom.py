"""A tree of objects as QEMU's clients walk it: each has a type, properties and children (qmp.md §14).

    /machine  /machine/unattached/device[0]  /objects/mem0  /chardevs/compat_monitor0

A path that begins with "/" is followed from the root; any other is the end of a path, and means the one object whose
path ends so.

Threads   the loop's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qemumig.commands.command import ANY, CommandError, Type


def _refuse(value: Any) -> None:
    """The writer of a property that nobody writes."""


@dataclass(frozen=True)
class Property:
    """A value of an object: its type in QEMU's words, how to read it, how to write it, and what may be written."""

    word: str
    read: Callable[[], Any]
    write: Callable[[Any], None] = _refuse
    accepts: Type = ANY

    @property
    def is_writable(self) -> bool:
        return self.write is not _refuse


def constant(word: str, value: Any) -> Property:
    """A property that only shows *value*."""
    return Property(word, lambda: value)


class Node:
    """An object of type *type_name*."""

    def __init__(self, type_name: str, properties: Mapping[str, Property] | None = None) -> None:
        self.type_name = type_name
        self.properties = dict(properties or {})
        self.children: dict[str, Node] = {}

    def add(self, name: str, child: Node) -> Node:
        """Put *child* below this object; CommandError when there is something of that name."""
        if name in self.children or name in self.properties:
            text = f"attempt to add duplicate property '{name}' to object (type '{self.type_name}')"
            raise CommandError(text)
        self.children[name] = child
        return child

    def describe(self) -> list[dict[str, str]]:
        """What `qom-list` shows of it."""
        entries = {"type": "string"}
        entries |= {name: entry.word for name, entry in self.properties.items()}
        entries |= {name: f"child<{child.type_name}>" for name, child in self.children.items()}
        return [{"name": name, "type": word} for name, word in entries.items()]

    def walk(self, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Node]]:
        """This object and all below it, each with its path."""
        yield path, self
        for name, child in self.children.items():
            yield from child.walk((*path, name))


class Tree:
    """Everything below *root*, by path."""

    def __init__(self, root: Node) -> None:
        self.root = root

    def find(self, path: str) -> tuple[str, Node]:
        """The object at *path*, and its whole path; CommandError when there is none, or more than one."""
        parts = tuple(part for part in path.split("/") if part)
        found = [
            (whole, node)
            for whole, node in self.root.walk()
            if whole == parts or (not path.startswith("/") and whole[len(whole) - len(parts) :] == parts)
        ]
        if not found:
            raise CommandError(f"Device '{path}' not found", "DeviceNotFound")
        if len(found) > 1:
            raise CommandError(f"Path '{path}' is ambiguous")
        whole, node = found[0]
        return "/" + "/".join(whole), node

    def get(self, path: str, property: str) -> Any:
        """The value of *property*; a child's is its path."""
        whole, node = self.find(path)
        if property == "type":
            return node.type_name
        if property in node.children:
            return f"{whole.rstrip('/')}/{property}"
        return _property(node, property).read()

    def set(self, path: str, property: str, value: Any) -> None:
        """Write *property*; CommandError when it cannot be written, or not with this value."""
        _, node = self.find(path)
        entry = None if property == "type" or property in node.children else _property(node, property)
        if entry is None or not entry.is_writable:
            raise CommandError(f"Property '{node.type_name}.{property}' is not writable")
        entry.write(entry.accepts.check(value, property))


def _property(node: Node, name: str) -> Property:
    entry = node.properties.get(name)
    if entry is None:
        raise CommandError(f"Property '{node.type_name}.{name}' not found")
    return entry
