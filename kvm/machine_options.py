"""-machine, -accel, -m, -smp, -cpu: what machine there shall be, and what is said about one that cannot (cli.md §2).

Each option's function files its value; `check` comes after the last option, when all that belongs together is known.
"""

from __future__ import annotations

from .arguments import Arguments, HelpRequested
from .config import Chipset
from .cpuid import FEATURES
from .keyval import UsageError, choice, integer, size, split, switch, unique
from .machine_types import (
    DEFAULT,
    MISSING_DEVICES,
    OPTIONAL_DEVICES,
    MachineType,
    find_machine,
    list_machines,
)

DEFAULT_RAM = 128 << 20
CPU_MODELS = ("host", "max", "qemu64")
RAM_GRANULE = 8192  # QEMU rounds -m up to a multiple of this
TOPOLOGY = ("sockets", "dies", "clusters", "modules", "cores", "threads")
ONLY_OFF = ("usb", "suppress-vmdesc", "aux-ram-share", *MISSING_DEVICES)  # what this machine has not
LARGEST_RING = 65536  # entries of KVM's dirty ring
SMALLEST_RING = 1024


# ---- what each option does with its value ----


def machine(arguments: Arguments, text: str) -> None:
    """-machine: `type` of the machine and its properties; later ones win."""
    for index, (key, value) in enumerate(split(text, "type")):
        if key in ("help", "?") and value is None:
            kind = find_machine(arguments.machine.get("type") or DEFAULT.name) or DEFAULT
            raise HelpRequested("\n".join([f"{kind.name}-machine options:", *(f"  {name}" for name in kind.properties)]))
        if value is None:
            raise UsageError(f"Expected '=' after parameter '{key}'")
        if not key:
            raise UsageError(f"Invalid parameter '{key}'")
        if key == "type" and value in ("help", "?"):
            raise HelpRequested(list_machines())
        if key == "type" and not (index == 0 and not value):
            arguments.machine["type"] = value
        else:
            arguments.machine[key] = value


def accel(arguments: Arguments, text: str) -> None:
    """-accel: one more to try."""
    if text in ("", "help", "?"):
        raise HelpRequested("Accelerators supported in QEMU binary:\nkvm\nqtest")
    arguments.accelerators.append((f"-accel {text}", text))


def enable_kvm(arguments: Arguments, text: str) -> None:
    """-enable-kvm."""
    arguments.enable_kvm = True


def memory(arguments: Arguments, text: str) -> None:
    """-m."""
    arguments.memory |= unique(split(text, "size"), ("size", "slots", "maxmem"))
    if "size" in arguments.memory:
        arguments.ram_size = size("size", arguments.memory["size"] or "0", default_unit="m")
    if "slots" in arguments.memory:
        size("slots", arguments.memory["slots"])
    if "maxmem" in arguments.memory:
        size("maxmem", arguments.memory["maxmem"])


def smp(arguments: Arguments, text: str) -> None:
    """-smp."""
    arguments.topology |= dict(split(text, "cpus"))


def cpu(arguments: Arguments, text: str) -> None:
    """-cpu."""
    if text in ("help", "?"):
        raise HelpRequested("\n".join(["Available CPUs:", *(f"  {name}" for name in CPU_MODELS)]))
    if not text:
        raise UsageError("-cpu option cannot be empty", complete=True)
    (_, model), *features = split(text, "model")
    arguments.cpu_model = model or ""
    arguments.cpu_features = dict(_cpu_feature(arguments.cpu_model, key, value) for key, value in features)


def _cpu_feature(model: str, key: str, value: str | None) -> tuple[str, bool]:
    driver = f"{model}-x86_64-cpu"
    if value is None and key[:1] in ("+", "-"):
        return key[1:], key[0] == "+"
    if value is not None and model in CPU_MODELS and key not in FEATURES:
        text = f"can't apply global {driver}.{key}={value}: Property '{driver}.{key}' not found"
        raise UsageError(text, complete=True)
    return key, global_switch(driver, key, value or "on")


def global_switch(driver: str, name: str, value: str) -> bool:
    """A property that -global, or something that counts as it, switches."""
    try:
        return switch(name, value)
    except UsageError as error:
        text = f"can't apply global {driver}.{name}={value}: {error}"
        raise UsageError(text, complete=True) from error


# ---- what can only be said when all options are known ----


def check(arguments: Arguments) -> None:
    """Find the machine, and whether all that was said about it goes together."""
    _check_machine(arguments)
    if arguments.topology:
        arguments.cpus, arguments.max_cpus = topology(arguments.topology, arguments.machine_type)
    _check_accelerator(arguments)
    _check_memory(arguments)


def _check_machine(arguments: Arguments) -> None:
    name = arguments.machine.pop("type", DEFAULT.name) or ""
    kind = find_machine(name)
    if kind is None:
        hint = "Use -machine help to list supported machines"
        raise UsageError(f'unsupported machine type: "{name}"', hints=(hint,))
    arguments.machine_type = kind
    for key, value in arguments.machine.items():
        if key not in kind.properties:
            raise UsageError(f"Property '{kind.name}-machine.{key.partition('.')[0]}' not found")
        if key in kind.tristates:
            choice(key, value, ("on", "off", "auto"))
            asked = value == "on"
        elif key in kind.switches:
            asked = switch(key, value)
        else:
            continue
        if asked and key in ONLY_OFF:
            raise UsageError(f"{key}=on: this {kind.name} has no {key}; leave it out or say {key}=off")
    arguments.chipset = chipset(kind, arguments.machine)
    if "kernel-irqchip" in arguments.machine:
        arguments.kernel_irqchip = irqchip(arguments.machine["kernel-irqchip"])


def chipset(kind: MachineType, properties: dict[str, str | None]) -> Chipset:
    """Which optional devices the machine's properties ask for; a PC has its own."""
    if kind.is_pc:
        return Chipset(pit=True, pic=True, rtc=True)
    if kind.is_empty:
        return Chipset()
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


def topology(pairs: dict[str, str | None], kind: MachineType) -> tuple[int, int]:
    """How many vCPUs there are, and may be; from -smp's keys."""
    for key in pairs:
        if key not in ("cpus", "maxcpus", *TOPOLOGY):
            raise UsageError(f"Parameter 'smp.{key}' is unexpected")
    numbers = {key: integer(f"smp.{key}", value) for key, value in pairs.items()}
    if 0 in numbers.values():
        raise UsageError("Invalid CPU topology: CPU topology parameters must be greater than zero")
    for number in numbers.values():
        if not 0 < number <= kind.max_cpus:
            raise UsageError(
                f"Invalid SMP CPUs {number}. The max CPUs supported by machine '{kind.name}' is {kind.max_cpus}"
            )
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


def _check_accelerator(arguments: Arguments) -> None:
    """The first accelerator that can be; those before it are told of, each with why not."""
    asked = list(arguments.accelerators)
    names = arguments.machine.get("accel")
    if (asked and (arguments.enable_kvm or names is not None)) or (arguments.enable_kvm and names is not None):
        raise UsageError('The -accel and "-machine accel=" options are incompatible')
    if names is not None:
        asked = [("", name) for name in names.split(":")]
    failures: list[UsageError] = []
    for option, text in asked:
        try:
            name = _use_accelerator(arguments, text)
        except _WrongPropertyError as error:
            raise (error.during(option) if option else error) from error
        except UsageError as error:
            failures.append(error.during(option) if option else error)
            continue
        if failures:
            arguments.warnings += [*_all_messages(failures), f"falling back to {name}"]
        return
    if failures:
        raise UsageError(*_all_messages(failures))


class _WrongPropertyError(UsageError):
    """A property that an accelerator has not, or not with this value: no other one is tried then."""


def _all_messages(errors: list[UsageError]) -> list[str]:
    return [text for error in errors for text in error.messages]


def _use_accelerator(arguments: Arguments, text: str) -> str:
    """Take this accelerator; how it is called in sentences."""
    (_, name), *pairs = split(text, "accel") or [("accel", "")]
    if name == "qtest":
        for key, _ in pairs:
            raise _WrongPropertyError(f"Property 'qtest-accel.{key}' not found")
        arguments.runs_guest = False
        return "qtest"
    if name == "tcg":
        raise UsageError("guests run with KVM only here; use -accel kvm")
    if name != "kvm":
        raise UsageError(f"invalid accelerator {name}")
    for key, value in pairs:
        if key == "kernel-irqchip":
            arguments.kernel_irqchip = irqchip(value)
        elif key == "dirty-ring-size":
            _check_ring(value or "")
        else:
            raise _WrongPropertyError(f"Property 'kvm-accel.{key}' not found")
    return "KVM"


def _check_ring(text: str) -> None:
    """KVM's dirty ring: whether its size could be; the log that is used instead has none."""
    try:
        entries = int(text, 0)
    except ValueError:
        raise _WrongPropertyError("Parameter 'dirty-ring-size' expects uint64") from None
    if not 0 <= entries < 1 << 32:
        raise _WrongPropertyError("Parameter 'dirty-ring-size' expects uint32_t")
    if entries & (entries - 1):
        raise _WrongPropertyError("dirty-ring-size must be a power of two.")
    if entries > LARGEST_RING:
        too_big = f"KVM dirty ring size {entries} too big (maximum is {LARGEST_RING}).  Please use a smaller value."
        raise UsageError(too_big, "failed to initialize kvm: Invalid argument")
    if 0 < entries < SMALLEST_RING:
        too_small = "Enabling of KVM dirty ring failed: Invalid argument. "
        raise UsageError(
            f"{too_small}Suggested minimum value is {SMALLEST_RING}.", "failed to initialize kvm: Input/output error"
        )
    if entries:  # no other accelerator is tried: a guest that never runs is no answer to this
        raise _WrongPropertyError("dirty-ring-size: the dirty ring is not available yet; leave it out or say 0")


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
    if arguments.memory_backend is not None:
        arguments.require_object(arguments.memory_backend)
