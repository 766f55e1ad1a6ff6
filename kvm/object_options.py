"""-object: what shall be made, checked against what each kind takes (cli.md §4).

    memory-backend-ram,id=m0,size=1G        keys and values
    {"qom-type": "authz-simple", …}         the same as JSON
    help   TYPE,help                        what there is

Whether it can be made shows when it is: that is for UserObjects.
"""

from __future__ import annotations

from typing import Any

from qemumig.commands.command import BOOL, STR, CommandError, Enum, ListOf, Type

from .arguments import HelpRequested, ObjectRequest
from .from_text import json_object, typed
from .keyval import UsageError, choice, identifier, split
from .user_objects import Creatable, UserObjects


def read_object(text: str) -> ObjectRequest:
    """The object that *text* asks for."""
    objects = UserObjects()
    if text in ("help", "?"):
        kinds = (f"  {kind}" for kind in sorted(objects.kinds))
        raise HelpRequested("\n".join(["List of user creatable objects:", *kinds]))
    values: dict[str, Any] = json_object(text) if text.startswith("{") else _from_keys(text, objects)
    try:
        checked = objects.arguments().check(typed(values, objects.arguments()), "")
    except CommandError as error:
        raise UsageError(error.desc) from error
    name = identifier("id", checked.pop("id"))
    return ObjectRequest(checked.pop("qom-type"), name, checked)


def _from_keys(text: str, objects: UserObjects) -> dict[str, Any]:
    pairs = split(text, "qom-type")
    values: dict[str, Any] = {key: "on" if value is None else value for key, value in pairs}
    if "qom-type" not in values:
        raise UsageError("Parameter 'qom-type' is missing")
    kind = objects.kinds[choice("qom-type", values["qom-type"], objects.kinds)]
    if any(value is None and key in ("help", "?") for key, value in pairs):
        raise HelpRequested(describe(kind))
    known = {member.name for member in kind.members} | {"qom-type", "id"}
    for key in values:
        if key not in known:
            raise UsageError(f"Invalid parameter '{key}'")
    return values


def describe(kind: Creatable) -> str:
    """What `TYPE,help` prints."""
    members = sorted(kind.members, key=lambda member: member.name)
    return "\n".join([f"{kind.name} options:", *(f"  {member.name}=<{_word(member.type)}>" for member in members)])


def _word(kind: Type) -> str:
    if isinstance(kind, Enum):
        return "|".join(kind.values)
    if isinstance(kind, ListOf):
        return "list"
    return "bool" if kind is BOOL else "string" if kind is STR else "int"
