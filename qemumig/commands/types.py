"""The records of the migration commands, declared once (qmp.md §4–§8): what clients may pass, what they get.

QAPI's spelling throughout.  Members that this version never sends are left out of what is returned; what comes in is
complete, so that a mistake in it gets QEMU's words.
"""

from __future__ import annotations

from ..options import CAPABILITIES, PARAMETERS, Parameter
from ..qapi import MigrationStatus
from .command import (
    BOOL,
    INT,
    NUMBER,
    SIZE,
    STR,
    STR_OR_NULL,
    UINT8,
    UINT16,
    UINT32,
    UINT64,
    Argument,
    Enum,
    Event,
    ListOf,
    Struct,
    Type,
)

STATUS = Enum(status.value for status in MigrationStatus)

# ---- addresses ----

_INET = Struct(
    Argument("host", STR),
    Argument("port", STR),
    Argument("numeric", BOOL, optional=True),
    Argument("to", UINT16, optional=True),
    Argument("ipv4", BOOL, optional=True),
    Argument("ipv6", BOOL, optional=True),
    Argument("keep-alive", BOOL, optional=True),
    Argument("mptcp", BOOL, optional=True),
)
_UNIX = Struct(
    Argument("path", STR),
    Argument("abstract", BOOL, optional=True),
    Argument("tight", BOOL, optional=True),
)
SOCKET_ADDRESS = Struct(
    Argument("type", Enum(("inet", "unix", "vsock", "fd"))),
    tag="type",
    variants={
        "inet": _INET,
        "unix": _UNIX,
        "vsock": Struct(Argument("cid", STR), Argument("port", STR)),
        "fd": Struct(Argument("str", STR)),
    },
)
MIGRATION_ADDRESS = Struct(
    Argument("transport", Enum(("socket", "exec", "rdma", "file"))),
    tag="transport",
    variants={
        "socket": SOCKET_ADDRESS,
        "exec": Struct(Argument("args", ListOf(STR))),
        "rdma": _INET,
        "file": Struct(Argument("filename", STR), Argument("offset", SIZE)),
    },
)
CHANNELS = ListOf(Struct(Argument("channel-type", Enum(("main", "cpr"))), Argument("addr", MIGRATION_ADDRESS)))

# ---- capabilities and parameters ----

CAPABILITY_STATES = ListOf(
    Struct(
        Argument("capability", Enum(capability.name for capability in CAPABILITIES)),
        Argument("state", BOOL),
    )
)
BITMAP_MAPPING = ListOf(
    Struct(
        Argument("node-name", STR),
        Argument("alias", STR),
        Argument(
            "bitmaps",
            ListOf(
                Struct(
                    Argument("name", STR),
                    Argument("alias", STR),
                    Argument("transform", Struct(Argument("persistent", BOOL, optional=True)), optional=True),
                )
            ),
        ),
    )
)
_KINDS: dict[str, Type] = {
    "uint8": UINT8,
    "uint32": UINT32,
    "uint64": UINT64,
    "size": SIZE,
    "bool": BOOL,
    "StrOrNull": STR_OR_NULL,
    "bitmap-mapping": BITMAP_MAPPING,
}


def parameter_type(parameter: Parameter) -> Type:
    """The type of *parameter* as a client passes it."""
    return Enum(parameter.values) if parameter.kind == "enum" else _KINDS[parameter.kind]


def _shown_type(parameter: Parameter) -> Type:
    return STR if parameter.kind == "StrOrNull" else parameter_type(parameter)


PARAMETERS_TO_SET = tuple(Argument(parameter.name, parameter_type(parameter), optional=True) for parameter in PARAMETERS)
PARAMETERS_SHOWN = Struct(*(Argument(parameter.name, _shown_type(parameter), optional=True) for parameter in PARAMETERS))

# ---- query-migrate ----

MIGRATION_STATS = Struct(
    *(Argument(name, INT) for name in ("transferred", "remaining", "total", "duplicate", "normal", "normal-bytes")),
    Argument("dirty-pages-rate", INT),
    Argument("mbps", NUMBER),
    *(Argument(name, INT) for name in ("dirty-sync-count", "postcopy-requests", "page-size", "multifd-bytes")),
    *(Argument(name, UINT64) for name in ("pages-per-second", "precopy-bytes", "downtime-bytes", "postcopy-bytes")),
    Argument("dirty-sync-missed-zero-copy", UINT64),
)
XBZRLE_CACHE_STATS = Struct(
    *(Argument(name, SIZE if name == "cache-size" else INT) for name in ("cache-size", "bytes", "pages", "cache-miss")),
    Argument("cache-miss-rate", NUMBER),
    Argument("encoding-rate", NUMBER),
    Argument("overflow", INT),
)
MIGRATION_INFO = Struct(
    Argument("status", STATUS, optional=True),
    Argument("ram", MIGRATION_STATS, optional=True),
    Argument("xbzrle-cache", XBZRLE_CACHE_STATS, optional=True),
    *(Argument(name, INT, optional=True) for name in ("total-time", "expected-downtime", "downtime", "setup-time")),
    Argument("cpu-throttle-percentage", INT, optional=True),
    Argument("error-desc", STR, optional=True),
    Argument("blocked-reasons", ListOf(STR), optional=True),
    Argument("socket-address", ListOf(SOCKET_ADDRESS), optional=True),
)
MIGRATION_THREADS = ListOf(Struct(Argument("name", STR), Argument("thread-id", INT)))

EVENTS = (
    Event("MIGRATION", Argument("status", STATUS)),
    Event("MIGRATION_PASS", Argument("pass", INT)),
)
