"""The command line: QEMU's words, what they mean here, and what is said about the ones that cannot be (cli.md).

In    argv without the program's name
Out   Arguments; or UsageError (exit status 1); or HelpRequested (exit status 0)

Options come in a table, OPTIONS, one entry each: name, value, a line of help and the function that files the value.
Only syntax and ranges are checked here; whether a file exists or a socket can be bound shows when it is opened.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from uuid import UUID

from . import machine_options, trace
from .arguments import Arguments, DriveRequest, HelpRequested, MonitorRequest, RunWith
from .keyval import UsageError, choice, integer, split, switch, unique
from .machine_options import global_switch
from .monitor.commands import ACTIONS
from .monitor.session import EMULATED, PACKAGE

UUID_FORM = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
URI_FORM = re.compile(r"[a-z]+:")
VERSION = "QEMU emulator version {major}.{minor}.{micro}".format(**EMULATED) + f" ({PACKAGE})"


class LogItemsRequested(HelpRequested):
    """The same, but it counts as a mistake."""


LOG_ITEMS = "Log items (comma separated):\ntrace:PATTERN   enable trace events"
VGA_CARDS = ("std", "cirrus", "vmware", "qxl", "virtio", "xenfb")


@dataclass(frozen=True)
class Option:
    """One option: its value as help shows it ("" for none), a line of help, and what it does."""

    name: str
    value: str
    help: str
    act: Callable[[Arguments, str], None]


def parse(argv: list[str], arguments: Arguments | None = None) -> Arguments:
    """The meaning of the command line; UsageError or HelpRequested.

    *arguments*, if given, has what was understood of it when an error is raised.
    """
    arguments = arguments or Arguments()
    words = iter(argv)
    for word in words:
        if not word.startswith("-") or word == "-":
            arguments.drives.append(DriveRequest(word, ide_disk(word, 0)))
            continue
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


# ---- what each option does with its value ----


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
    human = choice("mode", keys.get("mode", "readline"), ("readline", "control")) == "readline"
    if human and "pretty" in keys:
        raise UsageError("'pretty' is not compatible with HMP monitors")
    pretty = switch("pretty", keys.get("pretty", "off"))
    request = MonitorRequest(f"-mon {text}", chardev=keys["chardev"] or "", pretty=pretty, human=human)
    arguments.monitors.append(request)
    arguments.default_monitor &= not human


def _qmp(arguments: Arguments, text: str) -> None:
    arguments.monitors.append(MonitorRequest("-qmp", device=text))


def _qmp_pretty(arguments: Arguments, text: str) -> None:
    arguments.monitors.append(MonitorRequest("-qmp-pretty", device=text, pretty=True))


def _monitor(arguments: Arguments, text: str) -> None:
    arguments.default_monitor = False
    if text != "none":
        arguments.monitors.append(MonitorRequest("-monitor", device=text, human=True))


def _qtest(arguments: Arguments, text: str) -> None:
    arguments.qtest = text


def _qtest_log(arguments: Arguments, text: str) -> None:
    arguments.qtest_log = text


def _object(arguments: Arguments, text: str) -> None:
    from .object_options import read_object

    made = read_object(text)
    if any(other.id == made.id for other in arguments.objects):
        raise UsageError(f"Duplicate ID '{made.id}' for object")
    arguments.objects.append(made)


def _add_fd(arguments: Arguments, text: str) -> None:
    keys = unique(split(text), ("fd", "set", "opaque"))
    fd, set_id = integer("fd", keys.get("fd", "-1")), integer("set", keys.get("set", "-1"))
    if fd < 0:
        raise UsageError("fd option is required and must be non-negative")
    if set_id < 0:
        raise UsageError("set option is required and must be non-negative")
    if fd <= 2:
        raise UsageError("fd cannot be a standard I/O stream")
    arguments.descriptors.append((fd, set_id, keys.get("opaque")))


def _blockdev(arguments: Arguments, text: str) -> None:
    arguments.blockdevs.append(text)


def _drive(arguments: Arguments, text: str) -> None:
    arguments.drives.append(DriveRequest(f"-drive {text}", text))


def ide_disk(path: str, index: int) -> str:
    """What -drive would say about the image at *path* that is disk *index*."""
    return f"file={path.replace(',', ',,')},if=ide,index={index},media=disk"


def _hd(letter: str) -> Callable[[Arguments, str], None]:
    """-hda to -hdd."""

    def act(arguments: Arguments, text: str) -> None:
        arguments.drives.append(DriveRequest(f"-hd{letter} {text}", ide_disk(text, "abcd".index(letter))))

    return act


def _snapshot(arguments: Arguments, text: str) -> None:
    arguments.snapshot = True


def _kernel(arguments: Arguments, text: str) -> None:
    arguments.kernel = text


def _log_file(arguments: Arguments, text: str) -> None:
    arguments.log_file = text


def _log_items(arguments: Arguments, text: str) -> None:
    """-d: all that is logged here are trace events."""
    for item in text.split(","):
        if not item.startswith("trace:"):
            raise LogItemsRequested(LOG_ITEMS)
        arguments.traces.append((item, {"enable": item.removeprefix("trace:")}))


def _device(arguments: Arguments, text: str) -> None:
    if text in ("help", "?"):
        kinds = ('name "virtio-blk-device", bus virtio-bus', 'name "ide-hd", bus IDE')
        raise HelpRequested("\n".join(["Storage devices:", *kinds, "", "Misc devices:", 'name "loader"']))
    arguments.devices.append(text)


def _incoming(arguments: Arguments, text: str) -> None:
    if not text:
        raise UsageError("Parameter 'channel-type' is missing")
    arguments.incoming = text
    arguments.incoming_channels = None
    if text != "defer" and not URI_FORM.match(text):
        from .incoming_option import read_channel

        arguments.incoming_channels = [read_channel(text)]


def _loadvm(arguments: Arguments, text: str) -> None:
    arguments.loadvm = text


def _only_migratable(arguments: Arguments, text: str) -> None:
    arguments.only_migratable = True


def _paused(arguments: Arguments, text: str) -> None:
    arguments.paused = True


def _name(arguments: Arguments, text: str) -> None:
    keys = unique(split(text, "guest"), ("guest", "debug-threads", "process"))
    switch("debug-threads", keys.get("debug-threads", "off"))  # threads have their names anyway
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


def _ignored(arguments: Arguments, text: str) -> None:
    """An option about something that this program does not do, whatever it says."""


def _only_none(key: str) -> Callable[[Arguments, str], None]:
    """An option whose device does not exist here: `none` is the only value."""

    def act(arguments: Arguments, text: str) -> None:
        (_, value), *more = split(text, key) or [(key, "")]
        choice(key, value, ("none",))
        if more:
            raise UsageError(f"Parameter '{more[0][0]}' is unexpected")

    return act


def _vga(arguments: Arguments, text: str) -> None:
    if text in VGA_CARDS:
        raise UsageError("there is no display here: leave it out or say -vga none")
    if text != "none":
        raise UsageError(f"unknown vga type: {text}", complete=True)


def _nographic(arguments: Arguments, text: str) -> None:
    arguments.nographic = True


def _pidfile(arguments: Arguments, text: str) -> None:
    arguments.pidfile = text


def _daemonize(arguments: Arguments, text: str) -> None:
    arguments.daemonize = True


def _no_reboot(arguments: Arguments, text: str) -> None:
    arguments.actions = replace(arguments.actions, reboot="shutdown")


def _no_shutdown(arguments: Arguments, text: str) -> None:
    arguments.actions = replace(arguments.actions, shutdown="pause")


def _action(arguments: Arguments, text: str) -> None:
    keys = unique(split(text), ACTIONS)
    chosen = {key: choice(key, value, ACTIONS[key]) for key, value in keys.items()}
    arguments.actions = replace(arguments.actions, **chosen)


def _run_with(arguments: Arguments, text: str) -> None:
    keys = unique(split(text), ("async-teardown", "chroot", "exit-with-parent", "user"))
    switch("async-teardown", keys.get("async-teardown", "off"))  # the kernel takes the memory back either way
    arguments.run_with = RunWith(
        switch("exit-with-parent", keys.get("exit-with-parent", "off")), keys.get("chroot"), keys.get("user")
    )


def _message(arguments: Arguments, text: str) -> None:
    keys = unique(split(text), ("timestamp", "guest-name"))
    arguments.timestamps = switch("timestamp", keys.get("timestamp", "off"))
    arguments.names_guest = switch("guest-name", keys.get("guest-name", "off"))


def _overcommit(arguments: Arguments, text: str) -> None:
    keys = unique(split(text), ("mem-lock", "cpu-pm"))
    if choice("mem-lock", keys.get("mem-lock", "off"), ("on", "off", "on-fault")) != "off":
        raise UsageError("memory cannot be locked here: leave mem-lock out or say mem-lock=off")
    switch("cpu-pm", keys.get("cpu-pm", "off"))


BOOT_KEYS = ("order", "once", "menu", "splash", "splash-time", "reboot-timeout", "strict")


def _boot(arguments: Arguments, text: str) -> None:
    for key, value in split(text, "order"):
        if key not in BOOT_KEYS:
            raise UsageError(f"Parameter 'boot.{key}' is unexpected", complete=True)
        for letter in (value or "") if key in ("order", "once") else "":
            if not "a" <= letter <= "p":
                raise UsageError(f"Invalid boot device '{letter}'", complete=True)


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
        arguments.vapic = global_switch(driver, name, value)
    elif (driver, name) == ("virtio-mmio", "force-legacy"):
        arguments.legacy_virtio = global_switch(driver, name, value)
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


def _version(arguments: Arguments, text: str) -> None:
    raise HelpRequested(f"{VERSION}\nA hypervisor of its own that speaks QEMU's command line, monitor and migration.")


def _help(arguments: Arguments, text: str) -> None:
    raise HelpRequested(help_text())


# ---- values with rules of their own ----


# ---- what can only be said when all options are known ----


def _check(arguments: Arguments) -> None:
    machine_options.check(arguments)
    kind = arguments.machine_type
    if arguments.bios is None and not (kind.is_pc or kind.is_empty):
        raise UsageError("no firmware: -bios FILE names the image to start")
    if len(arguments.serials) > 1 and any(device != "none" for device in arguments.serials[1:]):
        raise UsageError(f"-serial {arguments.serials[1]}: machine '{kind.name}' has one serial port here")
    if not arguments.machine_switch("isa-serial", True) and arguments.serials not in ([], ["none"]):
        raise UsageError(f"-serial {arguments.serials[0]}: there is no serial port with isa-serial=off")
    if arguments.loadvm is not None:
        if arguments.incoming is not None:
            raise UsageError("'incoming' and 'loadvm' options are mutually exclusive")
        raise UsageError("no block device can store vmstate for snapshot")
    if arguments.run_with.exit_with_parent and arguments.daemonize:
        raise UsageError("-run-with exit-with-parent=on: with -daemonize the parent always ends")


# ---- the table ----

OPTIONS = {
    option.name: option
    for option in (
        Option("machine", "[type=]NAME[,PROP=VALUE…]", "the machine and its properties", machine_options.machine),
        Option("M", "…", "the same as -machine", machine_options.machine),
        Option(
            "accel", "kvm[,kernel-irqchip=on|split]", "how the guest runs; several are tried in turn", machine_options.accel
        ),
        Option("enable-kvm", "", "the same as -accel kvm", machine_options.enable_kvm),
        Option(
            "m", "[size=]SIZE[,slots=N,maxmem=SIZE]", "guest memory, in MiB without a suffix; 128M", machine_options.memory
        ),
        Option("smp", "[cpus=]N[,maxcpus=N][,sockets=…]", "how many vCPUs; 1", machine_options.smp),
        Option("cpu", "MODEL[,FEATURE=on|off…]", "the CPU model; -cpu help lists them", machine_options.cpu),
        Option("bios", "FILE", "the firmware image, n times 64 KiB; it is where the guest starts", _bios),
        Option("L", "DIR", "accepted: -bios names the file itself", _firmware_folder),
        Option(
            "object",
            "TYPE,id=ID[,PROP=VALUE…]",
            "memory (-M …,memory-backend=ID), TLS credentials, authorization, secrets; -object help",
            _object,
        ),
        Option(
            "blockdev",
            "driver=file,node-name=NODE,filename=FILE…",
            "a raw image, or driver=raw,file=NODE; use: -device virtio-blk-device,drive=NODE",
            _blockdev,
        ),
        Option("drive", "if=none,id=ID,file=FILE,format=raw…", "the same in other words; drive=ID uses it", _drive),
        Option("hda", "FILE", "the first disk of a PC, a raw image; so does FILE alone", _hd("a")),
        *(Option(f"hd{letter}", "FILE", "", _hd(letter)) for letter in "bcd"),
        Option("snapshot", "", "what is written to drives is forgotten at the end; no migration takes it along", _snapshot),
        Option("kernel", "FILE", "", _kernel),
        Option(
            "device",
            "virtio-blk-device|ide-hd,drive=NODE…",
            "a disk, of a microvm (bus=virtio-mmio-bus.N: its slot) or a PC; or loader,file=F,addr=A",
            _device,
        ),
        Option("serial", "DEV", "where the serial port goes", _serial),
        Option("chardev", "KIND,id=ID…", "a character device: null, stdio, file, pipe, socket", _chardev),
        Option("qmp", "DEV", "a QMP monitor", _qmp),
        Option("qmp-pretty", "DEV", "a QMP monitor that indents what it sends", _qmp_pretty),
        Option("monitor", "DEV", "a monitor for people (HMP)", _monitor),
        Option("mon", "[chardev=]ID[,mode=control][,pretty=on]", "a monitor on a -chardev: HMP, with control QMP", _mon),
        Option("qtest", "DEV", "the qtest protocol, for test harnesses", _qtest),
        Option("qtest-log", "FILE", "what goes over it; none: no log; else standard error", _qtest_log),
        Option("add-fd", "fd=N,set=M[,opaque=TEXT]", "put an inherited descriptor into /dev/fdset/M", _add_fd),
        Option(
            "incoming", "URI|CHANNEL|defer", "wait for a migration; defer: until migrate-incoming says where", _incoming
        ),
        Option("loadvm", "TAG", "", _loadvm),
        Option("only-migratable", "", "refuse to start with what cannot migrate", _only_migratable),
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
        Option("action", "reboot=…,shutdown=…,panic=…,watchdog=…", "what follows on events in the guest", _action),
        Option(
            "run-with", "exit-with-parent=on|off[,user=…,chroot=…]", "end with the process that started this", _run_with
        ),
        Option("daemonize", "", "go to the background once all sockets listen", _daemonize),
        Option("pidfile", "FILE", "write the process id there; the file goes at the end", _pidfile),
        Option("msg", "timestamp=on|off[,guest-name=on|off]", "put the time, the name in front of messages", _message),
        Option(
            "trace",
            "[enable=]PATTERN[,events=FILE][,file=FILE]",
            "trace events to stderr or a file; help lists them",
            _trace,
        ),
        Option("D", "FILE", "trace events go to a file", _log_file),
        Option("d", "trace:PATTERN[,…]", "the same as -trace PATTERN", _log_items),
        Option("nographic", "", "serial port and monitor go to stdio unless options say otherwise; Ctrl-A c", _nographic),
        Option("nodefaults", "", "no serial port unless -serial asks for one", _no_defaults),
        Option("no-user-config", "", "accepted: there are no configuration files", _nothing),
        Option("display", "none", "accepted: there is no display", _only_none("type")),
        Option("vga", "none", "", _vga),
        Option("audio", "none", "", _only_none("driver")),
        Option("net", "none", "", _only_none("type")),
        Option("nic", "none", "", _only_none("type")),
        Option("parallel", "none", "", _only_none("type")),
        Option("usb", "", "", _nothing),
        Option("overcommit", "mem-lock=off", "", _overcommit),
        Option("boot", "order=…", "", _boot),
        Option("rtc", "…", "", _ignored),
        Option("sandbox", "…", "", _ignored),
        Option("compat", "…", "", _ignored),
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
        "       qemumig-system -M q35 -hda FILE [options]",
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
        "tcp:HOST:PORT[,server=on][,wait=off], chardev:ID, mon:DEV for both a serial port and a monitor;",
        "for -serial and -monitor also none.",
        "URI is tcp:HOST:PORT, unix:PATH, vsock:CID:PORT, fd:NUMBER, exec:COMMAND or file:PATH[,offset=N].",
        "",
        "Example: a guest with its serial port in a file, steered over a socket",
        "  qemumig-system -M microvm,acpi=off,pit=off,pic=off,rtc=off -nodefaults -display none -m 256M \\",
        "      -cpu qemu64,pni=off -bios guest.bin -serial file:out.txt -qmp unix:vm.qmp,server=on,wait=off",
    ]
    return "\n".join(lines)
