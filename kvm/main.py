"""qemumig-system: a machine, its monitors and its migration, in one process on one event loop.

    parse ─▶ [fork] ─▶ sockets listen ─▶ machine ─▶ commands ─▶ -incoming ─▶ clients that are waited for ─▶ guest runs
                                                                                                              │
      everything closed, in the opposite order  ◀─ quit · signal · guest power-off · failed incoming migration ─┘

Threads   the loop's thread is the main one.  vCPUs, migration and long commands have theirs; each calls back through
          the event hub or `exit_from_any_thread`.
Holds     (1) a second instance can connect as soon as this one accepts its first monitor client
          (2) whatever way the program ends, its socket files, pid file, threads and children end with it
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from typing import TYPE_CHECKING

from qemumig.commands.command import CommandError
from qemumig.errors import MigrationError
from qemumig.threads import NAME_BYTES, take_name, workers

from . import trace
from .block_options import Disks
from .boot import FirmwareError
from .chardev_options import CharDevices
from .config import MachineConfig
from .diagnostics import Diagnostics
from .errors import KvmError
from .keyval import UsageError
from .monitor.commands import MachineCommands
from .monitor.events import EventHub
from .monitor.fdsets import FdSets
from .monitor.qmp import QmpMonitor, session_commands, take_fd
from .monitor.registry import Registry
from .monitor.yank import Yank
from .options import Arguments, BackendRequest, HelpRequested, MonitorRequest, block_pairs, parse
from .process import Background, PidFile
from .signals import SignalWatcher, describe
from .trace_options import start_tracing

if TYPE_CHECKING:
    from qemumig.commands.command import Command
    from qemumig.commands.qmp import MigrationCommands

    from .machine import MicroVM

SWITCH_INTERVAL_S = 0.0005  # a vCPU that comes out of the guest needs the interpreter lock within a millisecond


def main(argv: list[str] | None = None) -> int:
    """Run the command line *argv*; the exit status."""
    diagnostics = Diagnostics()
    try:
        arguments = parse(sys.argv[1:] if argv is None else argv)
    except HelpRequested as text:
        print(text)
        return 0
    except UsageError as error:
        diagnostics.error(error)
        return 1
    diagnostics.timestamps = arguments.timestamps
    for warning in arguments.warnings:
        diagnostics.say(warning)
    if not start_tracing(trace.TRACE, arguments.traces, diagnostics):
        return 1
    background = None
    if arguments.daemonize:
        entered = Background.enter()
        if isinstance(entered, int):
            return entered
        background = entered
    if arguments.process_name:
        take_name(arguments.process_name.encode()[:NAME_BYTES].decode(errors="ignore"))
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    return asyncio.run(Program(arguments, diagnostics, background).run())


WORKERS = 4  # threads for what would hold up the loop: opening channels, joining a migration


class Program:
    """One run of the hypervisor."""

    def __init__(self, arguments: Arguments, diagnostics: Diagnostics, background: Background | None) -> None:
        self._arguments = arguments
        self._diagnostics = diagnostics
        self._background = background
        self._status = 0
        self._ending = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._hub = EventHub()
        self._registry = Registry()
        self._fdsets = FdSets()
        self._devices = CharDevices(diagnostics.say, arguments.daemonize)
        self._monitors: list[QmpMonitor] = []
        self._closers = AsyncExitStack()  # whatever is made on the way up is closed in the opposite order

    async def run(self) -> int:
        """Build everything, serve until something ends it, take it down; the exit status."""
        self._loop = asyncio.get_running_loop()
        self._loop.set_default_executor(workers(WORKERS))
        async with self._closers:
            try:
                await self._serve(self._set_up())
            except FirmwareError as error:
                self._diagnostics.verbatim(str(error))
                self._status = 1
            except UsageError as error:
                self._fail(error)
            except (MigrationError, KvmError) as error:
                self._fail(UsageError(str(error)))
            finally:
                self._end()
        return self._status

    def _fail(self, error: UsageError) -> None:
        self._diagnostics.error(error)
        self._status = 1

    # ---- the way up ----

    def _set_up(self) -> MicroVM:
        arguments = self._arguments
        signals = SignalWatcher(self._on_signal)
        self._closers.callback(signals.close)
        signals.start()
        self._hub.start()
        self._closers.callback(self._hub.stop)
        if arguments.pidfile is not None:
            self._closers.callback(PidFile(arguments.pidfile).close)
        self._closers.callback(self._devices.close)
        self._closers.callback(self._fdsets.close)
        for chardev in arguments.chardevs:
            self._devices.add_chardev(chardev)
        for index, monitor in enumerate(arguments.monitors):
            self._add_monitor(index, monitor)
        config = self._machine_config()
        machine = self._make_machine(config)
        self._add_commands(machine, config)
        return machine

    def _add_monitor(self, index: int, request: MonitorRequest) -> None:
        if request.device:
            backend = self._devices.add_device(request.option, request.device, f"compat_monitor{index}")
        else:
            try:
                backend = self._devices.claim(request.chardev)
            except UsageError as error:
                raise error.during(request.option) from error
        monitor = QmpMonitor(backend, self._registry, self._hub, request.pretty)
        self._monitors.append(monitor)
        self._closers.push_async_callback(monitor.close)

    def _machine_config(self) -> MachineConfig:
        arguments = self._arguments
        config = MachineConfig(
            cpus=arguments.cpus,
            max_cpus=arguments.max_cpus,
            bios=arguments.bios or "",
            cpu_model=arguments.cpu_model,
            cpu_features=arguments.cpu_features,
            kernel_irqchip=arguments.kernel_irqchip,
            chipset=arguments.chipset,
            isa_serial=arguments.machine_switch("isa-serial", True),
            vapic=arguments.vapic,
            legacy_virtio=arguments.legacy_virtio,
            uuid=arguments.uuid,
            name=arguments.name,
            incoming=arguments.incoming is not None,
        )
        config.ram_size = arguments.ram_size or config.ram_size
        for device in arguments.serial_devices()[:1]:
            if device != "none":
                consequence = f"could not connect serial device to character backend '{device}'"
                config.serial = self._devices.add_device("-serial", device, "serial0", consequence)
        self._add_memory(config)
        self._add_disks(config)
        return config

    def _add_disks(self, config: MachineConfig) -> None:
        disks = Disks(self._diagnostics.say, config.chipset.virtio_slots)
        self._closers.callback(disks.close)
        for text in self._arguments.blockdevs:
            with _about(f"-blockdev {text}"):
                disks.add_node(block_pairs(text))
        for text in self._arguments.drives:
            with _about(f"-drive {text}"):
                disks.add_drive(text)
        for text in self._arguments.devices:
            with _about(f"-device {text}"):
                disks.add_device(block_pairs(text, "driver"))
        config.disks = disks.disks

    def _add_memory(self, config: MachineConfig) -> None:
        from .user_objects import MemoryBackend, UserObjects, map_memory

        self._objects = UserObjects()
        self._closers.callback(self._objects.close)
        requests, wanted = list(self._arguments.backends), self._arguments.memory_backend
        if wanted is None:
            wanted = config.ram_idstr
            requests.append(BackendRequest("memory-backend-ram", wanted, {"size": config.ram_size}))
        for request in requests:
            memory = map_memory(request.kind, request.id, request.properties)
            made = MemoryBackend(request.kind, memory, request.properties)
            try:
                self._objects.add(request.id, made)
            except CommandError as error:
                made.close()
                raise UsageError(str(error)) from error
            if request.id == wanted:
                made.in_use = True
                config.ram_backend = memory
                config.ram_idstr = ram_idstr(request)
        assert config.ram_backend is not None
        if self._arguments.ram_size not in (0, config.ram_backend.size):
            raise UsageError("Machine memory size does not match the size of the memory backend")
        config.ram_size = config.ram_backend.size

    def _make_machine(self, config: MachineConfig) -> MicroVM:
        from .machine import MicroVM

        machine = MicroVM(config, self._hub.emit, self._diagnostics.say)
        self._closers.push_async_callback(asyncio.to_thread, machine.close)
        machine.reboots = self._arguments.reboot
        self._end_with_guest(machine, self._arguments.shutdown)
        return machine

    def _end_with_guest(self, machine: MicroVM, ends: bool) -> None:
        machine.on_shutdown = self._on_guest_end if ends else None

    def _add_commands(self, machine: MicroVM, config: MachineConfig) -> None:
        from qemumig.commands.types import EVENTS as MIGRATION_EVENTS

        from .monitor.types import EVENTS

        control = self._make_migration(machine)
        general = MachineCommands(
            machine,
            self._hub.emit,
            set_autostart=control.set_autostart,
            quit=self._end,
            end_with_guest=lambda ends: self._end_with_guest(machine, ends),
            name=self._arguments.name,
            uuid=self._arguments.uuid,
        )
        self._closers.push_async_callback(general.close)
        offers = (session_commands(self._registry), general.commands(), control.commands(), self._fdsets.commands())
        for commands in (*offers, *self._about_machine(machine, config, control), Yank(self._devices, control).commands()):
            self._registry.add(commands)
        self._registry.add_events((*EVENTS, *MIGRATION_EVENTS))

    def _about_machine(
        self, machine: MicroVM, config: MachineConfig, control: MigrationCommands
    ) -> Iterator[list[Command]]:
        """Commands about the parts of the machine and its memory."""
        from .guest_view import GuestView
        from .monitor.disks import describe
        from .monitor.dumps import Dumps
        from .monitor.hmp import make_shell
        from .monitor.inventory import Inventory
        from .monitor.objects import ObjectCommands, make_tree
        from .monitor.tracing import TraceCommands

        arguments, devices, objects = self._arguments, self._devices, self._objects
        disks = describe(config.disks, drives=arguments.drives, nodes=arguments.blockdevs, devices=arguments.devices)
        yield Inventory(machine, config, devices=devices, disks=disks, memories=objects.memories).commands()
        tree = make_tree(config, arguments.machine, objects, devices, disks)
        yield ObjectCommands(tree, objects).commands()
        view = GuestView(machine)
        dumps = Dumps(view, config.cpus)
        self._closers.push_async_callback(dumps.close)
        yield dumps.commands()
        yield TraceCommands(trace.TRACE).commands()
        yield make_shell(self._registry, view, control.options, self._diagnostics.say).qmp_commands()

    def _make_migration(self, machine: MicroVM) -> MigrationCommands:
        from qemumig.commands.qmp import MigrationCommands
        from qemumig.options import MigrationOptions

        options = MigrationOptions()
        for name, value in self._arguments.migration_properties:
            options.set_property(name, value)
        control = MigrationCommands(
            machine,
            options,
            emit=self._hub.emit,
            autostart=not self._arguments.paused,
            take_fd=take_fd,
            find_object=self._objects.find,
            open_path=self._fdsets.open_path,
            exit_process=self.exit_from_any_thread,
        )
        self._closers.push_async_callback(control.close)
        uri = self._arguments.incoming
        if uri is not None and uri != "defer":
            try:
                control.incoming(uri)
            except MigrationError as error:
                raise UsageError(str(error)).during(f"-incoming {uri}") from error
        return control

    # ---- at work ----

    async def _serve(self, machine: MicroVM) -> None:
        ended = asyncio.ensure_future(self._ending.wait())
        clients = asyncio.ensure_future(self._devices.start())
        await asyncio.wait((ended, clients), return_when=asyncio.FIRST_COMPLETED)
        if not ended.done():
            clients.result()
            if not self._arguments.paused and self._arguments.incoming is None:
                machine.start()
            if self._background is not None:
                self._background.ready()
        await ended
        clients.cancel()

    def _on_guest_end(self, guest: bool, reason: str) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._end)

    def exit_from_any_thread(self, status: int, message: str) -> None:
        """End the program with *status*, saying *message*."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._exit, status, message)

    def _exit(self, status: int, message: str) -> None:
        if not self._ending.is_set():
            self._diagnostics.say(message)
            self._status = status
            self._end()

    def _on_signal(self, number: int, sender: int) -> None:
        self._diagnostics.say(describe(number, sender))
        self._hub.emit("SHUTDOWN", {"guest": False, "reason": "host-signal"})
        self._end()

    def _end(self) -> None:
        """Begin no further command; what is there is taken down."""
        self._ending.set()
        for monitor in self._monitors:
            monitor.stop()


@contextmanager
def _about(option: str) -> Iterator[None]:
    """A UsageError inside is about *option*."""
    try:
        yield
    except UsageError as error:
        raise error.during(option) from error


def ram_idstr(request: BackendRequest) -> str:
    """The name on the wire of RAM from a memory backend (machine.md §2)."""
    if request.properties.get("x-use-canonical-path-for-ramblock-id"):
        return f"/objects/{request.id}"
    return request.id


if __name__ == "__main__":
    sys.exit(main())
