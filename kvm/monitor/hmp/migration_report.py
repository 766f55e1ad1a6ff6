"""Migration, as `info` shows it: the layout of QEMU 10.0 (hmp.md §4.2, §5, §6).

    lines = (Line("total time: {total-time} ms"), Line("dirty pages rate: {ram.dirty-pages-rate} pages", nonzero=True), …)

A line is shown when all that it names is there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .shell import HumanSession

_FIELD = re.compile(r"\{([a-z.-]+)(?::([a-z0-9.]+))?\}")


@dataclass(frozen=True)
class Line:
    """A line of a report: {member}, {member.member} or {member:kib}; *nonzero*: not shown when the first is 0."""

    text: str
    nonzero: bool = False

    def render(self, record: Mapping[str, Any]) -> str:
        """The line with its end, or nothing."""
        found = [lookup(record, path) for path, _ in _FIELD.findall(self.text)]
        if None in found or (self.nonzero and not found[0]):
            return ""
        return _FIELD.sub(lambda match: show(lookup(record, match[1]), match[2] or ""), self.text) + "\n"


def lookup(record: Mapping[str, Any], path: str) -> Any:
    """The member of *record* at a dotted path, None when it is not there."""
    value: Any = record
    for name in path.split("."):
        if not isinstance(value, Mapping) or name not in value:
            return None
        value = value[name]
    return value


def show(value: Any, how: str) -> str:
    """*value* as text: kib, f2 (two decimals), switch (on or off), list (with commas), or as it is."""
    if how == "kib":
        return str(value >> 10)
    if how == "f2":
        return f"{value:.2f}"
    if how == "switch":
        return "on" if value else "off"
    if how == "list":
        return ",".join(map(str, value))
    return str(value)


def render(lines: tuple[Line, ...], record: Mapping[str, Any]) -> str:
    """All lines that apply."""
    return "".join(line.render(record) for line in lines)


GLOBALS = (
    Line("store-global-state: {store-global-state:switch}"),
    Line("only-migratable: {only-migratable:switch}"),
    Line("send-configuration: {send-configuration:switch}"),
    Line("send-section-footer: {send-section-footer:switch}"),
    Line("send-switchover-start: {send-switchover-start:switch}"),
    Line("clear-bitmap-shift: {x-clear-bitmap-shift}"),
)
_PROPERTIES = (
    *("store-global-state", "send-configuration", "send-section-footer", "send-switchover-start"),
    "x-clear-bitmap-shift",
)

STATISTICS = (
    Line("expected downtime: {expected-downtime} ms"),
    Line("downtime: {downtime} ms"),
    Line("setup: {setup-time} ms"),
    Line("transferred ram: {ram.transferred:kib} kbytes"),
    Line("throughput: {ram.mbps:f2} mbps"),
    Line("remaining ram: {ram.remaining:kib} kbytes"),
    Line("total ram: {ram.total:kib} kbytes"),
    Line("duplicate: {ram.duplicate} pages"),
    Line("normal: {ram.normal} pages"),
    Line("normal bytes: {ram.normal-bytes:kib} kbytes"),
    Line("dirty sync count: {ram.dirty-sync-count}"),
    Line("page size: {ram.page-size:kib} kbytes"),
    Line("multifd bytes: {ram.multifd-bytes:kib} kbytes"),
    Line("pages-per-second: {ram.pages-per-second}"),
    Line("dirty pages rate: {ram.dirty-pages-rate} pages", nonzero=True),
    Line("postcopy request count: {ram.postcopy-requests}", nonzero=True),
    Line("precopy ram: {ram.precopy-bytes:kib} kbytes", nonzero=True),
    Line("downtime ram: {ram.downtime-bytes:kib} kbytes", nonzero=True),
    Line("postcopy ram: {ram.postcopy-bytes:kib} kbytes", nonzero=True),
    Line("Zero-copy-send fallbacks happened: {ram.dirty-sync-missed-zero-copy} times", nonzero=True),
    Line("cache size: {xbzrle-cache.cache-size} bytes"),
    Line("xbzrle transferred: {xbzrle-cache.bytes:kib} kbytes"),
    Line("xbzrle pages: {xbzrle-cache.pages} pages"),
    Line("xbzrle cache miss: {xbzrle-cache.cache-miss} pages"),
    Line("xbzrle cache miss rate: {xbzrle-cache.cache-miss-rate:f2}"),
    Line("xbzrle encoding rate: {xbzrle-cache.encoding-rate:f2}"),
    Line("xbzrle overflow: {xbzrle-cache.overflow}"),
    Line("cpu throttle percentage: {cpu-throttle-percentage}"),
    Line("dirty-limit throttle time: {dirty-limit-throttle-time-per-round} us"),
    Line("dirty-limit ring full time: {dirty-limit-ring-full-time} us"),
    Line("postcopy blocktime: {postcopy-blocktime}"),
    Line("postcopy vcpu blocktime: {postcopy-vcpu-blocktime:list}"),
)

PARAMETER_LINES = (
    Line("announce-initial: {announce-initial} ms"),
    Line("announce-max: {announce-max} ms"),
    Line("announce-rounds: {announce-rounds}"),
    Line("announce-step: {announce-step} ms"),
    Line("throttle-trigger-threshold: {throttle-trigger-threshold}"),
    Line("cpu-throttle-initial: {cpu-throttle-initial}"),
    Line("cpu-throttle-increment: {cpu-throttle-increment}"),
    Line("cpu-throttle-tailslow: {cpu-throttle-tailslow:switch}"),
    Line("max-cpu-throttle: {max-cpu-throttle}"),
    Line("tls-creds: '{tls-creds}'"),
    Line("tls-hostname: '{tls-hostname}'"),
    Line("max-bandwidth: {max-bandwidth} bytes/second"),
    Line("avail-switchover-bandwidth: {avail-switchover-bandwidth} bytes/second"),
    Line("downtime-limit: {downtime-limit} ms"),
    Line("x-checkpoint-delay: {x-checkpoint-delay} ms"),
    Line("multifd-channels: {multifd-channels}"),
    Line("multifd-compression: {multifd-compression}"),
    Line("zero-page-detection: {zero-page-detection}"),
    Line("xbzrle-cache-size: {xbzrle-cache-size} bytes"),
    Line("max-postcopy-bandwidth: {max-postcopy-bandwidth}"),
    Line("tls-authz: '{tls-authz}'"),
)
PARAMETER_LINES_AFTER_BITMAPS = (
    Line("x-vcpu-dirty-limit-period: {x-vcpu-dirty-limit-period} ms"),
    Line("vcpu-dirty-limit: {vcpu-dirty-limit} MB/s"),
    Line("mode: {mode}"),
    Line("direct-io: {direct-io:switch}"),
)


async def info_migrate(session: HumanSession) -> str:
    record = await session.qmp("query-migrate")
    properties = {name: session.shell.properties.migration_property(name) for name in _PROPERTIES}
    parts = [
        "globals:\n",
        render(GLOBALS, {**properties, "only-migratable": session.shell.only_migratable}),
        _blockers(record.get("blocked-reasons", [])),
        _status(record),
        render(STATISTICS, record),
        _addresses(record.get("socket-address", [])),
        Line("vfio device transferred: {vfio.transferred:kib} kbytes").render(record),
    ]
    return "".join(parts)


def _blockers(reasons: list[str]) -> str:
    return "Outgoing migration blocked:\n" + "".join(f"  {reason}\n" for reason in reasons) if reasons else ""


def _status(record: Mapping[str, Any]) -> str:
    if "status" not in record:
        return ""
    status = record["status"]
    if status == "failed" and "error-desc" in record:
        status += f" ({record['error-desc']})"
    return f"Migration status: {status}\ntotal time: {record.get('total-time', 0)} ms\n"


def _addresses(addresses: list[Mapping[str, Any]]) -> str:
    if not addresses:
        return ""
    return "socket address: [\n" + "".join(f"\t{_address(address)}\n" for address in addresses) + "]\n"


def _address(address: Mapping[str, Any]) -> str:
    kind = address["type"]
    if kind == "inet":
        host = f"[{address['host']}]" if ":" in address["host"] else address["host"]
        return f"tcp:{host}:{address['port']}"
    if kind == "vsock":
        return f"vsock:{address['cid']}:{address['port']}"
    return f"{kind}:{address['path'] if kind == 'unix' else address['str']}"


async def info_capabilities(session: HumanSession) -> str:
    entries = await session.qmp("query-migrate-capabilities")
    return "".join(f"{entry['capability']}: {show(entry['state'], 'switch')}\n" for entry in entries)


async def info_parameters(session: HumanSession) -> str:
    record = await session.qmp("query-migrate-parameters")
    mapping = _bitmap_mapping(record.get("block-bitmap-mapping"))
    return render(PARAMETER_LINES, record) + mapping + render(PARAMETER_LINES_AFTER_BITMAPS, record)


def _bitmap_mapping(nodes: list[Mapping[str, Any]] | None) -> str:
    if nodes is None:
        return ""
    lines = ["block-bitmap-mapping:\n"]
    for node in nodes:
        lines.append(f"  '{node['node-name']}' -> '{node['alias']}'\n")
        lines += [f"    '{bitmap['name']}' -> '{bitmap['alias']}'\n" for bitmap in node["bitmaps"]]
    return "".join(lines)
