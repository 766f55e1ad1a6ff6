"""The same script, spoken to a real QEMU and to qemumig-system: the transcripts are the same (qmp.md).

A Step is a request and the QEMUs that answer it as we do; a `view` takes out of an answer what is a fact of this very
process (thread numbers, free ports) or of what a machine with more devices has more.  Where a QEMU of another version
has other words, the step says so and is left out with it: the dialect spoken here is that of QEMU 10.0.

Differences that are meant, and have no step: capability `return-path` is on by default here; what is not built yet says
so; writing memory to a full disk is an error here; a `migrate-incoming` that failed may be tried again here.
"""

from __future__ import annotations

import array
import json
import os
import re
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from qemumig.cli.guest import ALL_CHECKS
from tests.support.host import qemumig_system
from tests.support.vmm import MIB, GuestParameters, Stage, Vmm, listen
from tools.interoplib.peers import Peer, real

pytestmark = pytest.mark.usefixtures("no_leaks")

PATIENCE_S = 30.0
UUID = "00010203-0405-0607-0809-0a0b0c0d0e0f"
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


# ---- the scripts ----

NEGOTIATION = [
    *(say(text) for text in ("[]", '"x" ', "1 ", "null ", "{}", '{"id": 1}', '{"execute": 1}')),
    *(ask(name) for name in ("query-status", "query-commands", "no-such-command")),
    *each("qmp_capabilities", {"enable": ["foo"]}, {"enable": 5}, {"enable": ["oob", "foo"]}, {"foo": 1}),
    say('{"exec-oob": "query-yank"}'),
    ask("qmp_capabilities", {"enable": ["oob"]}),
    ask("qmp_capabilities"),
    say('{"exec-oob": "query-status", "id": 1}'),
    say('{"exec-oob": "query-yank", "id": 2}', view=shape),
    say('{"exec-oob": 5}'),
    say('{"exec-oob": "yank", "arguments": {"instances": [{"type": "migration"}]}}'),
    say('{"execute": "query-yank"}', view=shape),
]

FORM = [
    *(say(text) for text in ("[]", '"x" ', "12 ", "true ", "null ", "{}", '{"id": [1, {"a": null}]}')),
    say('{"execute": 1, "id": "x"}'),
    say('{"execute": "query-name", "arguments": [], "id": 7}'),
    say('{"execute": "query-name", "arguments": null}'),
    say('{"execute": "query-name", "foo": 2}'),
    say('{"exec-oob": "query-name"}'),
    say('{"execute": "query-name", "exec-oob": "query-name"}'),
    say('{"execute": "nosuch", "id": null}'),
    say('{"execute": "nosuch", "arguments": 5}'),
    say("{'execute': 'query-name', 'id': 'it\\'s \\u00e9 \\ud834\\udd1e \\u007f /'}"),
    *(say(f'{{"execute": "query-name", "id": {text}}}') for text in ("18446744073709551615", "18446744073709551616")),
    *(say(f'{{"execute": "query-name", "id": {text}}}') for text in ("-1", "1.50", "1e3", "-9223372036854775808", '"é"')),
    say('{"execute" "query-name"}', malformed=True, until=10),
    say('{"execute": query}', malformed=True, until=10),
    say('{"execute": "query-name", "execute": "query-name"}', malformed=True, until=10),
    say('{"execute": "query-name", "id": "\\x"}', malformed=True, until=10),
    say('{"execute": #}', malformed=True, until=10),
    say("}", malformed=True, until=10),
    say("[" * 1100, malformed=True, until=10),  # later ones tell the place, too
    say('{"execute": "query-name", "arguments": {"a": 1}}'),
]

PARAMETERS = [
    *each("migrate-set-parameters", *({"multifd-channels": value} for value in ("x", 1.5, 256, -1, None, True))),
    *each("migrate-set-parameters", *({"max-bandwidth": value} for value in ("x", 1.5, True, [], 1e30))),
    *each("migrate-set-parameters", {"x-checkpoint-delay": -1}, {"x-checkpoint-delay": 1 << 32}, {"foo": 1}),
    *each("migrate-set-parameters", {"tls-creds": 5}, {"tls-creds": None}, {"tls-hostname": []}, {"tls-authz": ""}),
    *each("migrate-set-parameters", *({"multifd-compression": value} for value in (5, "foo", "qpl", "none"))),
    *each("migrate-set-parameters", {"cpu-throttle-tailslow": 1}, {}, None),
    *each("migrate-set-parameters", {"announce-max": 1, "downtime-limit": 250, "max-bandwidth": -1}),
    *each(
        "migrate-set-parameters",
        {"multifd-channels": 0},
        {"downtime-limit": 2000001},
        {"downtime-limit": -1},
        {"xbzrle-cache-size": 5000},
        {"max-cpu-throttle": 10},
        {"max-cpu-throttle": 100},
        {"cpu-throttle-initial": 50, "max-cpu-throttle": 40},
        {"cpu-throttle-initial": 0},
        {"cpu-throttle-increment": 100},
        {"throttle-trigger-threshold": 101},
        {"announce-initial": 100001},
        {"announce-max": 100001},
        {"announce-rounds": 1001},
        {"announce-step": 0},
        {"multifd-channels": 0, "announce-max": 100001},
        until=10,  # later ones begin with "Option"
    ),
    *each(
        "migrate-set-parameters",
        {"multifd-zlib-level": 10},
        {"multifd-zstd-level": 21},
        {"multifd-qatzip-level": 0},
        {"vcpu-dirty-limit": 0},
        {"x-vcpu-dirty-limit-period": 1001},
        {"mode": "cpr-exec"},
        since=10,
        until=10,
    ),
    *each("migrate-set-parameters", {"mode": "foo"}, {"zero-page-detection": "x"}, {"direct-io": False}, since=10),
    *each(
        "migrate-set-parameters",
        *(
            {"block-bitmap-mapping": mapping}
            for mapping in (
                5,
                [5],
                [{"node-name": "n", "alias": "a"}],
                [{"node-name": "n", "alias": "a", "bitmaps": []}] * 2,
                [{"node-name": "n", "alias": "9", "bitmaps": []}],
                [{"node-name": "n" * 32, "alias": "a", "bitmaps": []}],
                [{"node-name": "n", "alias": "a", "bitmaps": [{"name": "b", "alias": "x"}] * 2}],
                [{"node-name": "n", "alias": "a", "bitmaps": [{"name": "b", "alias": "é" * 200}]}],
            )
        ),
    ),
    ask("query-migrate-parameters", view=only("downtime-limit", "announce-max", "multifd-channels", "tls-creds")),
    ask("query-migrate-parameters", since=10, until=10),
    *each(
        "migrate-set-capabilities",
        {},
        {"capabilities": {}},
        {"capabilities": [5]},
        {"capabilities": [], "foo": 1},
        {"capabilities": []},
        *(
            {"capabilities": [entry]}
            for entry in (
                {"capability": "foo", "state": True},
                {"capability": "events"},
                {"state": True},
                {"capability": "events", "state": 1},
                {"capability": "events", "state": True, "x": 1},
                {"capability": "postcopy-preempt", "state": True},
                {"capability": "zero-copy-send", "state": True},
            )
        ),
        {"capabilities": [{"capability": "events", "state": state} for state in (True, False)]},
        *(
            {"capabilities": [{"capability": name, "state": True} for name in pair]}
            for pair in (
                ("background-snapshot", "postcopy-ram"),
                ("background-snapshot", "xbzrle"),
                ("background-snapshot", "validate-uuid"),
                ("postcopy-ram", "x-ignore-shared"),
            )
        ),
    ),
    *each(
        "migrate-set-capabilities",
        *(
            {"capabilities": [{"capability": name, "state": True} for name in pair]}
            for pair in (
                ("multifd", "xbzrle"),
                ("mapped-ram", "xbzrle"),
                ("mapped-ram", "postcopy-ram"),
                ("dirty-limit", "auto-converge"),
            )
        ),
        since=10,
    ),
    ask("query-migrate-capabilities", view=by("capability", only=("events", "validate-uuid", "multifd"))),
    ask("query-migrate-capabilities", view=lambda value: [item["capability"] for item in value], since=10, until=10),
]

INET = {"transport": "socket", "type": "inet", "host": "127.0.0.1", "port": "1"}


def channel(address: Any, kind: str = "main") -> dict[str, Any]:
    return {"channel-type": kind, "addr": address}


BAD_CHANNELS: list[Any] = [
    5,
    {"channel-type": "main"},
    channel(INET, "foo"),
    channel(5),
    channel({}),
    channel({"transport": "foo"}),
    channel({"transport": "socket"}),
    channel({"transport": "socket", "type": "tin"}),
    channel({"transport": "socket", "type": "inet"}),
    channel({"transport": "socket", "type": "inet", "host": "h"}),
    channel({**INET, "port": 5}),
    channel({**INET, "to": "x"}),
    channel({**INET, "to": 70000}),
    channel({**INET, "foo": 1}),
    channel({"transport": "socket", "type": "unix"}),
    channel({"transport": "exec"}),
    channel({"transport": "exec", "args": [5]}),
    channel({"transport": "file", "filename": "f"}),
    channel({"transport": "file", "filename": "f", "offset": "x"}),
]

SOURCE = [
    ask("query-migrate"),
    ask("query-migrationthreads", since=10, until=10),
    *each("migrate", {"uri": 5}, {"uri": "tcp:", "foo": 1}),
    *each("migrate", {"uri": "tcp:x:1", "detach": 1}, until=10),
    *each("migrate", {}, {"channels": []}, {"channels": 5}, {"uri": "tcp:a:1", "channels": [channel(INET)]}, since=10),
    *each("migrate", *({"channels": [bad]} for bad in BAD_CHANNELS), since=10),
    *each("migrate", *({"channels": [channel(INET, kind)] * 2} for kind in ("main", "cpr")), since=10),
    *each("migrate", *({"uri": uri} for uri in ("foo:1", "foo", "", "defer", "file:/x,offset=zz")), since=10),
    *each("migrate", *({"uri": uri} for uri in ("tcp:", "tcp:foo", "unix:", "vsock:1", "vsock:1:", "fd:")), since=10),
    ask("migrate", {"uri": "tcp:127.0.0.1:1", "resume": True}),
    ask("query-migrate", since=10),
    *each("migrate-continue", {}, {"state": "xx"}, {"state": "none"}, {"state": "pre-switchover"}, since=10),
    *each("migrate-start-postcopy", None, {"x": 1}),
    ask("migrate-pause", since=10),  # 7.2 has no recovery to be in
    ask("migrate-pause", {"x": 1}),
    *each("migrate-recover", {}, {"uri": 5}, {"uri": "tcp:127.0.0.1:0"}),
    ask("migrate_cancel"),
    ask("migrate_cancel", {"x": 1}),
    *each("migrate", {"uri": "fd:nosuch"}, {"uri": "fd:77"}),
    ask("query-migrate", since=10),
    ask("migrate", {"uri": "file:/nosuch/x"}, since=10),
    ask("query-migrate", since=10),
    *each("migrate-continue", {"state": "none"}, {"state": "failed"}),
    *each("migrate-incoming", {"uri": "tcp:127.0.0.1:0"}, {"uri": "foo:1"}),
    *each("migrate-incoming", {}, {"channels": [channel(INET)] * 2}, {"uri": "x", "exit-on-error": 5}, since=10),
    *each("client_migrate_info", {}, {"protocol": "vnc", "hostname": "a"}, {"protocol": "spice", "hostname": "a"}),
    ask("client_migrate_info", {"protocol": "spice", "hostname": "a", "port": "x"}),
    *each(
        "announce-self", {}, {"initial": 50, "max": 550, "rounds": 5}, {"initial": "x", "max": 1, "rounds": 1, "step": 1}
    ),
    ask("announce-self", {"initial": 50, "max": 550, "rounds": 5, "step": 100, "interfaces": ["a"], "id": "b"}),
    ask("announce-self", {"initial": 50, "max": 550, "rounds": 5, "step": 100, "interfaces": "a"}),
]

RUN_STATE = [
    ask("query-status", view=without("singlestep")),
    *(ask(name) for name in ("stop", "stop", "cont", "cont", "system_powerdown", "system_wakeup", "system_reset")),
    *(ask(name) for name in ("stop", "system_reset")),
    ask("query-status", view=without("singlestep")),
    ask("cont"),
    ask("stop", {"x": 1}),
    *each("set-action", {}, {"reboot": "foo"}, {"reboot": 5}, {"foo": "x"}, {"watchdog": "inject-nmi"}),
    ask("set-action", {"reboot": "shutdown", "shutdown": "pause", "panic": "none", "watchdog": "none"}),
    ask("set-action", {"reboot": "reset", "shutdown": "poweroff", "panic": "shutdown", "watchdog": "reset"}),
]

MACHINE = [
    *(ask(name) for name in ("query-name", "query-uuid", "query-kvm", "query-target", "query-current-machine")),
    ask("query-version", view=shape),
    ask("query-commands", view=lambda value: {tuple(item) for item in value} == {("name",)}),
    ask("query-qmp-schema", view=lambda value: {item["meta-type"] for item in value}),
    ask("query-cpus-fast", view=then(without("qom-type"), lambda value: [{**cpu, "thread-id": 0} for cpu in value])),
    ask("query-cpu-definitions", view=by("name", only=("qemu64", "host", "max"))),
    ask("query-machines", view=then(by("name", only=("microvm",)), without("is-default", "cpu-max", "acpi"))),
    *each("query-machines", {"foo": 5}, {"compat-props": 5}, since=10),
    ask("query-memdev", view=by("id")),
    ask("query-memory-size-summary"),
    ask("query-chardev", view=by("label")),
    ask("query-block", view=without("node-name", "active", "children", "limits")),
    ask(
        "query-named-block-nodes",
        view=lambda value: without("node-name", "active", "children", "limits")([n for n in value if n["drv"] == "raw"]),
    ),
    ask("query-named-block-nodes", {"flat": 5}),
    *(ask(name) for name in ("query-iothreads", "query-balloon", "query-pci", "query-rx-filter")),
    *each("query-rx-filter", {"name": "x"}, {"name": 5}),
    *each("trace-event-get-state", {}, {"name": "nosuch"}, {"name": "nosuch*"}),
    *each("trace-event-set-state", {"name": "nosuch"}, {"name": "nosuch", "enable": True}, {"name": "n*", "enable": True}),
    *each(
        "human-monitor-command",
        *({}, {"command-line": 5}, {"command-line": "nosuch"}, {"command-line": ""}, {"command-line": "info name"}),
        *({"command-line": "info status", "cpu-index": index} for index in (0, 7, -1, "x")),
    ),
]


def dumps(command: str) -> list[Step]:
    """What both commands that dump memory have in common."""
    return each(
        command,
        *({"val": value, "size": 16, "filename": "DIR/dump"} for value in (0, "x", 1.5, None, 1 << 64)),
        {"val": 0, "size": 0, "filename": "DIR/dump"},
        {"val": 0, "size": 16, "filename": "/nosuch/dump"},
        {"val": 0, "size": 16},
        since=10,
    )


DUMPS = [*dumps("memsave"), *dumps("pmemsave")]
DUMPS += each("pmemsave", {"val": 0, "size": 16, "filename": "DIR/dump"}, {"val": 0, "size": 16, "filename": ""})
DUMPS += each("memsave", *({"val": 0, "size": 1, "filename": "DIR/dump", "cpu-index": i} for i in (5, -1, "x")))
DUMPS += each("memsave", *({"val": value, "size": 16, "filename": "DIR/dump"} for value in (1 << 40, -1)))
DUMPS += each("pmemsave", {"val": 1 << 63, "size": 16, "filename": "DIR/dump"}, since=10)

FD = {"fdname": "a"}
DESCRIPTORS = [
    *each("getfd", {}, FD, {"fdname": "7a"}, {"fdname": 5}),
    *(ask("getfd", {"fdname": name}, descriptor=True) for name in ("a", "7a", "a", "b")),
    *each("closefd", FD, FD, {"fdname": ""}),
    *each("add-fd", None, {"fdset-id": -1}, {"fdset-id": "x"}, {"opaque": 5}),
    ask("add-fd", descriptor=True, view=without("fd")),
    ask("add-fd", {"fdset-id": 5, "opaque": "mine"}, descriptor=True, view=without("fd")),
    ask("add-fd", {"fdset-id": 5}, descriptor=True, view=without("fd")),
    ask("add-fd", descriptor=True, view=without("fd")),
    ask("add-fd", {"fdset-id": -1}, descriptor=True),
    ask("query-fdsets", view=without("fd")),
    *each(
        "remove-fd", {}, {"fdset-id": 77}, {"fdset-id": -1}, {"fdset-id": 5, "fd": 9999}, {"fdset-id": 0}, {"fdset-id": 0}
    ),
    ask("query-fdsets", view=without("fd")),
    *each("yank", {}, {"instances": []}, {"instances": 5}, {"instances": [5]}),
    *each(
        "yank",
        *(
            {"instances": [instance]}
            for instance in (
                {"type": "foo"},
                {"type": "migration"},
                {"type": "chardev"},
                {"type": "chardev", "id": "x"},
                {"type": "block-node", "node-name": "x"},
                {"type": "block-node", "id": "x"},
            )
        ),
    ),
    ask("query-yank"),
]


def backend(**members: Any) -> dict[str, Any]:
    return {"qom-type": "memory-backend-ram", "id": "m3", **{name.replace("_", "-"): v for name, v in members.items()}}


OBJECTS = [
    ask("qom-list", {"path": "/"}, view=by("name", only=("type", "machine", "objects", "chardevs"))),
    ask("qom-list", {"path": "/objects"}, view=by("name", only=("type", "mem1"))),
    ask("qom-list", {"path": "/machine"}, view=by("name"), part=True),
    ask("qom-list", {"path": "/machine/unattached"}, view=by("name"), part=True),
    ask("qom-list", {"path": "/machine/peripheral"}, view=by("name")),
    ask("qom-list", {"path": "/chardevs"}, view=by("name")),
    ask("qom-list", {"path": "mem1"}, view=by("name"), part=True),
    *each("qom-list", *({"path": path} for path in ("nosuch", "", "/x", "/objects/mem1/size", 5)), None),
    *(
        ask("qom-get", {"path": "/machine", "property": name})
        for name in ("type", "memory", "memory-backend", "acpi", "pit", "isa-serial", "usb", "x-option-roms", "peripheral")
    ),
    ask("qom-get", {"path": "/machine", "property": "smp"}, since=10),
    *(
        ask("qom-get", {"path": path, "property": name})
        for path, name in (
            ("/objects/mem1", "size"),
            ("/objects/mem1", "share"),
            ("/objects/mem1", "policy"),
            ("/objects/mem1", "nosuch"),
            ("/objects", "mem1"),
            ("/", "type"),
            ("nosuch", "x"),
            ("/machine/unattached/device[0]", "core-id"),
            ("/machine/unattached/device[0]", "type"),
        )
    ),
    *(
        ask("qom-set", {"path": "/objects/mem1", "property": name, "value": value})
        for name, value in (
            ("size", 5),
            ("nosuch", 5),
            ("type", "x"),
            ("merge", "x"),
            ("merge", True),
            ("policy", "foo"),
            ("share", True),
        )
    ),
    *each("qom-set", {"path": "nosuch", "property": "x", "value": 1}, {"path": "/objects/mem1", "property": "size"}),
    *each(
        "object-add",
        backend(id="m2", size=4096),
        backend(id="m2", size=4096),
        backend(),
        {"qom-type": "memory-backend-ram", "size": 4096},
        {"id": "m3", "size": 4096},
        backend(qom_type="x"),
        backend(id="9", size=4096),
        backend(size="x"),
        backend(size=0),
        backend(size=4096, foo=1),
        backend(size=4096, share="x"),
        backend(size=4096, policy="bind"),
        backend(qom_type="memory-backend-file", size=4096),
        backend(qom_type="memory-backend-file", size=4096, mem_path="/nosuch/x"),
        backend(qom_type="memory-backend-memfd", id="m4", size=4096),
        backend(id="m5", size=5000),
    ),
    ask("query-memdev", view=by("id", only=("m2", "m4", "m5"))),
    *each("object-del", {"id": "m2"}, {"id": "m2"}, {}, {"id": ""}, {"id": "m4"}),
    *each(
        "object-add",
        *(
            {"qom-type": f"tls-creds-{kind}", "id": "t0", "endpoint": "client", "dir": "/nosuch", **more}
            for kind, more in (
                ("psk", {}),
                ("x509", {}),
                ("x509", {"endpoint": "foo"}),
                ("x509", {"dir": 5}),
                ("x509", {"verify-peer": "on"}),
                ("psk", {"endpoint": "server", "username": "x"}),
            )
        ),
        {"qom-type": "tls-creds-x509", "id": "t1"},
        {"qom-type": "tls-creds-anon", "id": "t1"},
        {"qom-type": "authz-simple", "id": "a0"},
        {"qom-type": "authz-simple", "id": "a0", "identity": "x"},
        {"qom-type": "authz-list", "id": "a1", "rules": [{"match": "*"}]},
        {"qom-type": "authz-list", "id": "a1", "rules": [{"match": "*", "policy": "x"}]},
        {"qom-type": "authz-list", "id": "a1", "rules": [{"match": "*", "policy": "allow", "format": "glob"}]},
        {"qom-type": "secret", "id": "s0", "data": "x"},
    ),
    *each("qom-list", {"path": "/objects/a0"}, {"path": "/objects/a1"}, view=by("name")),
    ask("qom-list", {"path": "/objects/t1"}, view=by("name"), part=True),
    *(ask("qom-get", {"path": "/objects/t1", "property": name}) for name in ("endpoint", "verify-peer", "dir")),
    ask("qom-get", {"path": "/objects/a1", "property": "rules"}),
    *each("object-del", {"id": "a0"}, {"id": "a1"}, {"id": "t1"}, {"id": "s0"}),
    # QEMU 10 and later look for modules here, and end when those of their package are not beside them
    *(
        ask("qom-list-types", {"implements": kind, "abstract": True}, view=by("name"), until=7)
        for kind in ("memory-backend", "nosuch", "memory-backend-ram", "virtio-mmio")
    ),
    ask("qom-list-types", {"implements": 5}),
]

DESTINATION = [
    ask("query-status", view=without("singlestep")),
    *(ask(name) for name in ("query-migrate", "migrate_cancel", "cont", "stop")),
    ask("migrate", {"uri": "tcp:127.0.0.1:1"}),
    *each("migrate-incoming", {}, {"uri": "a", "channels": [channel(INET)]}, {"channels": [channel(INET)] * 2}, since=10),
    *each("migrate-incoming", {"uri": "foo:1"}, {"uri": "defer"}, {"uri": "tcp:x"}, since=10),
    ask("query-migrate"),
    ask("migrate-incoming", {"uri": "unix:DIR/in.sock"}, since=10),  # older ones tell an event that nobody asked for
    ask("migrate-incoming", {"uri": "unix:DIR/in.sock"}, since=10),
    ask("query-migrate", since=10),
    ask("query-yank", since=10),
    ask("yank", {"instances": [{"type": "migration"}]}, since=10),
    ask("query-migrate", since=10),
    ask("query-status", view=without("singlestep")),
]

SCRIPTS = {
    "negotiation": NEGOTIATION,
    "form of requests": FORM,
    "capabilities and parameters": PARAMETERS,
    "migration from here": SOURCE,
    "machine": [*MACHINE, *RUN_STATE, *DUMPS],
    "descriptors and yank": DESCRIPTORS,
    "objects": OBJECTS,
    "migration to here": DESTINATION,
}


# ---- the two who speak ----


class Speaker:
    """A VMM with a monitor of its own for a script, in a directory of its own; knows nothing of which VMM it is."""

    def __init__(self, stage: Stage, name: str, system: str, *, incoming: bool = False) -> None:
        self.directory = stage.directory / name
        self.directory.mkdir()
        disk = self.directory / "disk.img"
        disk.write_bytes(bytes(MIB))
        path = self.directory / "script.qmp"
        self.vmm: Vmm = stage.vmm(
            name,
            system,
            guest=GuestParameters(flags=ALL_CHECKS, cpus=2),
            memory=32 * MIB,
            incoming=incoming,
            extra=(
                *("-qmp", f"unix:{path},server=on,wait=off", "-name", "vm", "-uuid", UUID),
                *("-object", "memory-backend-ram,id=mem1,size=1M"),
                *("-drive", f"if=none,id=d0,file={disk},format=raw"),
                *("-device", "virtio-blk-device,drive=d0,id=disk,bus=virtio-mmio-bus.0"),
            ),
        )
        if not incoming:  # some answers depend on whether the guest has page tables yet
            assert self.vmm.serial.wait_more(2, PATIENCE_S), self.vmm.serial.output()
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(PATIENCE_S)
        self._socket.connect(str(path))
        self._lines = self._socket.makefile("rb")
        self.greeting = self.message()

    def close(self) -> None:
        self._lines.close()
        self._socket.close()

    def __enter__(self) -> Speaker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def message(self) -> dict[str, Any]:
        """The next message, this VMM's own names in it replaced."""
        line = self._lines.readline()
        assert line, f"{self.vmm.name} closed the connection"
        text = line.decode().replace(str(self.directory), "DIR").replace(f"/{self.vmm.name}.", "/vm.")
        message: dict[str, Any] = json.loads(text)
        message.pop("timestamp", None)
        return message

    def negotiate(self) -> None:
        self.send(ask("qmp_capabilities"))
        assert self.message() == {"return": {}}

    def send(self, step: Step) -> None:
        data = step.request(self.directory)
        if not step.descriptor:
            self._socket.sendall(data)
            return
        with open(os.devnull, "rb") as null:
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [null.fileno()]))
            assert self._socket.sendmsg([data], [rights]) == len(data)

    def answer(self, step: Step) -> list[Any]:
        """What comes back: events on the way, then the response, as the step looks at it."""
        self.send(step)
        if step.malformed:
            return [self.complaint()]
        came: list[Any] = []
        while True:
            message = self.message()
            if "return" in message:
                message["return"] = step.view(message["return"])
            came.append(message)
            if "event" not in message:
                return came

    def complaint(self) -> Any:
        """The first of the errors before the answer to a request that begins anew."""
        self.send(say('\xff{"execute": "query-name", "id": "anew"}'))
        first = message = self.message()
        while message.get("id") != "anew":
            message = self.message()
        return first

    def until(self, event: str, **data: Any) -> list[Any]:
        """Messages up to and with an event."""
        came = []
        while True:
            came.append(self.message())
            if came[-1].get("event") == event and data.items() <= came[-1].get("data", {}).items():
                return came

    def until_answered(self, step: Step, event: str, **data: Any) -> list[Any]:
        """Messages up to and with both an event and the answer to *step*, whichever is last."""
        self.send(step)
        came = self.until(event, **data)
        while not any("return" in message for message in came):
            came.append(self.message())
        return came


def agree(step: Step, ours: list[Any], theirs: list[Any]) -> bool:
    if not step.part:
        return ours == theirs
    return [entry for entry in ours[-1]["return"] if entry not in theirs[-1]["return"]] == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_same_script_has_the_same_transcript(stage: Stage, qemu: str, script: str) -> None:
    version = major(real(qemu))
    incoming = script == "migration to here"
    differences = []
    with (
        Speaker(stage, "qemu", qemu, incoming=incoming) as peer,
        Speaker(stage, "ours", qemumig_system(), incoming=incoming) as here,
    ):
        assert shape(here.greeting) == shape(peer.greeting)
        assert here.greeting["QMP"]["capabilities"] == peer.greeting["QMP"]["capabilities"]
        for speaker in (here, peer):
            if script != "negotiation":
                speaker.negotiate()
        for step in SCRIPTS[script]:
            if step.concerns(version):
                theirs, ours = peer.answer(step), here.answer(step)
                if not agree(step, ours, theirs):
                    request = step.request(Path("DIR")).decode()
                    differences.append(f"{request}\n    QEMU says {theirs}\n    we say    {ours}")
    assert not differences, "\n".join(["the transcripts differ:", *differences])


def major(peer: Peer) -> int:
    assert peer.version is not None
    return peer.version[0]


EXECUTED = re.compile(rb'"exec(?:ute|-oob)": "([^"]+)"')


def require_dialect(qemu: str) -> None:
    if major(real(qemu)) != 10:
        pytest.skip("schema and events are compared with QEMU 10, whose dialect is spoken here; this QEMU is another")


def commands_of(script: Iterable[Step]) -> set[str]:
    names = set()
    for step in script:
        names.add(step.command)
        names |= {name.decode() for name in EXECUTED.findall(step.raw)}
    return names


QUIT = {"quit"}  # has a test of its own: it ends the script


def test_every_command_that_both_have_is_in_a_script(stage: Stage, qemu: str) -> None:
    names = []
    for name, system in (("qemu", qemu), ("ours", qemumig_system())):
        vmm = stage.vmm(name, system, guest=GuestParameters(), memory=32 * MIB)
        names.append({entry["name"] for entry in vmm.command("query-commands")})
    theirs, ours = names
    version = major(real(qemu))
    spoken = set().union(*(commands_of(s for s in script if s.concerns(version)) for script in SCRIPTS.values()))
    assert (ours & theirs) - spoken - QUIT == set()
    only_some_have = {"query-migrationthreads"}
    assert ours - theirs <= only_some_have


# ---- the schema ----

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


# ---- the order of events ----


def names_of(messages: Iterable[dict[str, Any]]) -> list[str]:
    """Events and responses by name; passes while active are left out, for their number is a matter of speed."""
    names: list[str] = []
    for message in messages:
        name = message.get("event") or next(name for name in ("return", "error", "QMP") if name in message)
        if name == "MIGRATION":
            name = message["data"]["status"]
        if name != "MIGRATION_PASS" or names[-1:] != ["active"]:
            names.append(name)
    return names


def test_events_of_a_command_come_before_its_answer(stage: Stage, qemu: str) -> None:
    told = []
    for name, system in (("qemu", qemu), ("ours", qemumig_system())):
        with Speaker(stage, name, system) as speaker:
            speaker.negotiate()
            steps = ("stop", "cont", "system_reset", "system_powerdown", "quit")
            told.append([speaker.answer(ask(step)) for step in steps])
            assert speaker.vmm.process.wait(PATIENCE_S) == 0
    assert told[0] == told[1]
    assert [names_of(one) for one in told[1]] == [
        ["STOP", "return"],
        ["RESUME", "return"],
        ["RESET", "return"],
        ["POWERDOWN", "return"],
        ["SHUTDOWN", "return"],
    ]


EVENTS_ON = ask("migrate-set-capabilities", {"capabilities": [{"capability": "events", "state": True}]})


def migrated(stage: Stage, label: str, system: str, *, paused: bool) -> tuple[list[str], list[str]]:
    """The events of both ends of a migration, with nothing but *system* on them."""
    with (
        Speaker(stage, f"{label}-a", system) as source,
        Speaker(stage, f"{label}-b", system, incoming=True) as destination,
    ):
        for speaker in (source, destination):
            speaker.negotiate()
            assert speaker.answer(EVENTS_ON) == [{"return": {}}]
        if paused:
            source.answer(ask("stop"))
        uri = listen(destination.vmm)
        source.send(ask("migrate", {"uri": uri}))
        source_events = events_of(source.until("MIGRATION", status="completed"))
        return source_events, events_of(destination.until("MIGRATION", status="completed"))


@pytest.mark.parametrize("paused", [False, True], ids=["running", "paused"])
def test_a_migration_has_the_events_of_qemu(stage: Stage, qemu: str, paused: bool) -> None:
    require_dialect(qemu)
    assert migrated(stage, "ours", qemumig_system(), paused=paused) == migrated(stage, "qemu", qemu, paused=paused)


def events_of(messages: Iterable[dict[str, Any]]) -> list[str]:
    """Without answers: when that of `migrate` comes between them is a matter of speed, too."""
    return names_of(message for message in messages if "event" in message)


def refused(stage: Stage, name: str, system: str) -> list[str]:
    """The events of a migration to where nobody listens."""
    with Speaker(stage, name, system) as speaker:
        speaker.negotiate()
        speaker.answer(EVENTS_ON)
        speaker.send(ask("migrate", {"uri": "unix:DIR/nobody"}))
        return events_of(speaker.until("MIGRATION", status="failed"))


def cancelled(stage: Stage, name: str, system: str) -> list[str]:
    """The events of a migration that is slowed down, and cancelled while it is active."""
    with Speaker(stage, name, system) as speaker, socket.socket(socket.AF_UNIX) as peer:
        speaker.negotiate()
        speaker.answer(EVENTS_ON)
        speaker.answer(ask("migrate-set-parameters", {"max-bandwidth": 4096}))
        peer.bind(str(speaker.directory / "peer"))
        peer.listen()
        speaker.send(ask("migrate", {"uri": "unix:DIR/peer"}))
        came = speaker.until("MIGRATION", status="active")
        speaker.send(ask("migrate_cancel"))
        return events_of(came + speaker.until("MIGRATION", status="cancelled"))


def members(value: dict[str, Any]) -> list[str]:
    return sorted(value)


STATE = ask("query-migrate", view=members)
PAUSE = {"capability": "pause-before-switchover", "state": True}
GO_ON = ask("migrate-continue", {"state": "pre-switchover"})


def paused(stage: Stage, name: str, system: str, *, end: Step, status: str) -> list[Any]:
    """The events around a pause before the switchover that ends with *end*, and what can be seen and done in it."""
    with Speaker(stage, f"{name}-a", system) as source, Speaker(stage, f"{name}-b", system, incoming=True) as destination:
        for speaker in (source, destination):
            speaker.negotiate()
        events_on: list[Any] = [*(EVENTS_ON.arguments or {})["capabilities"], PAUSE]
        source.answer(ask("migrate-set-capabilities", {"capabilities": events_on}))
        start = ask("migrate", {"uri": listen(destination.vmm)})
        came = source.until_answered(start, "MIGRATION", status="pre-switchover")
        seen = [source.answer(STATE)[-1], source.answer(ask("migrate-continue", {"state": "device"}))[-1]]
        seen += [source.answer(ask("cont"))[-1], source.answer(ask("query-status", view=without("singlestep")))[-1]]
        came += source.until_answered(end, "MIGRATION", status=status)
        # In a cancel's wake a QEMU may find an error of its channel, too.
        after = ask("query-migrate", view=lambda value: members(without("error-desc")(value)))
        return [events_of(came), *seen, source.answer(after)[-1]]


def goes_on(stage: Stage, name: str, system: str) -> list[Any]:
    return paused(stage, name, system, end=GO_ON, status="completed")


def cancelled_in_the_pause(stage: Stage, name: str, system: str) -> list[Any]:
    return paused(stage, name, system, end=ask("migrate_cancel"), status="cancelled")


def yanked(stage: Stage, name: str, system: str) -> list[Any]:
    """The events of a migration to a peer that reads nothing, broken by yank, and what query-migrate shows meanwhile."""
    with Speaker(stage, name, system) as speaker, socket.socket(socket.AF_UNIX) as peer:
        speaker.negotiate()
        speaker.answer(EVENTS_ON)
        peer.bind(str(speaker.directory / "peer"))
        peer.listen()
        came = speaker.until_answered(ask("migrate", {"uri": "unix:DIR/peer"}), "MIGRATION", status="active")
        came.append(speaker.answer(STATE)[-1])
        end = ask("yank", {"instances": [{"type": "migration"}]})
        came += speaker.until_answered(end, "MIGRATION", status="failed")
        return [events_of(came), speaker.answer(STATE)[-1]]


@pytest.mark.parametrize(
    "scenario",
    [refused, cancelled, goes_on, cancelled_in_the_pause, yanked],
    ids=lambda scenario: scenario.__name__,
)
def test_a_migration_that_fails_has_the_events_of_qemu(stage: Stage, qemu: str, scenario: Any) -> None:
    """Whether the answer or the next event is first is a race on both sides, so answers are left out."""
    require_dialect(qemu)
    assert scenario(stage, "ours", qemumig_system()) == scenario(stage, "qemu", qemu)
