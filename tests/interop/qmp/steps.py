"""What is asked of both, and how the answers are looked at.

A Step is a request and the QEMUs that answer it as we do; a view takes out of an answer what is a fact of this very
process (thread numbers, free ports) or of what a machine with more devices has more.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FIRST, LAST = 0, 99  # versions

View = Callable[[Any], Any]


def whole(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Step:
    """A request: a command with arguments, or raw bytes; with a descriptor beside it, or not.

    *since* … *until*: the major versions of QEMU that answer as we do.  *part*: ours is a part of theirs.
    *malformed*: no JSON, of which only the first complaint is compared; how many follow is nowhere said.
    """

    command: str = ""
    arguments: dict[str, Any] | None = None
    raw: bytes = b""
    descriptor: bool = False
    since: int = FIRST
    until: int = LAST
    view: View = whole
    part: bool = False
    malformed: bool = False

    def concerns(self, version: int) -> bool:
        return self.since <= version <= self.until

    def request(self, directory: Path) -> bytes:
        if self.raw:
            return self.raw
        request: dict[str, Any] = {"execute": self.command}
        if self.arguments is not None:
            request["arguments"] = self.arguments
        return json.dumps(request).replace("DIR", str(directory)).encode()


def ask(command: str, arguments: dict[str, Any] | None = None, /, **rules: Any) -> Step:
    return Step(command, arguments, **rules)


def say(text: str, **rules: Any) -> Step:
    return Step(raw=text.encode(), **rules)


def each(command: str, *arguments: dict[str, Any] | None, **rules: Any) -> list[Step]:
    """The same command with one set of arguments after the other."""
    return [ask(command, one, **rules) for one in arguments]


# ---- views ----


def without(*names: str) -> View:
    """Objects, also in a list, without these members."""

    def view(value: Any) -> Any:
        if isinstance(value, list):
            return [view(item) for item in value]
        if not isinstance(value, dict):
            return value
        return {name: view(member) for name, member in value.items() if name not in names}

    return view


def only(*names: str) -> View:
    """These members of an object."""
    return lambda value: {name: value[name] for name in names}


def by(name: str, *, only: Iterable[str] = ()) -> View:
    """A list of objects in the order of member *name*; *only* those whose name is one of them."""
    kept = tuple(only)
    return lambda value: sorted((item for item in value if not kept or item[name] in kept), key=lambda item: item[name])


def then(*views: View) -> View:
    """One view after the other."""

    def view(value: Any) -> Any:
        for one in views:
            value = one(value)
        return value

    return view


def shape(value: Any) -> Any:
    """The members that there are, whatever is in them."""
    if isinstance(value, dict):
        return {name: shape(member) for name, member in value.items()}
    return [shape(item) for item in value] if isinstance(value, list) else type(value).__name__


def number_of(value: list) -> int:
    return len(value)
