"""Capabilities, parameters and properties: names, types, defaults, ranges, contradictions (qmp.md §7, §8).

The tables are complete, with QEMU's names and order.  What is not built yet is refused when somebody asks for it, with a
message that says so; it is never accepted in silence.

One default differs from QEMU's: `return-path` is on.  It costs a few bytes, every QEMU answers it, and only with it does
a source learn that the destination has really taken the guest.  Transports that flow one way leave it out unless it was
asked for by name.
"""

from __future__ import annotations

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
    Capability("xbzrle"),
    Capability("rdma-pin-all"),
    Capability("auto-converge"),
    Capability("zero-blocks", built=True),  # without effect in QEMU, too
    Capability("events", built=True),
    Capability("postcopy-ram"),
    Capability("x-colo"),
    Capability("release-ram"),
    Capability("return-path", built=True, default=True),
    Capability("pause-before-switchover"),
    Capability("multifd"),
    Capability("dirty-bitmaps"),
    Capability("postcopy-blocktime"),
    Capability("late-block-activate", built=True),  # activation is always late, as in QEMU 10.0
    Capability("x-ignore-shared"),
    Capability("validate-uuid", built=True),
    Capability("background-snapshot"),
    Capability("zero-copy-send"),
    Capability("postcopy-preempt"),
    Capability("switchover-ack"),
    Capability("dirty-limit"),
    Capability("mapped-ram"),
)


@dataclass(frozen=True)
class Parameter:
    """One parameter: its QAPI *kind*, *default*, and the range *low* … *high* with QEMU's *text* for a violation."""

    name: str
    kind: str
    default: Any
    low: int = 0
    high: int = UINT64
    text: str = ""
    built: bool = False
    values: tuple[str, ...] = ()


def _percent(name: str, default: int, low: int, high: int) -> Parameter:
    return Parameter(name, "uint8", default, low, high, f"an integer in the range of {low} to {high}")


PARAMETERS = (
    Parameter("announce-initial", "size", 50, 0, 100000, "a value between 0 and 100000", built=True),
    Parameter("announce-max", "size", 550, 0, 100000, "a value between 0 and 100000", built=True),
    Parameter("announce-rounds", "size", 5, 0, 1000, "a value between 0 and 1000", built=True),
    Parameter("announce-step", "size", 100, 1, 10000, "a value between 0 and 10000", built=True),
    _percent("throttle-trigger-threshold", 50, 1, 100),
    _percent("cpu-throttle-initial", 20, 1, 99),
    _percent("cpu-throttle-increment", 10, 1, 99),
    Parameter("cpu-throttle-tailslow", "bool", False),
    Parameter("tls-creds", "StrOrNull", ""),
    Parameter("tls-hostname", "StrOrNull", ""),
    Parameter("tls-authz", "StrOrNull", ""),
    Parameter("max-bandwidth", "size", 128 << 20, built=True),
    Parameter("avail-switchover-bandwidth", "size", 0, built=True),
    Parameter("downtime-limit", "uint64", 300, 0, 2000000, "an integer in the range of 0 to (2000 * 1000) ms", built=True),
    Parameter("x-checkpoint-delay", "uint32", 20000, 0, (1 << 32) - 1),
    Parameter("multifd-channels", "uint8", 2, 1, 255, "a value between 1 and 255"),
    Parameter("xbzrle-cache-size", "size", 64 << 20, 4096, UINT64, "a power of two no less than the target page size"),
    Parameter("max-postcopy-bandwidth", "size", 0),
    Parameter("max-cpu-throttle", "uint8", 99, 1, 99, "an integer in the range of cpu_throttle_initial to 99"),
    Parameter("multifd-compression", "enum", "none", values=("none", "zlib", "zstd")),
    Parameter("multifd-zlib-level", "uint8", 1, 0, 9, "a value between 0 and 9"),
    Parameter("multifd-zstd-level", "uint8", 1, 0, 20, "a value between 0 and 20"),
    Parameter("x-vcpu-dirty-limit-period", "uint64", 1000, 1, 1000, "a value between 1 and 1000"),
    Parameter("vcpu-dirty-limit", "uint64", 1, 1, UINT64, "a value of at least 1 MB/s"),
    Parameter("mode", "enum", "normal", values=("normal", "cpr-reboot", "cpr-transfer")),
    Parameter("zero-page-detection", "enum", "multifd", values=("none", "legacy", "multifd")),
    Parameter("direct-io", "bool", False),
)

_CAPABILITY = {capability.name: capability for capability in CAPABILITIES}
_PARAMETER = {parameter.name: parameter for parameter in PARAMETERS}

# -global migration.NAME for what has no command: name → default (stream.md §7, qmp.md §8)
PROPERTIES: Mapping[str, Any] = {
    "send-configuration": True,
    "send-section-footer": True,
    "store-global-state": True,
    "send-switchover-start": False,  # QEMU before 10.0 refuses the command; 10.0 takes a stream without it
    "x-clear-bitmap-shift": 14,
}

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
        """All of them, in QEMU's order."""
        return dict(self._parameters)

    # ---- changing ----

    def set_capabilities(self, wanted: Iterable[tuple[str, bool]]) -> None:
        """Set several at once; OptionError when one is unknown, not built, or they contradict each other."""
        changes = dict(wanted)
        for name, state in changes.items():
            capability = _CAPABILITY.get(name)
            if capability is None:
                raise OptionError(f"Parameter 'capability' does not accept value '{name}'", name=name, value=state)
            if state and not capability.built:
                raise OptionError(f"capability '{name}' {NOT_BUILT}", name=name, value=state)
        self._capabilities.update(changes)
        self._chosen.update(changes)

    def set_parameters(self, wanted: Mapping[str, Any]) -> None:
        """Set several at once, types being checked already; OptionError when one is out of range or not built."""
        changes = {name: self._checked(name, value) for name, value in wanted.items()}
        self._parameters.update(changes)

    def _checked(self, name: str, value: Any) -> Any:
        parameter = _PARAMETER.get(name)
        if parameter is None:
            raise OptionError(f"Parameter '{name}' is unexpected", name=name, value=value)
        if parameter.kind == "StrOrNull" and value is None:
            value = ""
        if parameter.text and not parameter.low <= value <= parameter.high:
            spelled = name if name.startswith("x-") else name.replace("-", "_")
            raise OptionError(f"Parameter '{spelled}' expects {parameter.text}", name=name, value=value)
        if parameter.values and value not in parameter.values:
            raise OptionError(f"Parameter '{name}' does not accept value '{value}'", name=name, value=value)
        if not parameter.built and value != parameter.default:
            raise OptionError(f"parameter '{name}' {NOT_BUILT}", name=name, value=value)
        return value

    def set_property(self, name: str, value: str) -> None:
        """What `-global migration.NAME=VALUE` sets: a property, or a parameter or capability by QEMU's other name."""
        plain = name.removeprefix("x-")
        if name in self._properties:
            self._properties[name] = _parse(name, value, type(self._properties[name]))
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
