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

from . import without_ssl  # noqa: F401  # before anybody imports asyncio

# isort: split
import asyncio
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import AsyncExitStack, suppress
from typing import TYPE_CHECKING, NoReturn

from qemumig.errors import MigrationError
from qemumig.threads import NAME_BYTES, take_name, workers

from . import trace
from .arguments import Arguments, HelpRequested
from .assembly import Assembly
from .boot import FirmwareError
from .chardev_options import CharDevices
from .config import MachineConfig
from .diagnostics import Diagnostics
from .errors import KvmError
from .keyval import UsageError
from .monitor.commands import MachineCommands
from .monitor.events import EventHub
from .monitor.fdsets import FdSets
from .monitor.front_doors import FrontDoors
from .monitor.qmp import session_commands, take_fd
from .monitor.registry import Registry
from .monitor.yank import Yank
from .options import LogItemsRequested, parse
from .process import Background, PidFile, confine, end_with_parent
from .signals import SignalWatcher, describe
from .trace_options import start_tracing, trace_to

if TYPE_CHECKING:
    from qemumig.commands.command import Command
    from qemumig.commands.qmp import MigrationCommands

    from .chardev import CharBackend
    from .empty_machine import EmptyMachine
    from .machine import MicroVM

    AnyMachine = MicroVM | EmptyMachine

SWITCH_INTERVAL_S = 0.0005  # a vCPU that comes out of the guest needs the interpreter lock within a millisecond


def run() -> NoReturn:
    """The program `qemumig-system`.

    It does not take the interpreter apart in the end: nothing is left to be closed, and that would be 50 ms.
    """
    status = main()
    for out in sys.stdout, sys.stderr:
        with suppress(OSError):  # whoever reads has gone
            out.flush()
    os._exit(status)


def main(argv: list[str] | None = None) -> int:
    """Run the command line *argv*; the exit status."""
    diagnostics = Diagnostics()
    arguments = Arguments()
    try:
        parse(sys.argv[1:] if argv is None else argv, arguments)
    except HelpRequested as text:
        print(text)
        return int(isinstance(text, LogItemsRequested))
    except UsageError as error:
        prepare(diagnostics, arguments)
        diagnostics.error(error)
        return 1
    if arguments.run_with.exit_with_parent:
        end_with_parent()
    prepare(diagnostics, arguments)
    for warning in arguments.warnings:
        diagnostics.say(warning)
    if not trace_to(trace.TRACE, arguments.log_file, diagnostics):
        return 1
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


def prepare(diagnostics: Diagnostics, arguments: Arguments) -> None:
    """Say things as -msg wants them."""
    diagnostics.timestamps = arguments.timestamps
    diagnostics.guest = (arguments.name or "") if arguments.names_guest else ""


REHEARSE_S = 0.5  # after the start
WORKERS = 4  # threads for what would hold up the loop: opening channels, joining a migration


class Program:
    """One run of the hypervisor."""

    def __init__(self, arguments: Arguments, diagnostics: Diagnostics, background: Background | None) -> None:
        self._arguments = arguments
        self._diagnostics = diagnostics
        self._background = background
        self._status = 0
        self._ending = asyncio.Event()
        self._rehearsal: asyncio.Future[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._hub = EventHub()
        self._registry = Registry()
        self._fdsets = FdSets()
        self._devices = CharDevices(diagnostics.say, arguments.daemonize, self._end)
        self._doors = FrontDoors(self._devices, self._registry, self._hub)
        self._closers = AsyncExitStack()  # whatever is made on the way up is closed in the opposite order

    async def run(self) -> int:
        """Build everything, serve until something ends it, take it down; the exit status."""
        self._loop = asyncio.get_running_loop()
        self._loop.set_default_executor(workers(WORKERS))
        async with self._closers:
            try:
                machine = self._set_up()
                self._spare_collections()
                await self._serve(machine)
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

    def _spare_collections(self) -> None:
        """What there is now stays: a search for garbage need not go through it, least of all while a guest stands still."""
        gc.freeze()
        self._closers.callback(gc.unfreeze)

    def _fail(self, error: UsageError) -> None:
        self._diagnostics.error(error)
        self._status = 1

    # ---- the way up ----

    def _set_up(self) -> AnyMachine:
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
        for descriptor, set_id, opaque in arguments.descriptors:
            self._fdsets.inherit(descriptor, set_id, opaque)
        for chardev in arguments.chardevs:
            self._devices.add_chardev(chardev)
        self._closers.push_async_callback(self._doors.close)
        if arguments.qtest is not None:
            self._doors.open_qtest(arguments.qtest, arguments.qtest_log)
        self._doors.open(arguments.monitors)
        return self._set_up_machine()

    def _set_up_machine(self) -> AnyMachine:
        assembly = Assembly(self._arguments, self._diagnostics.say, self._closers)
        assembly.make_objects()
        config = assembly.config(self._serial_port())
        machine = assembly.make_machine(config, self._hub.emit)
        self._closers.push_async_callback(asyncio.to_thread, machine.close)
        machine.reboots = self._arguments.actions.reboot == "reset"
        self._end_with_guest(machine, self._arguments.actions.shutdown == "poweroff")
        if self._arguments.only_migratable:
            for blocker in machine.migration_blockers:
                raise UsageError(f"disallowing migration blocker (--only-migratable) for: {blocker}")
        self._doors.serve_qtest(machine.physical, {"ioapic": machine.pins}, machine.client_time)
        self._add_commands(machine, config, assembly)
        return machine

    def _serial_port(self) -> CharBackend | None:
        for device in self._arguments.serial_devices()[:1]:
            if device != "none":
                consequence = f"could not connect serial device to character backend '{device}'"
                return self._devices.add_device("-serial", device, "serial0", consequence)
        return None

    def _end_with_guest(self, machine: AnyMachine, ends: bool) -> None:
        machine.on_shutdown = self._on_guest_end if ends else None

    def _add_commands(self, machine: AnyMachine, config: MachineConfig, assembly: Assembly) -> None:
        from qemumig.commands.types import EVENTS as MIGRATION_EVENTS

        from .monitor.types import EVENTS

        control = self._make_migration(machine, assembly)
        general = MachineCommands(
            machine,
            self._hub.emit,
            set_autostart=control.set_autostart,
            quit=self._end,
            end_with_guest=lambda ends: self._end_with_guest(machine, ends),
            name=self._arguments.name,
            uuid=self._arguments.uuid,
            suspends=config.machine_type.is_pc,
            uses_kvm=config.runs_guest,
        )
        self._closers.push_async_callback(general.close)
        offers = (session_commands(self._registry), general.commands(), control.commands(), self._fdsets.commands())
        about = self._about_machine(machine, config, control, assembly)
        for commands in (*offers, *about, Yank(self._devices, control).commands()):
            self._registry.add(commands)
        self._registry.add_events((*EVENTS, *MIGRATION_EVENTS))

    def _about_machine(
        self, machine: AnyMachine, config: MachineConfig, control: MigrationCommands, assembly: Assembly
    ) -> Iterator[list[Command]]:
        """Commands about the parts of the machine and its memory."""
        from .guest_view import GuestView
        from .monitor.disks import describe
        from .monitor.dumps import Dumps
        from .monitor.hmp import make_shell
        from .monitor.inventory import Inventory
        from .monitor.objects import ObjectCommands, make_tree
        from .monitor.tracing import TraceCommands

        devices, objects, made = self._devices, assembly.objects, assembly.disks
        nodes = self._arguments.blockdevs
        disks = describe(config.disks, drives=made.drive_texts, nodes=nodes, devices=made.device_texts)
        yield Inventory(machine, config, devices=devices, disks=disks, memories=objects.memories).commands()
        tree = make_tree(config, self._arguments.machine, objects, devices, disks)
        yield ObjectCommands(tree, objects).commands()
        view = GuestView(machine)
        dumps = Dumps(view, config.cpus)
        self._closers.push_async_callback(dumps.close)
        yield dumps.commands()
        yield TraceCommands(trace.TRACE).commands()
        shell = make_shell(self._registry, view, control.options, self._diagnostics.say)
        shell.only_migratable = self._arguments.only_migratable
        self._doors.serve_people(shell)
        yield shell.qmp_commands()

    def _make_migration(self, machine: AnyMachine, assembly: Assembly) -> MigrationCommands:
        from qemumig.commands.qmp import MigrationCommands
        from qemumig.options import MigrationOptions

        options = MigrationOptions()
        for name, value in self._arguments.migration_properties:
            options.set_property(name, value)
        control = MigrationCommands(
            machine,
            options,
            emit=self._hub.emit,
            hold_events=self._hub.held,
            autostart=not self._arguments.paused,
            take_fd=take_fd,
            find_object=assembly.objects.find,
            open_path=self._fdsets.open_path,
            exit_process=self.exit_from_any_thread,
        )
        self._closers.push_async_callback(control.close)
        text = self._arguments.incoming
        if text is not None and text != "defer":
            try:
                control.incoming(self._arguments.incoming_channels or text)
            except MigrationError as error:
                raise UsageError(str(error)).during(f"-incoming {text}") from error
        return control

    # ---- at work ----

    async def _serve(self, machine: AnyMachine) -> None:
        ended = asyncio.ensure_future(self._ending.wait())
        clients = asyncio.ensure_future(self._devices.start())
        await asyncio.wait((ended, clients), return_when=asyncio.FIRST_COMPLETED)
        if not ended.done():
            clients.result()
            confine(self._arguments.run_with)
            if not self._arguments.paused and self._arguments.incoming is None:
                machine.start()
            self._rehearse_later(machine)
            if self._background is not None:
                self._background.ready()
        await ended
        clients.cancel()

    def _rehearse_later(self, machine: AnyMachine) -> None:
        """Rehearse what a migration does while the guest stands still, once nobody waits for the start."""
        assert self._loop is not None
        loop = self._loop

        def begin() -> None:
            from qemumig.savevm.rehearsal import rehearse  # the machine has loaded the rest of that room by now

            self._rehearsal = loop.run_in_executor(None, rehearse, machine.sections())

        timer = loop.call_later(REHEARSE_S, begin)
        self._closers.callback(timer.cancel)

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
        self._doors.stop()


if __name__ == "__main__":
    sys.exit(main())
