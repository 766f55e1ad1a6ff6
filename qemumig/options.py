"""Capabilities, parameters and properties: names, types, defaults, ranges, contradictions (qmp.md §7, §8).

The tables are complete, with QEMU's names and order.  What contradicts something else, or is out of range, is refused with
QEMU's words; what is not built yet is refused when somebody asks for it, with a message that says so, never accepted in
silence.  Checks come in QEMU's order, so the first of several mistakes is the same one here.

One default differs from QEMU's: `return-path` is on.  It costs a few bytes, every QEMU answers it, and only with it does
a source learn that the destination has really taken the guest.  Transports that flow one way leave it out unless it was
asked for by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .errors import OptionError

UINT64 = (1 << 64) - 1
C_LIMITS = {"uint8": (1 << 8) - 1, "uint32": (1 << 32) - 1}  # a larger number is the wrong type, not out of range


@dataclass(frozen=True)
class Capability:
    """One capability; *built* says that asking for it works, *ineffective* that QEMU accepts it without effect."""

    name: str
    built: bool = False
    default: bool = False


CAPABILITIES = (
    Capability("xbzrle", built=True),
    Capability("rdma-pin-all"),
    Capability("auto-converge", built=True),
    Capability("zero-blocks", built=True),  # without effect in QEMU, too
    Capability("events", built=True),
    Capability("postcopy-ram", built=True),
    Capability("x-colo"),
    Capability("release-ram", built=True),
    Capability("return-path", built=True, default=True),
    Capability("pause-before-switchover", built=True),
    Capability("multifd", built=True),
    Capability("dirty-bitmaps"),
    Capability("postcopy-blocktime", built=True),
    Capability("late-block-activate", built=True),  # activation is always late, as in QEMU 10.0
    Capability("x-ignore-shared", built=True),
    Capability("validate-uuid", built=True),
    Capability("background-snapshot", built=True),
    Capability("zero-copy-send", built=True),  # of a source; without effect where pages go to a file, as in QEMU
    Capability("postcopy-preempt", built=True),
    Capability("switchover-ack", built=True),
    Capability("dirty-limit"),
    Capability("mapped-ram", built=True),
)


@dataclass(frozen=True)
class Parameter:
    """One parameter: its QAPI *kind*, *default*, and the range *low* … *high* with QEMU's *text* for a violation.

    A default of None: `query-migrate-parameters` shows it only once it was set.
    """

    name: str
    kind: str
    default: Any
    low: int = 0
    high: int = UINT64
    text: str = ""
    built: bool = False
    values: tuple[str, ...] = ()


def _percent(name: str, default: int, low: int, high: int) -> Parameter:
    return Parameter(name, "uint8", default, low, high, f"an integer in the range of {low} to {high}", built=True)


PARAMETERS = (
    Parameter("announce-initial", "size", 50, 0, 100000, "a value between 0 and 100000", built=True),
    Parameter("announce-max", "size", 550, 0, 100000, "a value between 0 and 100000", built=True),
    Parameter("announce-rounds", "size", 5, 0, 1000, "a value between 0 and 1000", built=True),
    Parameter("announce-step", "size", 100, 1, 10000, "a value between 0 and 10000", built=True),
    _percent("throttle-trigger-threshold", 50, 1, 100),
    _percent("cpu-throttle-initial", 20, 1, 99),
    _percent("cpu-throttle-increment", 10, 1, 99),
    Parameter("cpu-throttle-tailslow", "bool", False, built=True),
    Parameter("tls-creds", "StrOrNull", "", built=True),
    Parameter("tls-hostname", "StrOrNull", "", built=True),
    Parameter("tls-authz", "StrOrNull", "", built=True),
    Parameter("max-bandwidth", "size", 128 << 20, built=True),
    Parameter("avail-switchover-bandwidth", "size", 0, built=True),
    Parameter("downtime-limit", "uint64", 300, 0, 2000000, "an integer in the range of 0 to (2000 * 1000) ms", built=True),
    Parameter("x-checkpoint-delay", "uint32", 20000, 0, (1 << 32) - 1),
    Parameter("multifd-channels", "uint8", 2, 1, 255, "a value between 1 and 255", built=True),
    Parameter(
        *("xbzrle-cache-size", "size", 64 << 20, 4096, UINT64),
        *("a power of two no less than the target page size", True),
    ),
    Parameter("max-postcopy-bandwidth", "size", 0, built=True),
    Parameter("max-cpu-throttle", "uint8", 99, 1, 99, "an integer in the range of cpu_throttle_initial to 99", built=True),
    Parameter("multifd-compression", "enum", "none", values=("none", "zlib", "zstd"), built=True),
    Parameter("multifd-zlib-level", "uint8", 1, 0, 9, "a value between 0 and 9", built=True),
    Parameter("multifd-qatzip-level", "uint8", 1, 1, 9, "a value between 1 and 9"),
    Parameter("multifd-zstd-level", "uint8", 1, 0, 20, "a value between 0 and 20", built=True),
    Parameter("block-bitmap-mapping", "bitmap-mapping", None),
    Parameter("x-vcpu-dirty-limit-period", "uint64", 1000, 1, 1000, "a value between 1 and 1000"),
    Parameter("vcpu-dirty-limit", "uint64", 1, 1, UINT64),
    Parameter("mode", "enum", "normal", values=("normal", "cpr-reboot", "cpr-transfer")),
    Parameter("zero-page-detection", "enum", "multifd", values=("none", "legacy", "multifd"), built=True),
    Parameter("direct-io", "bool", False, built=True),
)


@dataclass(frozen=True)
class Rule:
    """With *capability* on, *other* must be on (*wanted*) or off; *text* says it."""

    capability: str
    other: str
    wanted: bool
    text: str


_ZERO_COPY = "Zero copy only available for non-compressed non-TLS multifd migration"
_MAPPED_RAM = "Mapped-ram only available for non-compressed non-TLS multifd migration"
_NOT_IN_BACKGROUND = (
    *("postcopy-ram", "dirty-bitmaps", "postcopy-blocktime", "late-block-activate", "return-path", "multifd"),
    *("pause-before-switchover", "auto-converge", "release-ram", "rdma-pin-all", "xbzrle", "x-colo", "validate-uuid"),
    "zero-copy-send",
)

RULES = (  # in the order in which QEMU looks at them
    Rule("postcopy-ram", "x-ignore-shared", False, "Postcopy is not compatible with ignore-shared"),
    *(
        Rule("background-snapshot", name, False, f"Background-snapshot is not compatible with {name}")
        for name in _NOT_IN_BACKGROUND
    ),
    Rule("zero-copy-send", "multifd", True, _ZERO_COPY),
    Rule("zero-copy-send", "xbzrle", False, _ZERO_COPY),
    Rule("postcopy-preempt", "postcopy-ram", True, "Postcopy preempt requires postcopy-ram"),
    Rule("switchover-ack", "return-path", True, "Capability 'switchover-ack' requires capability 'return-path'"),
    Rule(
        "dirty-limit",
        "auto-converge",
        False,
        "dirty-limit conflicts with auto-converge either of then available currently",
    ),
    Rule("multifd", "xbzrle", False, "Multifd is not compatible with xbzrle"),
    Rule("mapped-ram", "xbzrle", False, "Mapped-ram migration is incompatible with xbzrle"),
    Rule("mapped-ram", "postcopy-ram", False, "Mapped-ram migration is incompatible with postcopy"),
)

_RANGE_ORDER = (  # in which QEMU looks at values
    *("throttle-trigger-threshold", "cpu-throttle-initial", "cpu-throttle-increment", "downtime-limit"),
    *("multifd-channels", "multifd-zlib-level", "multifd-qatzip-level", "multifd-zstd-level", "xbzrle-cache-size"),
    *("max-cpu-throttle", "announce-initial", "announce-max", "announce-rounds", "announce-step"),
    *("block-bitmap-mapping", "x-vcpu-dirty-limit-period", "vcpu-dirty-limit"),
)

_CAPABILITY = {capability.name: capability for capability in CAPABILITIES}
_PARAMETER = {parameter.name: parameter for parameter in PARAMETERS}

# -global migration.NAME for what has no command: name → default (stream.md §7, qmp.md §8)
PROPERTIES: Mapping[str, Any] = {
    "send-configuration": True,
    "send-section-footer": True,
    "store-global-state": True,
    "multifd-flush-after-each-section": False,  # QEMU before 8.1 knows nothing else
    "multifd-clean-tls-termination": True,  # QEMU before 10.0 ends without a word
    "send-switchover-start": False,  # QEMU before 10.0 refuses the command; 10.0 takes a stream without it
    "switchover-ack-legacy": True,  # QEMU 11.1 counts the devices that must agree at the source: none here, and no message
    "x-clear-bitmap-shift": 14,
    "x-compress": False,  # what QEMU until 9.0 has as a capability and a parameter (compress.md); for a source, others ask
    "x-compress-level": 1,
    "x-preempt-pre-7-2": False,  # urgent pages' channel connects at the start, and ends with a mark
}

_IDENTIFIER = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")
_NODE_NAME_LIMIT, _BITMAP_NAME_LIMIT, _ALIAS_LIMIT = 31, 1023, 255  # bytes

MOST_COMPRESSED = 9  # of zlib's levels

NOT_BUILT = "is not built in this version of qemumig"


class MigrationOptions:
    """The capabilities, parameters and properties of one process, both sides.

    Changing them is all or nothing: a set with a mistake in it leaves everything as it was.
    """

    def __init__(self) -> None:
        self._capabilities = {capability.name: capability.default for capability in CAPABILITIES}
        self._chosen: set[str] = set()  # capabilities that somebody set by name
        self._parameters = {parameter.name: parameter.default for parameter in PARAMETERS}
        self._properties = dict(PROPERTIES)

    # ---- reading ----

    def capability(self, name: str) -> bool:
        return self._capabilities[name]

    def is_chosen(self, name: str) -> bool:
        """True when somebody set this capability by name: a default may give way, a choice may not."""
        return name in self._chosen

    def parameter(self, name: str) -> Any:
        return self._parameters[name]

    def migration_property(self, name: str) -> Any:
        return self._properties[name]

    def capabilities(self) -> dict[str, bool]:
        """All of them, in QEMU's order."""
        return dict(self._capabilities)

    def parameters(self) -> dict[str, Any]:
        """All of them that have a value, in QEMU's order."""
        return {name: value for name, value in self._parameters.items() if value is not None}

    # ---- changing ----

    def set_capabilities(self, wanted: Iterable[tuple[str, bool]]) -> None:
        """Set several at once; OptionError when one is unknown, not built, or they contradict each other."""
        changes = dict(wanted)
        for name, state in changes.items():
            capability = _CAPABILITY.get(name)
            if capability is None:
                raise OptionError(f"Parameter 'capability' does not accept value '{name}'", name=name, value=state)
        self._check_rules(changes)
        for name, state in changes.items():
            if state and not _CAPABILITY[name].built:
                raise OptionError(f"capability '{name}' {NOT_BUILT}", name=name, value=state)
        self._capabilities.update(changes)
        self._chosen.update(changes)

    def _check_rules(self, changes: Mapping[str, bool]) -> None:
        """OptionError when the capabilities contradict each other once *changes* are made."""
        result = {**self._capabilities, **changes}
        for rule in RULES:
            if not result[rule.capability]:
                continue
            # A default that nobody chose is in nobody's way.
            by_default = rule.other not in changes and rule.other not in self._chosen
            if result[rule.other] != rule.wanted and not (by_default and result[rule.other]):
                raise OptionError(rule.text, name=rule.capability, value=True)
        if result["zero-copy-send"] and not _is_plain(self._parameters):
            raise OptionError(_ZERO_COPY, name="zero-copy-send", value=True)

    def set_parameters(self, wanted: Mapping[str, Any]) -> None:
        """Set several at once, types being checked already; OptionError when one is out of range or not built."""
        changes = {name: _known_value(name, value) for name, value in wanted.items()}
        result = {**self._parameters, **changes}
        for name in _RANGE_ORDER:
            if name in changes:
                _check_range(_PARAMETER[name], result)
        if self._capabilities["zero-copy-send"] and not _is_plain(result):
            raise OptionError(_ZERO_COPY, name="zero-copy-send", value=True)
        if self._capabilities["mapped-ram"] and not _is_plain(self._parameters):  # what is set now, as in QEMU
            raise OptionError(_MAPPED_RAM, name="mapped-ram", value=True)
        for name, value in changes.items():
            if not _PARAMETER[name].built and value != _PARAMETER[name].default:
                raise OptionError(f"parameter '{name}' {NOT_BUILT}", name=name, value=value)
        self._parameters.update(changes)

    def set_property(self, name: str, value: str) -> None:
        """What `-global migration.NAME=VALUE` sets: a property, or a parameter or capability by QEMU's other name."""
        plain = name.removeprefix("x-")
        if name in self._properties:
            parsed = _parse(name, value, type(self._properties[name]))
            if name == "x-compress-level" and parsed > MOST_COMPRESSED:
                text = f"can't apply global migration.{name}={value}: expected a value between 0 and {MOST_COMPRESSED}"
                raise OptionError(text, name=name, value=value)
            self._properties[name] = parsed
        elif name in _PARAMETER or (name.startswith("x-") and plain in _PARAMETER):
            parameter = _PARAMETER.get(name) or _PARAMETER[plain]
            parsed = _parse(parameter.name, value, type(parameter.default))
            if parameter.kind in C_LIMITS and parsed > C_LIMITS[parameter.kind]:
                text = f"can't apply global migration.{name}={value}: Parameter '{name}' expects {parameter.kind}_t"
                raise OptionError(text, name=name, value=value)
            self.set_parameters({parameter.name: parsed})
        elif plain in _CAPABILITY:
            self.set_capabilities([(plain, _parse(name, value, bool))])
        else:
            text = f"can't apply global migration.{name}={value}: Property 'migration.{name}' not found"
            raise OptionError(text, name=name, value=value)


def _known_value(name: str, value: Any) -> Any:
    """*value* as parameter *name* keeps it; OptionError for a name or a word that there is not."""
    parameter = _PARAMETER.get(name)
    if parameter is None:
        raise OptionError(f"Parameter '{name}' is unexpected", name=name, value=value)
    if parameter.values and value not in parameter.values:
        raise OptionError(f"Parameter '{name}' does not accept value '{value}'", name=name, value=value)
    return "" if parameter.kind == "StrOrNull" and value is None else value


def _check_range(parameter: Parameter, result: Mapping[str, Any]) -> None:
    """OptionError when the value that *parameter* has in *result* is out of its range."""
    name, value = parameter.name, result[parameter.name]
    spelled = name if name.startswith("x-") else name.replace("-", "_")
    if name == "block-bitmap-mapping":
        _check_bitmap_mapping(value)
        return
    if name == "vcpu-dirty-limit" and value < parameter.low:
        raise OptionError(f"Parameter '{spelled}' must be greater than 1 MB/s", name=name, value=value)
    low = result["cpu-throttle-initial"] if name == "max-cpu-throttle" else parameter.low
    is_odd_size = name == "xbzrle-cache-size" and value & (value - 1)
    if not low <= value <= parameter.high or is_odd_size:
        raise OptionError(f"Parameter '{spelled}' expects {parameter.text}", name=name, value=value)


def _check_bitmap_mapping(mapping: Iterable[Mapping[str, Any]]) -> None:
    """OptionError when names or aliases of block-bitmap-mapping are used twice or cannot be sent (qmp.md §8)."""
    nodes: set[str] = set()
    aliases: set[str] = set()
    for node in mapping:
        name, alias = node["node-name"], node["alias"]
        if not _IDENTIFIER.fullmatch(alias):
            raise _bad_mapping(f"The node alias '{alias}' is not well-formed")
        _check_length("node alias", alias, _ALIAS_LIMIT)
        _check_length("node name", name, _NODE_NAME_LIMIT)
        if name in nodes:
            raise _bad_mapping(f"The node name '{name}' is mapped twice")
        if alias in aliases:
            raise _bad_mapping(f"The node alias '{alias}' is used twice")
        nodes.add(name)
        aliases.add(alias)
        _check_bitmap_names(node)


def _check_bitmap_names(node: Mapping[str, Any]) -> None:
    names: set[str] = set()
    aliases: set[str] = set()
    for bitmap in node["bitmaps"]:
        name, alias = bitmap["name"], bitmap["alias"]
        _check_length("bitmap name", name, _BITMAP_NAME_LIMIT)
        _check_length("bitmap alias", alias, _ALIAS_LIMIT)
        if name in names:
            raise _bad_mapping(f"The bitmap '{node['node-name']}'/'{name}' is mapped twice")
        if alias in aliases:
            raise _bad_mapping(f"The bitmap alias '{node['alias']}'/'{alias}' is used twice")
        names.add(name)
        aliases.add(alias)


def _check_length(what: str, name: str, limit: int) -> None:
    if len(name.encode()) > limit:
        raise _bad_mapping(f"The {what} '{name}' is longer than {limit} bytes")


def _bad_mapping(what: str) -> OptionError:
    return OptionError(f"Invalid mapping given for block-bitmap-mapping: {what}", name="block-bitmap-mapping")


def _is_plain(parameters: Mapping[str, Any]) -> bool:
    """True when *parameters* ask neither for compression nor for TLS."""
    return parameters["multifd-compression"] == "none" and not parameters["tls-creds"]


def _parse(name: str, text: str, kind: type) -> Any:
    place = f"can't apply global migration.{name}={text}"
    if kind is bool:
        if text not in ("on", "off", "true", "false", "yes", "no", "y", "n"):
            raise OptionError(f"{place}: Parameter '{name}' expects 'on' or 'off'", name=name, value=text)
        return text in ("on", "true", "yes", "y")
    if kind is int:
        try:
            number = int(text, 0)
        except ValueError:
            raise OptionError(f"{place}: Parameter '{name}' expects a number", name=name, value=text) from None
        if not 0 <= number <= UINT64:
            raise OptionError(f"{place}: Parameter '{name}' expects uint64", name=name, value=text)
        return number
    return text
