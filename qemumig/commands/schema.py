"""What `query-qmp-schema` says of a table of commands and events: their declarations, turned inside out.

    Command("query-name", …, returns=Struct(Argument("name", STR, optional=True)))
      →  {"name": "query-name", "meta-type": "command", "arg-type": "0", "ret-type": "1"}
         {"name": "0", "meta-type": "object", "members": []}
         {"name": "1", "meta-type": "object", "members": [{"name": "name", "type": "str", "default": null}]}

Types have numbers for names, as in QEMU: a client finds its way from the commands.  Equal declarations are one type.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .command import (
    Anything,
    Argument,
    Command,
    Enum,
    Event,
    Integer,
    ListOf,
    Number,
    Signed,
    Simple,
    StrOrNull,
    Struct,
    Type,
)

Entry = dict[str, Any]

_BUILTIN_WORDS = {"string": "str", "boolean": "bool"}
_JSON_TYPES = {"str": "string", "bool": "boolean", "int": "int", "number": "number", "null": "null", "any": "value"}


def describe(commands: Iterable[Command], events: Iterable[Event] = ()) -> list[Entry]:
    """SchemaInfo of *commands* and *events*, then of every type they use."""
    return _Writer().write(commands, events)


class _Writer:
    """The types met so far, each with its name."""

    def __init__(self) -> None:
        self._types: list[Entry] = []
        self._names: dict[str, str] = {}  # a declaration's own text → its name

    def write(self, commands: Iterable[Command], events: Iterable[Event]) -> list[Entry]:
        entries = [self._command(command) for command in commands]
        entries += [self._event(event) for event in events]
        return entries + self._types

    def _command(self, command: Command) -> Entry:
        entry: Entry = {
            "name": command.name,
            "meta-type": "command",
            "arg-type": self._name(command.takes),
            "ret-type": self._name(command.returns),
        }
        if command.oob:
            entry["allow-oob"] = True
        if command.features:
            entry["features"] = list(command.features)
        return entry

    def _event(self, event: Event) -> Entry:
        return {"name": event.name, "meta-type": "event", "arg-type": self._name(event.data)}

    def _name(self, declared: Type) -> str:
        """The name of a type, which is described when it is new."""
        builtin = _builtin(declared)
        if builtin:
            return self._known(builtin, {"name": builtin, "meta-type": "builtin", "json-type": _JSON_TYPES[builtin]})
        key = repr(declared)
        if key not in self._names:
            prefix = "[{}]" if isinstance(declared, ListOf) else "{}"
            inner = self._name(declared.element) if isinstance(declared, ListOf) else str(len(self._names))
            self._names[key] = prefix.format(inner)
            entry: Entry = {"name": self._names[key]}
            self._types.append(entry)
            entry.update(self._body(declared, inner))
        return self._names[key]

    def _known(self, key: str, entry: Entry) -> str:
        if key not in self._names:
            self._names[key] = key
            self._types.append(entry)
        return key

    def _body(self, declared: Type, inner: str) -> Entry:
        if isinstance(declared, ListOf):
            return {"meta-type": "array", "element-type": inner}
        if isinstance(declared, Enum):
            members = [{"name": value} for value in declared.values]
            return {"meta-type": "enum", "members": members, "values": list(declared.values)}
        if isinstance(declared, StrOrNull):
            return {"meta-type": "alternate", "members": [{"type": self._name(part)} for part in _EITHER]}
        if isinstance(declared, Struct):
            return self._struct(declared)
        raise TypeError(f"{declared!r} has no place in a schema")

    def _struct(self, declared: Struct) -> Entry:
        entry: Entry = {"meta-type": "object", "members": [self._member(member) for member in declared.members]}
        if declared.tag:
            entry["tag"] = declared.tag
            entry["variants"] = [
                {"case": case, "type": self._name(declared.variants.get(case, Struct()))} for case in _cases(declared)
            ]
        return entry

    def _member(self, member: Argument) -> Entry:
        entry: Entry = {"name": member.name, "type": self._name(member.type)}
        if member.optional:
            entry["default"] = None
        return entry


class _Null:
    """The type of null alone, which no argument has by itself."""

    def check(self, value: Any, path: str) -> Any:
        return value


_EITHER: tuple[Type, ...] = (Simple(str, "string"), _Null())


def _builtin(declared: Type) -> str:
    """The name of a type that needs no description; "" for one that does."""
    if isinstance(declared, Simple):
        return _BUILTIN_WORDS[declared.word]
    if isinstance(declared, Integer | Signed):
        return "int"
    if isinstance(declared, Number):
        return "number"
    if isinstance(declared, Anything):
        return "any"
    return "null" if isinstance(declared, _Null) else ""


def _cases(declared: Struct) -> tuple[str, ...]:
    """The values that the tag of *declared* may have."""
    (tag,) = (member.type for member in declared.members if member.name == declared.tag)
    assert isinstance(tag, Enum), f"tag '{declared.tag}' is no Enum"
    return tag.values
