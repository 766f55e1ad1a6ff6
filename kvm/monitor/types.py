"""What the general commands return and what events carry, declared once (qmp.md §3, §9, §14).

QAPI's spelling.  Where QEMU's type has more than a machine of this kind can show, only what is sent is declared.
"""

from __future__ import annotations

from qemumig.commands.command import ANY, BOOL, INT, STR, UINT64, Argument, Enum, Event, ListOf, Struct
from qemumig.qapi import RunState

RUN_STATES = Enum(state.value for state in RunState if state is not RunState.PRECONFIG)
STATUS = Struct(Argument("running", BOOL), Argument("status", RUN_STATES))
VERSION = Struct(
    Argument("qemu", Struct(*(Argument(part, INT) for part in ("major", "minor", "micro")))),
    Argument("package", STR),
)
ARCHITECTURE = Enum(("x86_64",))
CPUS = ListOf(
    Struct(
        Argument("cpu-index", INT),
        Argument("qom-path", STR),
        Argument("thread-id", INT),
        Argument(
            "props",
            Struct(*(Argument(part, INT, optional=True) for part in ("socket-id", "core-id", "thread-id"))),
            optional=True,
        ),
        Argument("target", ARCHITECTURE),
        tag="target",
    )
)
CPU_DEFINITIONS = ListOf(
    Struct(
        Argument("name", STR),
        Argument("migration-safe", BOOL, optional=True),
        Argument("static", BOOL),
        Argument("unavailable-features", ListOf(STR), optional=True),
        Argument("typename", STR),
        Argument("alias-of", STR, optional=True),
        Argument("deprecated", BOOL),
    )
)
MEMDEVS = ListOf(
    Struct(
        Argument("id", STR, optional=True),
        Argument("size", UINT64),
        *(Argument(name, BOOL) for name in ("merge", "dump", "prealloc", "share")),
        Argument("reserve", BOOL, optional=True),
        Argument("host-nodes", ListOf(INT)),
        Argument("policy", Enum(("default",))),
    )
)
MEMORY_SIZE = Struct(Argument("base-memory", UINT64), Argument("plugged-memory", UINT64, optional=True))
MACHINES = ListOf(
    Struct(
        Argument("name", STR),
        Argument("alias", STR, optional=True),
        Argument("is-default", BOOL, optional=True),
        Argument("cpu-max", INT),
        *(Argument(name, BOOL) for name in ("hotpluggable-cpus", "numa-mem-supported", "deprecated")),
        Argument("default-cpu-type", STR, optional=True),
        Argument("default-ram-id", STR, optional=True),
        Argument("acpi", BOOL),
        Argument(
            "compat-props",
            ListOf(Struct(Argument("qom-type", STR), Argument("property", STR), Argument("value", STR))),
            optional=True,
        ),
    )
)
CHARDEVS = ListOf(Struct(Argument("label", STR), Argument("filename", STR), Argument("frontend-open", BOOL)))
IMAGE = Struct(
    Argument("filename", STR),
    Argument("format", STR),
    Argument("dirty-flag", BOOL, optional=True),
    Argument("actual-size", INT, optional=True),
    Argument("virtual-size", INT),
)
BLOCK_NODE = Struct(
    Argument("file", STR),
    Argument("node-name", STR, optional=True),
    Argument("ro", BOOL),
    Argument("drv", STR),
    Argument("backing_file_depth", INT),
    Argument("encrypted", BOOL),
    Argument("detect_zeroes", Enum(("off",))),
    *(Argument(name, INT) for name in ("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr")),
    Argument("image", IMAGE),
    Argument("cache", Struct(Argument("writeback", BOOL), Argument("direct", BOOL), Argument("no-flush", BOOL))),
    Argument("write_threshold", INT),
    Argument("active", BOOL),
)
BLOCKS = ListOf(
    Struct(
        Argument("device", STR),
        Argument("qdev", STR, optional=True),
        Argument("type", STR),
        Argument("removable", BOOL),
        Argument("locked", BOOL),
        Argument("inserted", BLOCK_NODE, optional=True),
        Argument("io-status", Enum(("ok", "failed", "nospace")), optional=True),
    )
)
PROPERTIES = ListOf(
    Struct(
        Argument("name", STR),
        Argument("type", STR),
        Argument("description", STR, optional=True),
        Argument("default-value", ANY, optional=True),
    )
)
QOM_TYPES = ListOf(
    Struct(
        Argument("name", STR),
        Argument("abstract", BOOL, optional=True),
        Argument("parent", STR, optional=True),
    )
)
TRACE_EVENTS = ListOf(Struct(Argument("name", STR), Argument("state", Enum(("unavailable", "disabled", "enabled")))))

REASONS = Enum(
    (
        *("none", "host-error", "host-qmp-quit", "host-qmp-system-reset", "host-signal", "host-ui"),
        *("guest-shutdown", "guest-reset", "guest-panic", "subsystem-reset", "snapshot-load"),
    )
)
EVENTS = (
    Event("SHUTDOWN", Argument("guest", BOOL), Argument("reason", REASONS)),
    Event("POWERDOWN"),
    Event("RESET", Argument("guest", BOOL), Argument("reason", REASONS)),
    Event("STOP"),
    Event("RESUME"),
    Event("SUSPEND"),
    Event("WAKEUP"),
    Event(
        "BLOCK_IO_ERROR",
        Argument("device", STR),
        Argument("node-name", STR, optional=True),
        Argument("operation", Enum(("read", "write"))),
        Argument("action", Enum(("ignore", "report", "stop"))),
        Argument("nospace", BOOL, optional=True),
        Argument("reason", STR),
    ),
)
