"""Commands a monitor can run, and the check of what a client passes to them (qmp.md §2).

In    the `arguments` object of a request, already parsed; any JSON value may be anywhere in it
Out   the handler's keyword arguments, or CommandError with the text QEMU uses

    Command("migrate-set-capabilities", handler, (Argument("capabilities", ListOf(Struct(
        Argument("capability", Enum(NAMES)), Argument("state", BOOL)))),))
    Command("query-name", handler, returns=Struct(Argument("name", STR, optional=True)))
    Event("MIGRATION", Argument("status", Enum(STATUSES)))

A handler gets the members of `arguments` as keywords, dashes turned into underscores; optional members that the
client left out are not passed.  Nested objects stay dictionaries with the spelling of the wire.  A handler is a
function or a coroutine function; it is called on the thread of the event loop and returns a JSON value, or None for
an empty object.  What a command returns and an event carries is declared with the same types: schema.py tells it to
clients, tests hold the handlers to it.

Threads   `call` runs where the monitor runs.  An Emit may be called from any thread.
Holds     (1) a handler never sees a member that was not declared, nor a value outside its type
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ..errors import MigrationError

INT64_MIN, INT64_MAX = -(1 << 63), (1 << 63) - 1
UINT64_MAX = (1 << 64) - 1


class Emit(Protocol):
    """Sends an event to every monitor that listens; may be called from any thread."""

    def __call__(self, name: str, data: dict[str, Any] | None = None) -> None: ...


class CommandError(Exception):
    """A command failed; *desc* is the text for people, *error_class* the word for programs (qmp.md §1.3)."""

    def __init__(self, desc: str, error_class: str = "GenericError") -> None:
        super().__init__(desc)
        self.desc = desc
        self.error_class = error_class


class Type(Protocol):
    """A QAPI type: `check` returns *value* as the handler gets it; *path* names it in errors."""

    def check(self, value: Any, path: str) -> Any: ...


def wrong_type(path: str, expected: str) -> CommandError:
    """The error for a value whose JSON type is wrong."""
    return CommandError(f"Invalid parameter type for '{path}', expected: {expected}")


@dataclass(frozen=True)
class Simple:
    """A value of one Python type, taken as it is."""

    python_type: type
    word: str  # what QEMU calls it

    def check(self, value: Any, path: str) -> Any:
        if not isinstance(value, self.python_type):
            raise wrong_type(path, self.word)
        return value


@dataclass(frozen=True)
class StrOrNull:
    """A string, or null, which means the empty string."""

    def check(self, value: Any, path: str) -> str:
        if value is None:
            return ""
        if not isinstance(value, str):
            raise wrong_type(path, "StrOrNull")
        return value


@dataclass(frozen=True)
class Anything:
    """Any JSON value."""

    def check(self, value: Any, path: str) -> Any:
        return value


@dataclass(frozen=True)
class Integer:
    """An unsigned integer up to *maximum*; a negative one wraps modulo 2^64 where *wraps* says so, as QEMU does."""

    maximum: int
    range_word: str  # said when the number is too small or too big
    wraps: bool = False

    def check(self, value: Any, path: str) -> int:
        if not isinstance(value, int) or isinstance(value, bool):
            raise CommandError(f"Parameter '{path}' expects uint64")
        if self.wraps and INT64_MIN <= value < 0:
            value &= UINT64_MAX
        if not 0 <= value <= self.maximum:
            place = path if self.wraps else leaf(path)
            raise CommandError(f"Parameter '{place}' expects {self.range_word}")
        return value


@dataclass(frozen=True)
class Signed:
    """An integer of 64 bits; one that does not fit is none at all."""

    def check(self, value: Any, path: str) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not INT64_MIN <= value <= INT64_MAX:
            raise wrong_type(path, "integer")
        return value


@dataclass(frozen=True)
class Number:
    """A number with or without a fraction."""

    def check(self, value: Any, path: str) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise wrong_type(path, "number")
        return value


def _unsigned(bits: int) -> Integer:
    return Integer((1 << bits) - 1, f"uint{bits}_t")


STR = Simple(str, "string")
BOOL = Simple(bool, "boolean")
ANY = Anything()
STR_OR_NULL = StrOrNull()
UINT8 = _unsigned(8)
UINT16 = _unsigned(16)
UINT32 = _unsigned(32)
UINT64 = Integer(UINT64_MAX, "uint64", wraps=True)
SIZE = UINT64
INT = Signed()
NUMBER = Number()


@dataclass(frozen=True)
class Enum:
    """One of a few strings, in QEMU's order."""

    values: tuple[str, ...]

    def __init__(self, values: Iterable[str]) -> None:
        object.__setattr__(self, "values", tuple(values))

    def check(self, value: Any, path: str) -> str:
        if not isinstance(value, str):
            raise wrong_type(path, "string")
        if value not in self.values:
            raise CommandError(f"Parameter '{leaf(path)}' does not accept value '{value}'")
        return value


def leaf(path: str) -> str:
    """The last name of *path*; "null" for an element of a list, which has no name."""
    return "null" if path.endswith("]") else path.rpartition(".")[2]


@dataclass(frozen=True)
class ListOf:
    """A list whose elements are all of one type."""

    element: Type

    def check(self, value: Any, path: str) -> list[Any]:
        if not isinstance(value, list):
            raise wrong_type(path, "array")
        return [self.element.check(item, f"{path}[{index}]") for index, item in enumerate(value)]


@dataclass(frozen=True)
class Argument:
    """A member of an object: its name on the wire, its type, and whether it may be left out."""

    name: str
    type: Type
    optional: bool = False


@dataclass(frozen=True)
class Struct:
    """An object with declared members; with *variants* the value of member *tag*, an Enum, chooses further ones.

    A tag value without an entry in *variants* adds no members.
    """

    members: tuple[Argument, ...]
    tag: str
    variants: Mapping[str, Struct]

    def __init__(self, *members: Argument, tag: str = "", variants: Mapping[str, Struct] | None = None) -> None:
        object.__setattr__(self, "members", members)
        object.__setattr__(self, "tag", tag)
        object.__setattr__(self, "variants", dict(variants or {}))

    def check(self, value: Any, path: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise wrong_type(path, "object")
        checked = self._check_members(value, path)
        for name in value:
            if name not in checked:
                raise CommandError(f"Parameter '{member_path(path, name)}' is unexpected")
        return checked

    def _check_members(self, value: dict[str, Any], path: str) -> dict[str, Any]:
        checked: dict[str, Any] = {}
        for member in self.members:
            where = member_path(path, member.name)
            if member.name in value:
                checked[member.name] = member.type.check(value[member.name], where)
            elif not member.optional:
                raise CommandError(f"Parameter '{where}' is missing")
        variant = self.variants.get(checked.get(self.tag, ""))
        if variant is not None:
            checked.update(variant._check_members(value, path))
        return checked


def member_path(path: str, name: str) -> str:
    """How errors call member *name* of the object at *path*."""
    return f"{path}.{name}" if path else name


Handler = Callable[..., Any]


NOTHING = Struct()  # what a command returns that has nothing to say


@dataclass(frozen=True)
class Event:
    """An event: its name, and the members of its data."""

    name: str
    data: Struct

    def __init__(self, name: str, *members: Argument) -> None:
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "data", Struct(*members))


@dataclass(frozen=True)
class Command:
    """A command: its name, who does it, what it takes and gives.

    *oob*: it may overtake others (`exec-oob`).  *leaves_with_client*: it is worth nothing to anybody but the client that
    asked, and is given up when that goes away.
    """

    name: str
    handler: Handler
    arguments: tuple[Argument, ...] | Struct = ()
    returns: Type = NOTHING
    oob: bool = False
    leaves_with_client: bool = False
    features: tuple[str, ...] = ()

    @property
    def takes(self) -> Struct:
        """The arguments as one object."""
        return self.arguments if isinstance(self.arguments, Struct) else Struct(*self.arguments)

    def check(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The handler's keywords for the client's *arguments*; CommandError names the first that is wrong."""
        checked = self.takes.check(arguments, "")
        return {name.replace("-", "_"): value for name, value in checked.items()}

    async def call(self, arguments: dict[str, Any]) -> Any:
        """Check *arguments*, run the handler, return its JSON value ({} for None); raises CommandError only.

        A MigrationError from the handler becomes a GenericError with its text.
        """
        keywords = self.check(arguments)
        try:
            result = self.handler(**keywords)
            if inspect.isawaitable(result):
                result = await result
        except MigrationError as error:
            raise CommandError(str(error)) from error
        return {} if result is None else result
