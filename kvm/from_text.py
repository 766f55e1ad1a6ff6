"""Values that the command line writes as text, as the declared types of the monitor want them (cli.md §1, §4).

    "main,addr.transport=exec,addr.args.0=cat"  ─▶ nest ─▶ {"channel-type": "main", "addr": {"transport": …}}
    {"size": "1M", "share": "on"}               ─▶ typed ─▶ {"size": 1048576, "share": True}

What is no text is left as it is: JSON comes typed.  Whether the result is right is for the type's own `check`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from qemumig.commands.command import BOOL, Integer, ListOf, Signed, Struct, Type, member_path

from .keyval import UsageError, integer, size, split, switch
from .monitor.json_stream import INCOMPLETE, JsonError, JsonStream


def json_object(text: str) -> dict[str, Any]:
    """*text* as one JSON object."""
    stream = JsonStream()
    stream.feed(text.encode("utf-8", "surrogateescape") + b" ")
    try:
        value = stream.next_value()
        if value is INCOMPLETE:
            raise JsonError("JSON parse error, premature EOI")
    except JsonError as error:
        raise UsageError(str(error)) from error
    if not isinstance(value, dict):
        raise UsageError("JSON object expected")
    return value


def block_pairs(text: str, implied_key: str = "") -> dict[str, str | None]:
    """A -blockdev or -device, in either of its forms, as dotted keys; a key alone is on."""
    if text.startswith("{"):
        return dict(_dotted(json_object(text)))
    return {key: "on" if value is None else value for key, value in split(text, implied_key)}


def _dotted(value: dict, prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, inner in value.items():
        if isinstance(inner, dict):
            yield from _dotted(inner, f"{prefix}{key}.")
        else:
            yield prefix + key, {True: "on", False: "off"}[inner] if isinstance(inner, bool) else str(inner)


def nest(pairs: Iterable[tuple[str, str | None]]) -> dict[str, Any]:
    """Dotted keys as objects within objects; an object whose keys are 0, 1, 2 … is a list."""
    root: dict[str, Any] = {}
    for key, value in pairs:
        if value is None:
            raise UsageError(f"Expected '=' after parameter '{key}'")
        *above, last = key.split(".")
        place = root
        for name in above:
            place = place.setdefault(name, {})
            if not isinstance(place, dict):
                raise UsageError(f"Parameters '{key.rpartition('.')[0]}.*' used inconsistently")
        if isinstance(place.get(last), dict):
            raise UsageError(f"Parameters '{key}.*' used inconsistently")
        place[last] = value
    return {name: _with_lists(value) for name, value in root.items()}


def _with_lists(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    inner = {name: _with_lists(one) for name, one in value.items()}
    numbers = [str(index) for index in range(len(inner))]
    return [inner[number] for number in numbers] if inner and inner.keys() == set(numbers) else inner


def typed(value: Any, kind: Type, path: str = "") -> Any:
    """*value* with its texts turned into what *kind* declares; UsageError for a text that is no such thing."""
    if isinstance(kind, Struct) and isinstance(value, dict):
        return _typed_members(value, kind, path)
    if isinstance(kind, ListOf) and isinstance(value, list):
        return [typed(one, kind.element, f"{path}[{index}]") for index, one in enumerate(value)]
    if not isinstance(value, str):
        return value
    if kind is BOOL:
        return switch(path, value)
    if isinstance(kind, Integer) and kind.wraps:
        return _size(path, value)
    if isinstance(kind, Integer | Signed):
        return integer(path, value)
    return value


def _typed_members(value: dict[str, Any], kind: Struct, path: str) -> dict[str, Any]:
    known = {member.name: member.type for member in kind.members}
    variant = kind.variants.get(str(value.get(kind.tag)))
    if variant is not None:
        value = _typed_members(value, variant, path)
    return {name: typed(one, known[name], member_path(path, name)) if name in known else one for name, one in value.items()}


def _size(path: str, text: str) -> int:
    try:
        return size(path, text)
    except UsageError:
        raise UsageError(f"Parameter '{path}' expects a size value") from None
