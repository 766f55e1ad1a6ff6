"""The scripts: every command and every error that both have, one feature after the other (qmp.md)."""

from __future__ import annotations

from typing import Any

from .steps import Step, ask, by, each, only, say, shape, then, without

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


# QEMU has memory-backend-shm from 9.1 on.
BEFORE_SHM = ("memory-backend", "memory-backend-ram", "memory-backend-file", "memory-backend-memfd", "virtio-mmio")

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
        ask("qom-list-types", {"implements": kind, "abstract": True}, view=by("name", only=BEFORE_SHM), until=7)
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
    "machine": [*MACHINE, *DUMPS, *RUN_STATE],  # a dump needs page tables, a reset takes them away
    "descriptors and yank": DESCRIPTORS,
    "objects": OBJECTS,
    "migration to here": DESTINATION,
}
