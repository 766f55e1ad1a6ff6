"""Clients that are not ours against the real program: qemu.qmp's shell, and what it and other tools ask at first."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.kvm.program import PATIENCE_S, system

pytestmark = pytest.mark.needs("kvm")

SHELL = Path(sys.executable).parent / "qmp-shell"


def shell(path, lines, *options):
    """What the stock shell shows for *lines* typed into it."""
    done = subprocess.run(
        [SHELL, *options, path], input="\n".join([*lines, ""]), capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_stock_shell_works(directory):
    path = f"{directory}/shell"
    with system(directory, "vm", "-name", "box", "-qmp", f"unix:{path},server=on,wait=off") as vm:
        shown = shell(path, ["query-name", "migrate-set-parameters downtime-limit=250", "migrate uri=foo:1", "stop"])
        assert '{"return": {"name": "box"}}' in shown
        assert '"desc": "unknown migration protocol: foo:1"' in shown
        assert vm.result("query-migrate-parameters")["downtime-limit"] == 250
        assert vm.result("query-status")["status"] == "paused"


def test_the_stock_shell_speaks_to_the_human_monitor(directory):
    path = f"{directory}/shell"
    with system(directory, "vm", "-name", "box", "-qmp", f"unix:{path},server=on,wait=off"):
        shown = shell(path, ["info status", "info name"], "-H")
    assert "VM status: running" in shown
    assert "box" in shown


def test_every_answer_of_the_program_is_of_the_type_that_its_schema_declares(directory):
    """Of all commands that take nothing and change nothing, with a disk and an object there."""
    disk = directory / "disk.img"
    disk.write_bytes(bytes(4096))
    argv = ("-drive", f"if=none,id=d0,file={disk},format=raw", "-device", "virtio-blk-device,drive=d0")
    with system(directory, "vm", *argv, "-object", "memory-backend-memfd,id=m0,size=1M") as vm:
        schema = vm.result("query-qmp-schema")
        types = {entry["name"]: entry for entry in schema if entry["meta-type"] not in ("command", "event")}
        asked = 0
        for entry in schema:
            if entry["meta-type"] != "command" or not entry["name"].startswith("query-"):
                continue
            answer = vm.ask(entry["name"])
            if "return" in answer:
                check(types, entry["ret-type"], answer["return"], entry["name"])
                asked += 1
    assert asked > 25


def check(types, name, value, path):
    """Fails when *value* is not of type *name*."""
    entry = types[name]
    kind = entry["meta-type"]
    if kind == "array":
        assert isinstance(value, list), path
        for item in value:
            check(types, entry["element-type"], item, f"{path}[]")
    elif kind == "enum":
        assert value in entry["values"], f"{path}: {value!r}"
    elif kind == "object":
        check_object(types, entry, value, path)
    elif kind == "builtin":
        python = {"string": str, "int": int, "number": int | float, "boolean": bool, "value": object, "null": type(None)}
        assert isinstance(value, python[entry["json-type"]]), f"{path}: {value!r}"


def check_object(types, entry, value, path):
    assert isinstance(value, dict), path
    members = list(entry["members"])
    if "tag" in entry:
        case = next(variant["type"] for variant in entry["variants"] if variant["case"] == value[entry["tag"]])
        members += types[case]["members"]
        if "tag" in types[case]:
            return check_object(types, {**types[case], "members": members}, value, path)
    declared = {member["name"]: member for member in members}
    assert set(value) <= set(declared), f"{path}: {sorted(set(value) - set(declared))} not declared"
    for name, member in declared.items():
        assert name in value or "default" in member, f"{path}.{name} is missing"
        if name in value:
            check(types, member["type"], value[name], f"{path}.{name}")
    return None
