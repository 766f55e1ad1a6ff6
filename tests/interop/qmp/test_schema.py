"""query-qmp-schema describes what both have as QEMU 10 does (qmp.md)."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.host import qemumig_system
from tests.support.vmm import MIB, GuestParameters, Stage

from .speaker import require_dialect

pytestmark = pytest.mark.usefixtures("no_leaks")

NEVER_AN_ELEMENT = ("query-iothreads", "query-pci", "query-rx-filter")  # lists that are empty here


class Schema:
    """What query-qmp-schema said, by name."""

    def __init__(self, entries: list[dict[str, Any]]) -> None:
        top = ("command", "event")
        self.top = {(entry["meta-type"], entry["name"]): entry for entry in entries if entry["meta-type"] in top}
        self.types = {entry["name"]: entry for entry in entries if entry["meta-type"] not in top}


def misfits(ours: Schema, our_type: str, theirs: Schema, their_type: str, path: str, *, given: bool) -> list[str]:
    """Where our type does not fit theirs: for arguments (*given*) all must be equal, what we return may be less."""
    mine, other = ours.types[our_type], theirs.types[their_type]
    if mine["meta-type"] != other["meta-type"]:
        return [f"{path}: {mine['meta-type']} here, {other['meta-type']} there"]
    if mine["meta-type"] == "array":
        return misfits(ours, mine["element-type"], theirs, other["element-type"], f"{path}[]", given=given)
    if mine["meta-type"] == "enum":
        more, less = set(mine["values"]) - set(other["values"]), set(other["values"]) - set(mine["values"])
        return [f"{path}: {sorted(more)} only here, {sorted(less)} only there"] if more or (given and less) else []
    if mine["meta-type"] != "object":
        return [] if mine.get("json-type") == other.get("json-type") else [f"{path}: another type"]
    found = []
    members = {member["name"]: member for member in other["members"]}
    for member in mine["members"]:
        place = f"{path}.{member['name']}"
        twin = members.pop(member["name"], None)
        if twin is None:
            found.append(f"{place}: only here")
            continue
        if ("default" in member) != ("default" in twin):
            found.append(f"{place}: optional on one side")
        found += misfits(ours, member["type"], theirs, twin["type"], place, given=given)
    found += [f"{path}.{name}: only there" for name, member in members.items() if given or "default" not in member]
    return found + misfits_of_cases(ours, mine, theirs, other, path, given=given)


def misfits_of_cases(ours: Schema, mine: Any, theirs: Schema, other: Any, path: str, *, given: bool) -> list[str]:
    if mine.get("tag") != other.get("tag"):
        return [f"{path}: another tag"]
    cases = {variant["case"]: variant["type"] for variant in other.get("variants", ())}
    found = []
    for variant in mine.get("variants", ()):
        place = f"{path}<{variant['case']}>"
        if variant["case"] in cases:
            found += misfits(ours, variant["type"], theirs, cases[variant["case"]], place, given=given)
    return found


# What this version knows more or less than QEMU 10.0, and why.
MEANT = {
    ".status: ['postcopy-device'] only here, [] only there": "a state of QEMU 10.2",
    ".state: ['postcopy-device'] only here, [] only there": "a state of QEMU 10.2",
    ".prealloc-context: only there": "there are no thread contexts",
    ".pmem: only there": "persistent memory is not built",
    "BLOCK_IO_ERROR.qom-path: only there": "the device has no path where it says so",
}


def test_the_schema_is_that_of_qemu_for_what_both_have(stage: Stage, qemu: str) -> None:
    require_dialect(qemu)
    schemas = []
    for name, system in (("qemu", qemu), ("ours", qemumig_system())):
        vmm = stage.vmm(name, system, guest=GuestParameters(), memory=32 * MIB)
        schemas.append(Schema(vmm.command("query-qmp-schema")))
    theirs, ours = schemas
    found = []
    for key, entry in ours.top.items():
        kind, name = key
        other = theirs.top[key]
        assert entry.get("allow-oob") == other.get("allow-oob"), name
        arguments = misfits(ours, entry["arg-type"], theirs, other["arg-type"], name, given=kind == "command")
        found += [one for one in arguments if not one.startswith("object-add.qom-type: []")]  # it has more kinds
        if kind == "command" and name not in NEVER_AN_ELEMENT:
            found += misfits(ours, entry["ret-type"], theirs, other["ret-type"], f"{name}→", given=False)
    assert [one for one in found if not one.endswith(tuple(MEANT))] == []
