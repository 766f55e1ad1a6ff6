"""What would let a destination take what it refuses: one table, for its refusals and for `qemumig analyze --for`.

In    what a stream has and a machine lacks: a section, a RAM block, a length, a subsection, a capability, a command
Out   a Remedy: options to paste behind the destination's command line, or words where no option helps

Most remedies are for the destination, for its guest is not there yet: it costs nothing to start it anew.  What can be
changed while a guest runs, a capability, is changed at the source.  Options are spelled as QEMU and qemumig-system take
them; a second `-M` adds to the first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..wire.format import MigCommand, RamSaveFlag

_MIB = 1 << 20
_VIRTIO_MMIO_BASE, _VIRTIO_MMIO_STRIDE, _VIRTIO_MMIO_SLOTS = 0xFEB00000, 512, 24  # machine.md §3

_FIRMWARE = "pc.bios"
_OBJECTS = "/objects/"  # a memory backend with x-use-canonical-path-for-ramblock-id=on
_OBJECT_ID = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")
_VIRTIO = re.compile(r"virtio-mmio@([0-9a-f]{16})/virtio-([a-z0-9-]+)")
_PCI = re.compile(r"[0-9a-f]{4}:00[:.]")

PER_CPU = frozenset({"cpu_common", "cpu", "apic"})
"""Sections of which every vCPU has one."""

_MOST_CPUS = 255

_DEVICES = {  # section → how many of it the machine can have, and the options that add them
    "acpi-ged": (1, "-M acpi=on"),
    "i8254": (1, "-M pit=on"),
    "i8259": (2, "-M pic=on"),
    "ioapic": (2, "-M acpi=on,ioapic2=on"),
    "kvm-tpr-opt": (1, "-global apic-common.vapic=on"),
    "mc146818rtc": (1, "-M rtc=on"),
    "serial": (1, "-M isa-serial=on"),
}

_SUBSECTIONS = {  # its name, or the beginning of it → what the source has
    "cpu/xen_vcpu": "the guest has a Xen vCPU, which -accel kvm,xen-version=… emulates and this side does not",
    "cpu/": "the source's CPU has a feature that is not known here: start the guest with -cpu qemu64,pni=off",
    "configuration/": "the source is of a later version, which has more to agree on",
}

_COMMANDS = {  # the capability that makes a source send it; of all others of postcopy: postcopy-ram
    MigCommand.MIG_CMD_ENABLE_COLO: "x-colo",
}

_RECORDS: dict[int, str] = {  # flag of a RAM record → the capability it belongs to (stream.md §6.1)
    RamSaveFlag.RAM_SAVE_FLAG_HOOK: "rdma-pin-all",
}


@dataclass(frozen=True)
class Remedy:
    """*options* for the destination's command line, and *words*: about them, or alone where none would help."""

    options: str = ""
    words: str = ""

    def __str__(self) -> str:
        """The end of a sentence that began with what is lacking."""
        if not self.options:
            return self.words
        return f"start the destination with {self.options}" + (f" ({self.words})" if self.words else "")


NO_REMEDY = Remedy()


def for_machine_type(received: str, local: str) -> Remedy:
    """A guest of another machine."""
    name = received if received.isprintable() else repr(received)
    return Remedy(
        words=f"a guest keeps its machine type: give it to a QEMU started with -M {name}, or start it anew with "
        f"-M {local}; 'qemumig analyze --for {local} FILE' lists what else of a recording this machine lacks"
    )


def for_section(idstr: str, instance_id: int) -> Remedy:
    """A section that the machine has not, or not so many times."""
    if idstr in PER_CPU and instance_id < _MOST_CPUS:
        return Remedy(f"-smp {instance_id + 1}", "or more: as many vCPUs as the source has")
    most, options = _DEVICES.get(idstr, (0, ""))
    if instance_id < most:
        return Remedy(options)
    if virtio := _VIRTIO.fullmatch(idstr):
        return _for_virtio(int(virtio[1], 16), virtio[2])
    if idstr == "dirty-bitmap":
        return for_capability("dirty-bitmaps", on_here=False)
    if idstr == "block":
        return Remedy(words="migrate without -b and without capability 'block', and let both sides open one image")
    return Remedy(words=f"no option adds {_kind(idstr)} to this machine: start the guest without it")


def _for_virtio(address: int, device: str) -> Remedy:
    slot, rest = divmod(address - _VIRTIO_MMIO_BASE, _VIRTIO_MMIO_STRIDE)
    if device != "blk" or rest or not 0 <= slot < _VIRTIO_MMIO_SLOTS:
        return Remedy(words=f"no option adds a virtio-{device} to this machine: start the guest without it")
    node = f"disk{slot}"
    return Remedy(
        f"-blockdev driver=file,node-name={node},filename=IMAGE "
        f"-device virtio-blk-device,drive={node},bus=virtio-mmio-bus.{slot}",
        "with the source's own -blockdev options and image" if slot < 8 else "slots from 8 on need -M acpi=on",
    )


def _kind(idstr: str) -> str:
    if _PCI.match(idstr):
        return "a PCI device"
    return "another serial port" if idstr == "serial" else "this device"


def for_version(received: int, newest: int) -> Remedy:
    """State of a version that is not taken."""
    return Remedy(words=f"the source is of {'a later' if received > newest else 'an earlier'} version than this side takes")


def for_subsection(name: str) -> Remedy:
    """A subsection that is not known."""
    return Remedy(words=next((words for known, words in _SUBSECTIONS.items() if name.startswith(known)), ""))


def for_block(name: str, length: int | None, here: Mapping[str, int], *, is_main: bool) -> Remedy:
    """A RAM block of *length* bytes (None: not told) among blocks *here*, name to bytes; *is_main*: it is the largest."""
    if name.startswith("/rom@etc/"):
        return Remedy("-M acpi=on")
    main = max(here, key=lambda one: here[one], default="")
    if is_main and name == "microvm.ram":
        return Remedy(words=f"start the destination without memory-backend={main.removeprefix(_OBJECTS)}")
    if is_main and length and _OBJECT_ID.fullmatch(name.removeprefix(_OBJECTS)):
        return _for_backend(name, length)
    return Remedy(words="no option adds that memory to this machine: start the guest without the device that has it")


def _for_backend(name: str, length: int) -> Remedy:
    backend = name.removeprefix(_OBJECTS)
    canonical = ",x-use-canonical-path-for-ramblock-id=on" if name != backend else ""
    size = size_text(length)
    return Remedy(f"-m {size} -object memory-backend-ram,id={backend},size={size}{canonical} -M memory-backend={backend}")


def for_block_length(name: str, length: int) -> Remedy:
    """A RAM block that has another length: *length* bytes at the source."""
    if name == _FIRMWARE:
        return Remedy(f"-bios IMAGE of {length} bytes", "the image that the source has")
    if name.startswith("/rom@"):
        return NO_REMEDY
    if name.endswith(".ram"):
        return Remedy(f"-m {size_text(length)}")
    return Remedy(f"-m {size_text(length)}", f"and size={size_text(length)} in its -object …,id={name}")


def size_text(length: int) -> str:
    """*length* bytes as `-m` and `size=` take them."""
    return f"{length // _MIB}M" if length % _MIB == 0 else f"{length // 1024}k"


def for_capability(name: str, *, on_here: bool) -> Remedy:
    """A capability that both sides compare, and that is on at one of them."""
    side = "the destination" if on_here else "the source"
    return Remedy(words=f"say 'migrate_set_capability {name} off' at {side}")


def for_early_end() -> Remedy:
    """A source that was gone before it had sent any contents: so it looks, too, when it wanted more connections than one.

    Until 8.2 multifd sent pages of zeroes on the main channel all the same.
    """
    return Remedy(
        words="the source was gone before it had sent any contents, its own message says why: if it has capability "
        "'multifd' on, say 'migrate_set_capability multifd off' there"
    )


def for_record(flags: int) -> Remedy:
    """A RAM record whose *flags* no loader here knows."""
    name = _RECORDS.get(flags & ~RamSaveFlag.RAM_SAVE_FLAG_CONTINUE)
    return NO_REMEDY if name is None else for_capability(name, on_here=False)


def capability_of(command: MigCommand, payload_length: int) -> str:
    """The capability that lets a source send a *command* of a feature."""
    if command == MigCommand.MIG_CMD_POSTCOPY_ADVISE and payload_length == 0:
        return "dirty-bitmaps"
    return _COMMANDS.get(command, "postcopy-ram")


def for_device_state(idstr: str, record: Any) -> Remedy:
    """State that was read into *record*, and that the machine cannot put into effect."""
    if idstr in PER_CPU:
        return Remedy(words="both sides need the same -cpu, and hosts that have it: -cpu qemu64,pni=off is the safe choice")
    if _VIRTIO.fullmatch(idstr):
        is_modern = record.virtio.extra_state is not None
        legacy = "off" if is_modern else "on"
        return Remedy(f"-global virtio-mmio.force-legacy={legacy}", "and with the options that the source's disk has")
    return NO_REMEDY


def for_uuid(received: str) -> Remedy:
    """A guest with another UUID."""
    return Remedy(f"-uuid {received}", "or say 'migrate_set_capability validate-uuid off' at the source")


def for_property(name: str, *, on_here: bool) -> Remedy:
    """A property of the migration in which the sides differ, as it seems: nothing on the wire says so."""
    setting = f"-global migration.{name}=off"
    if on_here:
        return Remedy(setting, "if the source has that option")
    return Remedy(words=f"start the destination without {setting}")


def for_magic(magic: int) -> Remedy:
    """Another beginning than that of a migration stream."""
    if magic == 0x11223344:
        return Remedy(words="this is a channel of multifd: say 'migrate_set_capability multifd off' at the source")
    if magic >> 16 == 0x1603:
        return Remedy(words="this is TLS: set parameter tls-creds on both sides, or on neither")
    return NO_REMEDY
