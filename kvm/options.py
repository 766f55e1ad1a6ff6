"""The command line: QEMU's words, what they mean here, and what is said about the ones that cannot be (cli.md).

In    argv without the program's name
Out   Arguments; or UsageError (exit status 1); or HelpRequested (exit status 0)

Options come in a table, OPTIONS, one entry each: name, value, a line of help and the function that files the value.
Only syntax and ranges are checked here; whether a file exists or a socket can be bound shows when it is opened.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from uuid import UUID

from . import trace
from .config import Chipset
from .keyval import UsageError, choice, identifier, integer, size, split, switch, unique
from .monitor.json_stream import INCOMPLETE, JsonError, JsonStream
from .monitor.qmp import EMULATED, PACKAGE

MACHINE = "microvm"
DEFAULT_RAM = 128 << 20
MAX_CPUS = 255
CPU_MODELS = ("host", "max", "qemu64")
RAM_GRANULE = 8192  # QEMU rounds -m up to a multiple of this
VERSION = "QEMU emulator version {major}.{minor}.{micro}".format(**EMULATED) + f" ({PACKAGE})"

# Devices that the machine may have, and what `auto`, or silence, means; ioapic2 comes with acpi only.
OPTIONAL_DEVICES = {"acpi": True, "ioapic2": True, "pit": True, "pic": True, "rtc": False}
MISSING_DEVICES = ("pcie",)  # `auto` and silence mean off, in QEMU too
MACHINE_SWITCHES = ("isa-serial", "x-option-roms", "auto-kernel-cmdline", "usb", "mem-merge", "dump-guest-core")
MACHINE_KEYS = ("accel", "kernel-irqchip", "memory-backend", *OPTIONAL_DEVICES, *MISSING_DEVICES, *MACHINE_SWITCHES)
TOPOLOGY = ("sockets", "dies", "clusters", "modules", "cores", "threads")
BACKEND_SWITCHES = ("share", "prealloc", "merge", "dump", "reserve", "x-use-canonical-path-for-ramblock-id")
BACKEND_KINDS: dict[str, dict[str, str]] = {  # key → type, beside "id" and what all kinds have
    "memory-backend-ram": {},
    "memory-backend-file": {
        "mem-path": "path",
        "align": "size",
        "offset": "size",
        "discard-data": "switch",
        "readonly": "switch",
        "rom": "auto",
    },
    "memory-backend-memfd": {"seal": "switch", "hugetlb": "switch", "hugetlbsize": "size"},
}
BACKEND_REQUIRED = {"memory-backend-file": ("mem-path",)}
UUID_FORM = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
URI_FORM = re.compile(r"[a-z]+:")


class HelpRequested(Exception):
    """The command line asks for text instead of a machine."""


@dataclass
class MonitorRequest:
    """A QMP monitor: on the -chardev called *chardev*, or on its own *device*; *option* made it."""

    option: str
    chardev: str = ""
    device: str = ""
    pretty: bool = False


@dataclass
class BackendRequest:
    """A memory backend: its QOM type, its id, its other properties by name."""

    kind: str
    id: str
    properties: dict[str, int | bool | str]


@dataclass
class Arguments:
    """What the command line asked for; sizes in bytes."""

    machine: dict[str, str | None] = field(default_factory=dict)
    accelerators: list[tuple[str, str]] = field(default_factory=list)  # option as typed, value
    enable_kvm: bool = False
    memory: dict[str, str | None] = field(default_factory=dict)
    topology: dict[str, str | None] = field(default_factory=dict)
    ram_size: int = 0  # 0: not said
    cpus: int = 1
    max_cpus: int = 1
    cpu_model: str = "qemu64"
    cpu_features: dict[str, bool] = field(default_factory=dict)
    kernel_irqchip: str = "split"
    chipset: Chipset = field(default_factory=Chipset)
    bios: str | None = None
    serials: list[str] = field(default_factory=list)
    chardevs: list[str] = field(default_factory=list)
    monitors: list[MonitorRequest] = field(default_factory=list)
    backends: list[BackendRequest] = field(default_factory=list)
    blockdevs: list[str] = field(default_factory=list)
    drives: list[str] = field(default_factory=list)
    devices: list[str] = field(default_factory=list)
    legacy_virtio: bool = True
    incoming: str | None = None
    paused: bool = False
    name: str | None = None
    process_name: str | None = None
    uuid: bytes | None = None
    defaults: bool = True
    nographic: bool = False
    pidfile: str | None = None
    daemonize: bool = False
    reboot: bool = True
    shutdown: bool = True
    timestamps: bool = False
    migration_properties: list[tuple[str, str]] = field(default_factory=list)
    vapic: bool = True
    traces: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)  # as typed, by key
    warnings: list[str] = field(default_factory=list)

    @property
    def memory_backend(self) -> str | None:
        """The id of the backend that is the machine's RAM."""
        return self.machine.get("memory-backend")

    def machine_switch(self, name: str, default: bool) -> bool:
        """Machine property *name*, which is on or off."""
        return switch(name, self.machine[name]) if name in self.machine else default

    def serial_devices(self) -> list[str]:
        """The DEVs of the serial ports, what applies without -serial included."""
        if self.serials or not self.defaults:
            return self.serials
        return ["stdio" if self.nographic else "null"]


@dataclass(frozen=True)
class Option:
    """One option: its value as help shows it ("" for none), a line of help, and what it does."""

    name: str
    value: str
    help: str
    act: Callable[[Arguments, str], None]


def parse(argv: list[str]) -> Arguments:
    """The meaning of the command line; UsageError or HelpRequested."""
    arguments = Arguments()
    words = iter(argv)
    for word in words:
        if not word.startswith("-") or word == "-":
            raise UsageError(f"{word}: {_about_file(word)}")
        option = OPTIONS.get(word.removeprefix("-").removeprefix("-"))
        if option is None:
            raise UsageError(f"{word}: invalid option")
        value = ""
        typed = word
        if option.value:
            try:
                value = next(words)
            except StopIteration:
                raise UsageError(f"{word}: requires an argument") from None
            typed = f"{word} {value}"
        try:
            option.act(arguments, value)
        except UsageError as error:
            raise error.during(typed) from error
    _check(arguments)
    return arguments


def _about_file(path: str) -> str:
    """Why a word that is no option, so a disk image to QEMU, is not taken."""
    if not os.path.exists(path):
        return f"Could not open '{path}': No such file or directory"
    return "disk images are not available"


# ---- what each option does with its value ----


def _machine(arguments: Arguments, text: str) -> None:
    for index, (key, value) in enumerate(split(text, "type")):
        if key in ("help", "?") and value is None:
            raise HelpRequested("\n".join([f"{MACHINE}-machine options:", *(f"  {name}" for name in MACHINE_KEYS)]))
        if value is None:
            raise UsageError(f"Expected '=' after parameter '{key}'")
        if not key:
            raise UsageError(f"Invalid parameter '{key}'")
        if key == "type" and value in ("help", "?"):
            raise HelpRequested(f"Supported machines are:\n{MACHINE:20} microvm (i386) (default)")
        if key == "type" and not (index == 0 and not value):
            arguments.machine["type"] = value
        else:
            arguments.machine[key] = value


def _accel(arguments: Arguments, text: str) -> None:
    if text in ("", "help", "?"):
        raise HelpRequested("Accelerators supported in QEMU binary:\nkvm")
    arguments.accelerators.append((f"-accel {text}", text))


def _enable_kvm(arguments: Arguments, text: str) -> None:
    arguments.enable_kvm = True


def _memory(arguments: Arguments, text: str) -> None:
    arguments.memory |= unique(split(text, "size"), ("size", "slots", "maxmem"))
    if "size" in arguments.memory:
        arguments.ram_size = size("size", arguments.memory["size"] or "0", default_unit="m")
    if "slots" in arguments.memory:
        size("slots", arguments.memory["slots"])
    if "maxmem" in arguments.memory:
        size("maxmem", arguments.memory["maxmem"])


def _smp(arguments: Arguments, text: str) -> None:
    arguments.topology |= dict(split(text, "cpus"))


def _cpu(arguments: Arguments, text: str) -> None:
    if text in ("help", "?"):
        raise HelpRequested("\n".join(["Available CPUs:", *(f"  {name}" for name in CPU_MODELS)]))
    if not text:
        raise UsageError("-cpu option cannot be empty", complete=True)
    (_, model), *features = split(text, "model")
    arguments.cpu_model = model or ""
    arguments.cpu_features = dict(_cpu_feature(arguments.cpu_model, key, value) for key, value in features)


def _cpu_feature(model: str, key: str, value: str | None) -> tuple[str, bool]:
    if value is None and key[:1] in ("+", "-"):
        return key[1:], key[0] == "+"
    return key, _global_switch(f"{model}-x86_64-cpu", key, value or "on")


def _bios(arguments: Arguments, text: str) -> None:
    arguments.bios = text


def _firmware_folder(arguments: Arguments, text: str) -> None:
    """-L: QEMU looks for firmware there; here -bios names the file itself."""


def _serial(arguments: Arguments, text: str) -> None:
    arguments.serials.append(text)


def _chardev(arguments: Arguments, text: str) -> None:
    arguments.chardevs.append(text)


def _mon(arguments: Arguments, text: str) -> None:
    keys = unique(split(text, "chardev"), ("chardev", "mode", "pretty"))
    if "chardev" not in keys:
        raise UsageError("Parameter 'chardev' is missing")
    mode = choice("mode", keys.get("mode", "readline"), ("readline", "control"))
    if mode == "readline":
        if "pretty" in keys:
            raise UsageError("'pretty' is not compatible with HMP monitors")
        raise UsageError("the human monitor is not available: mode=control makes a QMP monitor")
    pretty = switch("pretty", keys.get("pretty", "off"))
    arguments.monitors.append(MonitorRequest(f"-mon {text}", chardev=keys["chardev"] or "", pretty=pretty))


def _qmp(arguments: Arguments, text: str) -> None:
    arguments.monitors.append(MonitorRequest("-qmp", device=text))


def _qmp_pretty(arguments: Arguments, text: str) -> None:
    arguments.monitors.append(MonitorRequest("-qmp-pretty", device=text, pretty=True))


def _monitor(arguments: Arguments, text: str) -> None:
    if text != "none":
        raise UsageError("the human monitor is not available: use -monitor none, and -qmp for QMP")


def _object(arguments: Arguments, text: str) -> None:
    if text in ("help", "?"):
        raise HelpRequested("\n".join(["List of user creatable objects:", *(f"  {kind}" for kind in BACKEND_KINDS)]))
    properties = json_object(text) if text.startswith("{") else dict(split(text, "qom-type"))
    backend = memory_backend(properties)
    if any(other.id == backend.id for other in arguments.backends):
        raise UsageError(f"Duplicate ID '{backend.id}' for object")
    arguments.backends.append(backend)


def _blockdev(arguments: Arguments, text: str) -> None:
    arguments.blockdevs.append(text)


def _drive(arguments: Arguments, text: str) -> None:
    arguments.drives.append(text)


def _device(arguments: Arguments, text: str) -> None:
    if text in ("help", "?"):
        raise HelpRequested('Storage devices:\nname "virtio-blk-device", bus virtio-bus')
    arguments.devices.append(text)


def _incoming(arguments: Arguments, text: str) -> None:
    if not text:
        raise UsageError("Parameter 'channel-type' is missing")
    if text != "defer" and not URI_FORM.match(text):
        if text.startswith("{") or "=" in text:
            raise UsageError("-incoming takes a URI here, not a channel description")
        raise UsageError(f"Parameter 'channel-type' does not accept value '{text}'")
    arguments.incoming = text


def _paused(arguments: Arguments, text: str) -> None:
    arguments.paused = True


def _name(arguments: Arguments, text: str) -> None:
    keys = unique(split(text, "guest"), ("guest", "debug-threads", "process"))
    switch("debug-threads", keys.get("debug-threads", "off"))
    arguments.name = keys.get("guest", arguments.name)
    arguments.process_name = keys.get("process", arguments.process_name)


def _uuid(arguments: Arguments, text: str) -> None:
    if not UUID_FORM.fullmatch(text):
        raise UsageError("failed to parse UUID string: wrong format")
    arguments.uuid = UUID(text).bytes


def _no_defaults(arguments: Arguments, text: str) -> None:
    arguments.defaults = False


def _nothing(arguments: Arguments, text: str) -> None:
    """An option that asks for what is so anyway."""


def _only_none(key: str) -> Callable[[Arguments, str], None]:
    """An option whose device does not exist here: `none` is the only value."""

    def act(arguments: Arguments, text: str) -> None:
        (_, value), *more = split(text, key) or [(key, "")]
        choice(key, value, ("none",))
        if more:
            raise UsageError(f"Parameter '{more[0][0]}' is unexpected")

    return act


def _vga(arguments: Arguments, text: str) -> None:
    if text != "none":
        raise UsageError(f"unknown vga type: {text}", complete=True)


def _nographic(arguments: Arguments, text: str) -> None:
    arguments.nographic = True


def _pidfile(arguments: Arguments, text: str) -> None:
    arguments.pidfile = text


def _daemonize(arguments: Arguments, text: str) -> None:
    arguments.daemonize = True


def _no_reboot(arguments: Arguments, text: str) -> None:
    arguments.reboot = False


def _no_shutdown(arguments: Arguments, text: str) -> None:
    arguments.shutdown = False


def _action(arguments: Arguments, text: str) -> None:
    keys = unique(split(text), ("reboot", "shutdown"))
    if "reboot" in keys:
        arguments.reboot = choice("reboot", keys["reboot"], ("reset", "shutdown")) == "reset"
    if "shutdown" in keys:
        arguments.shutdown = choice("shutdown", keys["shutdown"], ("poweroff", "pause")) == "poweroff"


def _message(arguments: Arguments, text: str) -> None:
    keys = unique(split(text), ("timestamp",))
    arguments.timestamps = switch("timestamp", keys.get("timestamp", "off"))


def _trace(arguments: Arguments, text: str) -> None:
    keys = unique(split(text, "enable"), ("enable", "events", "file"))
    if keys.get("enable") in ("help", "?"):
        raise HelpRequested("\n".join(event.name for event in trace.TRACE.events()))
    arguments.traces.append((text, keys))


def _global(arguments: Arguments, text: str) -> None:
    driver, name, value = _global_parts(text)
    if driver == "migration":
        arguments.migration_properties.append((name, value))
    elif (driver, name) == ("apic-common", "vapic"):
        arguments.vapic = _global_switch(driver, name, value)
    elif (driver, name) == ("virtio-mmio", "force-legacy"):
        arguments.legacy_virtio = _global_switch(driver, name, value)
    elif driver in ("apic-common", "virtio-mmio"):
        text = f"can't apply global {driver}.{name}={value}: Property '{driver}.{name}' not found"
        raise UsageError(text, complete=True)
    else:
        arguments.warnings.append(f"warning: global {driver}.{name} has invalid class name")


def _global_parts(text: str) -> tuple[str, str, str]:
    match = re.match(r"([^.=,]+)\.([^=,]+)=(.*)", text, re.DOTALL)
    if match:
        return match.group(1), match.group(2), match.group(3)
    keys = unique(split(text), ("driver", "property", "value"))
    if len(keys) < 3:
        raise UsageError("options 'driver', 'property', and 'value' are required")
    return keys["driver"] or "", keys["property"] or "", keys["value"] or ""


def _global_switch(driver: str, name: str, value: str) -> bool:
    try:
        return switch(name, value)
    except UsageError as error:
        text = f"can't apply global {driver}.{name}={value}: {error}"
        raise UsageError(text, complete=True) from error


def _version(arguments: Arguments, text: str) -> None:
    raise HelpRequested(f"{VERSION}\nA hypervisor of its own that speaks QEMU's command line, monitor and migration.")


def _help(arguments: Arguments, text: str) -> None:
    raise HelpRequested(help_text())


# ---- values with rules of their own ----


def topology(pairs: dict[str, str | None]) -> tuple[int, int]:
    """How many vCPUs there are, and may be; from -smp's keys."""
    for key in pairs:
        if key not in ("cpus", "maxcpus", *TOPOLOGY):
            raise UsageError(f"Parameter 'smp.{key}' is unexpected")
    numbers = {key: integer(f"smp.{key}", value) for key, value in pairs.items()}
    if 0 in numbers.values():
        raise UsageError("Invalid CPU topology: CPU topology parameters must be greater than zero")
    for number in numbers.values():
        if not 0 < number <= MAX_CPUS:
            raise UsageError(f"Invalid SMP CPUs {number}. The max CPUs supported by machine '{MACHINE}' is {MAX_CPUS}")
    product = 1
    for key in TOPOLOGY:
        product *= numbers.get(key, 1)
    cpus = numbers.get("cpus", numbers.get("maxcpus", product))
    whole = {"sockets", "cores", "threads"} <= numbers.keys()
    max_cpus = numbers.get("maxcpus", product if whole else cpus)
    if max_cpus < cpus:
        raise UsageError(
            f"Invalid CPU topology: maxcpus must be equal to or greater than smp: maxcpus ({max_cpus}) < smp_cpus ({cpus})"
        )
    if max_cpus % product or (whole and product != max_cpus):
        parts = " * ".join(f"{key} ({numbers[key]})" for key in TOPOLOGY if key in numbers)
        raise UsageError(
            f"Invalid CPU topology: product of the hierarchy must match maxcpus: {parts} != maxcpus ({max_cpus})"
        )
    return cpus, max_cpus


def block_pairs(text: str, implied_key: str = "") -> dict[str, str | None]:
    """A -blockdev or -device, in either of its forms, as dotted keys; a key alone is on."""
    if text.startswith("{"):
        return dict(_dotted(json_object(text)))
    return {key: "on" if value is None else value for key, value in split(text, implied_key)}


def _dotted(value: dict, prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, inner in value.items():
        if isinstance(inner, dict):
            yield from _dotted(inner, f"{prefix}{key}.")
        else:
            yield prefix + key, {True: "on", False: "off"}[inner] if isinstance(inner, bool) else str(inner)


def json_object(text: str) -> dict:
    """*text* as one JSON object."""
    stream = JsonStream()
    stream.feed(text.encode("utf-8", "surrogateescape") + b" ")
    try:
        value = stream.next_value()
        if value is INCOMPLETE:
            raise JsonError("JSON parse error, premature EOI")
    except JsonError as error:
        raise UsageError(str(error)) from error
    if not isinstance(value, dict):
        raise UsageError("JSON object expected")
    return value


def memory_backend(properties: dict) -> BackendRequest:
    """A checked -object; keyval texts and JSON values are both fine."""
    kind = properties.get("qom-type")
    if kind is None:
        raise UsageError("Parameter 'qom-type' is missing")
    types = {"size": "size"} | dict.fromkeys(BACKEND_SWITCHES, "switch") | BACKEND_KINDS.get(str(kind), {})
    choice("qom-type", str(kind), BACKEND_KINDS)
    if "id" not in properties:
        raise UsageError("Parameter 'id' is missing")
    name = identifier("id", str(properties["id"]))
    for key in ("size", *BACKEND_REQUIRED.get(kind, ())):
        if key not in properties:
            raise UsageError(f"Parameter '{key}' is missing")
    values: dict[str, int | bool | str] = {}
    for key, value in properties.items():
        if key in ("qom-type", "id"):
            continue
        if key not in types:
            raise UsageError(f"Invalid parameter '{key}'")
        values[key] = backend_value(key, value, types[key])
    return BackendRequest(kind, name, values)


def backend_value(key: str, value: object, kind: str) -> int | bool | str:
    """A property of a memory backend as its type wants it."""
    if kind == "switch":
        return value if isinstance(value, bool) else switch(key, None if value is None else str(value))
    if kind == "path":
        if not isinstance(value, str):
            raise UsageError(f"Parameter '{key}' expects a path")
        return value
    if kind == "auto":
        return choice(key, str(value), ("auto", "on", "off"))
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    try:
        return size(key, str(value))
    except UsageError:
        raise UsageError(f"Parameter '{key}' expects a size value") from None


# ---- what can only be said when all options are known ----


def _check(arguments: Arguments) -> None:
    if arguments.topology:
        arguments.cpus, arguments.max_cpus = topology(arguments.topology)
    _check_machine(arguments)
    _check_accelerator(arguments)
    _check_memory(arguments)
    if arguments.bios is None:
        raise UsageError("no firmware: -bios FILE names the image to start")
    if len(arguments.serials) > 1 and any(device != "none" for device in arguments.serials[1:]):
        raise UsageError(f"-serial {arguments.serials[1]}: machine '{MACHINE}' has one serial port here")
    if not arguments.machine_switch("isa-serial", True) and arguments.serials not in ([], ["none"]):
        raise UsageError(f"-serial {arguments.serials[0]}: there is no serial port with isa-serial=off")


def _check_machine(arguments: Arguments) -> None:
    name = arguments.machine.pop("type", MACHINE)
    if name != MACHINE:
        hint = "Use -machine help to list supported machines"
        raise UsageError(f'unsupported machine type: "{name}"', hints=(hint,))
    for key, value in arguments.machine.items():
        if key not in MACHINE_KEYS:
            raise UsageError(f"Property '{MACHINE}-machine.{key.partition('.')[0]}' not found")
        if key in MACHINE_SWITCHES:
            switch(key, value)
        if key in OPTIONAL_DEVICES or key in MISSING_DEVICES:
            choice(key, value, ("on", "off", "auto"))
        if (key in MISSING_DEVICES and value == "on") or (key == "usb" and switch(key, value)):
            raise UsageError(f"{key}=on: this {MACHINE} has no {key}; leave it out or say {key}=off")
    arguments.chipset = chipset(arguments.machine)
    if "kernel-irqchip" in arguments.machine:
        arguments.kernel_irqchip = irqchip(arguments.machine["kernel-irqchip"])


def chipset(properties: dict[str, str | None]) -> Chipset:
    """Which optional devices the machine's properties ask for."""
    there = {}
    for key, automatic in OPTIONAL_DEVICES.items():
        value = properties.get(key, "auto")
        there[key] = automatic if value == "auto" else value == "on"
    there["ioapic2"] &= there["acpi"]
    return Chipset(**there)


def irqchip(value: str | None) -> str:
    """Where the interrupt controllers are; the APIC is always the kernel's."""
    if choice("kernel-irqchip", value, ("on", "off", "split")) == "off":
        raise UsageError("KVM does not support userspace APIC")
    return value or ""


def _check_accelerator(arguments: Arguments) -> None:
    asked = list(arguments.accelerators)
    names = arguments.machine.get("accel")
    if (asked and (arguments.enable_kvm or names is not None)) or (arguments.enable_kvm and names is not None):
        raise UsageError('The -accel and "-machine accel=" options are incompatible')
    if names is not None:
        asked = [("", name) for name in names.split(":")]
    failures: list[UsageError] = []
    for option, text in asked:
        try:
            _use_accelerator(arguments, text)
            return
        except UsageError as error:
            failures.append(error.during(option) if option else error)
            if text.partition(",")[0] == "kvm":
                break
    if failures:
        raise UsageError(*(text for failure in failures for text in failure.messages))


def _use_accelerator(arguments: Arguments, text: str) -> None:
    (_, name), *pairs = split(text, "accel") or [("accel", "")]
    if name == "tcg":
        raise UsageError("guests run with KVM only here; use -accel kvm")
    if name != "kvm":
        raise UsageError(f"invalid accelerator {name}")
    for key, value in pairs:
        if key == "kernel-irqchip":
            arguments.kernel_irqchip = irqchip(value)
        elif key == "dirty-ring-size":
            if integer(key, value):
                raise UsageError("dirty-ring-size: the dirty ring is not available yet; leave it out or say 0")
        else:
            raise UsageError(f"Property 'kvm-accel.{key}' not found")


def _check_memory(arguments: Arguments) -> None:
    wanted = arguments.ram_size or DEFAULT_RAM
    if "slots" in arguments.memory and "maxmem" not in arguments.memory:
        raise UsageError("slots specified but no max-size")
    if "maxmem" in arguments.memory:
        largest = size("maxmem", arguments.memory["maxmem"])
        if largest < wanted:
            raise UsageError(
                f"invalid value of maxmem: maximum memory size ({largest:#x}) must be at least "
                f"the initial memory size ({wanted:#x})"
            )
    arguments.ram_size = -(-arguments.ram_size // RAM_GRANULE) * RAM_GRANULE
    names = [backend.id for backend in arguments.backends]
    if arguments.memory_backend is not None and arguments.memory_backend not in names:
        raise UsageError(f"Memory backend '{arguments.memory_backend}' not found")
    for backend in arguments.backends:
        if not backend.properties["size"]:
            raise UsageError(f"property 'size' of {backend.kind} doesn't take value '0'")


# ---- the table ----

OPTIONS = {
    option.name: option
    for option in (
        Option("machine", "[type=]microvm[,PROP=VALUE…]", "the machine and its properties", _machine),
        Option("M", "…", "the same as -machine", _machine),
        Option("accel", "kvm[,kernel-irqchip=on|split]", "how the guest runs; kvm is the default", _accel),
        Option("enable-kvm", "", "the same as -accel kvm", _enable_kvm),
        Option("m", "[size=]SIZE[,slots=N,maxmem=SIZE]", "guest memory, in MiB without a suffix; 128M", _memory),
        Option("smp", "[cpus=]N[,maxcpus=N][,sockets=…]", "how many vCPUs; 1", _smp),
        Option("cpu", "MODEL[,FEATURE=on|off…]", "the CPU model; -cpu help lists them", _cpu),
        Option("bios", "FILE", "the firmware image, n times 64 KiB; it is where the guest starts", _bios),
        Option("L", "DIR", "accepted: -bios names the file itself", _firmware_folder),
        Option(
            "object",
            "TYPE,id=ID,size=SIZE…",
            "memory-backend-ram, -file or -memfd; use: -M …,memory-backend=ID",
            _object,
        ),
        Option(
            "blockdev",
            "driver=file,node-name=NODE,filename=FILE…",
            "a raw image, or driver=raw,file=NODE; use: -device virtio-blk-device,drive=NODE",
            _blockdev,
        ),
        Option("drive", "if=none,id=ID,file=FILE,format=raw…", "the same in other words; drive=ID uses it", _drive),
        Option("device", "virtio-blk-device,drive=NODE…", "a disk; bus=virtio-mmio-bus.N chooses its slot", _device),
        Option("serial", "DEV", "where the serial port goes", _serial),
        Option("chardev", "KIND,id=ID…", "a character device: null, stdio, file, pipe, socket", _chardev),
        Option("qmp", "DEV", "a QMP monitor", _qmp),
        Option("qmp-pretty", "DEV", "a QMP monitor that indents what it sends", _qmp_pretty),
        Option("mon", "[chardev=]ID,mode=control[,pretty=on]", "a QMP monitor on a -chardev", _mon),
        Option("incoming", "URI|defer", "wait for a migration; defer: until migrate-incoming says where", _incoming),
        Option("S", "", "do not start the guest; `cont` does", _paused),
        Option(
            "global",
            "migration.NAME=VALUE",
            "set a property of the migration, apic-common.vapic or virtio-mmio.force-legacy",
            _global,
        ),
        Option("name", "[guest=]NAME[,process=NAME]", "what query-name says; what `ps` calls the process", _name),
        Option("uuid", "UUID", "the machine's UUID", _uuid),
        Option("no-reboot", "", "a reset by the guest ends the program", _no_reboot),
        Option("no-shutdown", "", "a power-off by the guest pauses it only", _no_shutdown),
        Option("action", "reboot=reset|shutdown,shutdown=poweroff|pause", "the same in other words", _action),
        Option("daemonize", "", "go to the background once all sockets listen", _daemonize),
        Option("pidfile", "FILE", "write the process id there; the file goes at the end", _pidfile),
        Option("msg", "timestamp=on|off", "put the time in front of messages", _message),
        Option(
            "trace",
            "[enable=]PATTERN[,events=FILE][,file=FILE]",
            "trace events to stderr or a file; help lists them",
            _trace,
        ),
        Option("nographic", "", "the serial port goes to stdio unless -serial says otherwise", _nographic),
        Option("nodefaults", "", "no serial port unless -serial asks for one", _no_defaults),
        Option("no-user-config", "", "accepted: there are no configuration files", _nothing),
        Option("monitor", "none", "accepted: there is no human monitor", _monitor),
        Option("display", "none", "accepted: there is no display", _only_none("type")),
        Option("vga", "none", "", _vga),
        Option("audio", "none", "", _only_none("driver")),
        Option("net", "none", "", _only_none("type")),
        Option("nic", "none", "", _only_none("type")),
        Option("parallel", "none", "", _only_none("type")),
        Option("version", "", "the version", _version),
        Option("help", "", "this text", _help),
        Option("h", "", "", _help),
    )
}


def help_text() -> str:
    """What -help prints."""
    lines = [
        VERSION,
        "usage: qemumig-system -M microvm,… -bios FILE [options]",
        "",
        "A small KVM hypervisor whose guests migrate live, also from and to QEMU.  Options are QEMU's;",
        "-opt and --opt are the same.",
        "",
    ]
    for option in OPTIONS.values():
        if option.help:
            words = f"-{option.name} {option.value}".strip()
            gap = "\n" + " " * 30 if len(words) > 28 else " " * (30 - len(words))
            lines.append(f"{words}{gap}{option.help}")
    lines += [
        "",
        "DEV is null, stdio, file:PATH, pipe:PATH, unix:PATH[,server=on][,wait=off],",
        "tcp:HOST:PORT[,server=on][,wait=off], chardev:ID; for -serial also none.",
        "URI is tcp:HOST:PORT, unix:PATH, vsock:CID:PORT, fd:NUMBER, exec:COMMAND or file:PATH[,offset=N].",
        "",
        "Example: a guest with its serial port in a file, steered over a socket",
        "  qemumig-system -M microvm,acpi=off,pit=off,pic=off,rtc=off -nodefaults -display none -m 256M \\",
        "      -cpu qemu64,pni=off -bios guest.bin -serial file:out.txt -qmp unix:vm.qmp,server=on,wait=off",
    ]
    return "\n".join(lines)
