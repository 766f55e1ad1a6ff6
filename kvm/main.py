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
from typing import TYPE_CHECKING

from qemumig.errors import MigrationError

from .boot import FirmwareError
from .chardev_options import CharDevices
from .config import MachineConfig
from .diagnostics import Diagnostics
from .errors import KvmError
from .keyval import UsageError
from .monitor.commands import MachineCommands
from .monitor.events import EventHub
from .monitor.qmp import QmpMonitor, session_commands, take_fd
from .monitor.registry import Registry
from .options import Arguments, BackendRequest, HelpRequested, MonitorRequest, parse
from .process import Background, PidFile
from .signals import SignalWatcher, describe

if TYPE_CHECKING:
    from qemumig.commands.qmp import MigrationCommands

    from .machine import MicroVM
    from .memory import HostMemory

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
    background = None
    if arguments.daemonize:
        background = Background.enter()
        if isinstance(background, int):
            return background
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    return asyncio.run(Program(arguments, diagnostics, background).run())


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
        self._devices = CharDevices(diagnostics.say, arguments.daemonize)
        # Made on the way up, in this order; closed on the way down, in the opposite one.
        self._signals: SignalWatcher | None = None
        self._pidfile: PidFile | None = None
        self._monitors: list[QmpMonitor] = []
        self._memory: dict[str, HostMemory] = {}
        self._machine: MicroVM | None = None
        self._control: MigrationCommands | None = None
        self._commands: MachineCommands | None = None

    async def run(self) -> int:
        """Build everything, serve until something ends it, take it down; the exit status."""
        self._loop = asyncio.get_running_loop()
        try:
            self._set_up()
            await self._serve()
        except UsageError as error:
            self._fail(error)
        except FirmwareError as error:
            self._diagnostics.verbatim(str(error))
            self._status = 1
        except (MigrationError, KvmError) as error:
            self._fail(UsageError(str(error)))
        finally:
            await self._take_down()
        return self._status

    def _fail(self, error: UsageError) -> None:
        self._diagnostics.error(error)
        self._status = 1

    # ---- the way up ----

    def _set_up(self) -> None:
        arguments = self._arguments
        self._signals = SignalWatcher(self._on_signal)
        self._hub.start()
        if arguments.pidfile is not None:
            self._pidfile = PidFile(arguments.pidfile)
        for chardev in arguments.chardevs:
            self._devices.add_chardev(chardev)
        for index, monitor in enumerate(arguments.monitors):
            self._add_monitor(index, monitor)
        config = self._machine_config()
        self._add_machine(config)
        self._add_migration()

    def _add_monitor(self, index: int, request: MonitorRequest) -> None:
        if request.device:
            label, consequence = f"compat_monitor{index}", f"parse error: {request.device}"
            backend = self._devices.add_device(request.option, request.device, label, consequence)
        else:
            try:
                backend = self._devices.claim(request.chardev)
            except UsageError as error:
                raise error.during(request.option) from error
        self._monitors.append(QmpMonitor(backend, self._registry, self._hub, request.pretty))

    def _machine_config(self) -> MachineConfig:
        arguments = self._arguments
        config = MachineConfig(
            cpus=arguments.cpus,
            max_cpus=arguments.max_cpus,
            bios=arguments.bios or "",
            cpu_model=arguments.cpu_model,
            cpu_features=arguments.cpu_features,
            kernel_irqchip=arguments.kernel_irqchip,
            isa_serial=arguments.machine_switch("isa-serial", True),
            vapic=arguments.vapic,
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
        return config

    def _add_memory(self, config: MachineConfig) -> None:
        for request in self._arguments.backends:
            self._memory[request.id] = make_memory(request)
            if request.id == self._arguments.memory_backend:
                config.ram_backend = self._memory[request.id]
                config.ram_idstr = ram_idstr(request)
        if config.ram_backend is None:
            return
        if self._arguments.ram_size not in (0, config.ram_backend.size):
            raise UsageError("Machine memory size does not match the size of the memory backend")
        config.ram_size = config.ram_backend.size

    def _add_machine(self, config: MachineConfig) -> None:
        from .machine import MicroVM

        self._machine = MicroVM(config, self._hub.emit, self._diagnostics.say)
        self._machine.reboots = self._arguments.reboot
        if self._arguments.shutdown:
            self._machine.on_shutdown = self._on_guest_end

    def _add_migration(self) -> None:
        from qemumig.commands.qmp import MigrationCommands
        from qemumig.options import MigrationOptions

        arguments = self._arguments
        assert self._machine is not None
        options = MigrationOptions()
        for name, value in arguments.migration_properties:
            options.set_property(name, value)
        self._control = MigrationCommands(
            self._machine,
            options,
            emit=self._hub.emit,
            autostart=not arguments.paused,
            take_fd=take_fd,
            exit_process=self.exit_from_any_thread,
        )
        self._commands = MachineCommands(
            self._machine,
            self._hub.emit,
            set_autostart=self._control.set_autostart,
            quit=self._end,
            name=arguments.name,
            uuid=arguments.uuid,
        )
        for commands in (session_commands(self._registry), self._commands.commands(), self._control.commands()):
            self._registry.add(commands)
        if arguments.incoming not in (None, "defer"):
            try:
                self._control.incoming(arguments.incoming)
            except MigrationError as error:
                raise UsageError(str(error)).during(f"-incoming {arguments.incoming}") from error

    # ---- at work ----

    async def _serve(self) -> None:
        assert self._signals is not None and self._machine is not None
        self._signals.start()
        for monitor in self._monitors:
            monitor.start()
        ended = asyncio.ensure_future(self._ending.wait())
        clients = asyncio.ensure_future(self._devices.start())
        await asyncio.wait((ended, clients), return_when=asyncio.FIRST_COMPLETED)
        if not ended.done():
            clients.result()
            if not self._arguments.paused and self._arguments.incoming is None:
                self._machine.start()
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
        """Begin no further command and take everything down."""
        self._ending.set()
        for monitor in self._monitors:
            monitor.stop()

    # ---- the way down ----

    async def _take_down(self) -> None:
        self._end()
        if self._commands is not None:
            await self._commands.close()
        if self._control is not None:
            await self._control.close()
        if self._machine is not None:
            await asyncio.to_thread(self._machine.close)
        for monitor in self._monitors:
            await monitor.close()
        self._hub.stop()
        self._devices.close()
        for memory in self._memory.values():
            memory.close()
        if self._pidfile is not None:
            self._pidfile.close()
        if self._signals is not None:
            self._signals.close()


def ram_idstr(request: BackendRequest) -> str:
    """The name on the wire of RAM from a memory backend (machine.md §2)."""
    if request.properties.get("x-use-canonical-path-for-ramblock-id"):
        return f"/objects/{request.id}"
    return request.id


def make_memory(request: BackendRequest) -> HostMemory:
    """The memory that `-object` asks for."""
    from .memory import HostMemory

    wanted = {name.replace("-", "_"): value for name, value in request.properties.items()}
    wanted.pop("x_use_canonical_path_for_ramblock_id", None)
    size = int(wanted.pop("size"))
    if request.kind == "memory-backend-memfd":
        return HostMemory.memfd(size, name=request.id, **wanted)  # type: ignore[arg-type]
    if request.kind == "memory-backend-ram":
        return HostMemory.anonymous(size, **wanted)  # type: ignore[arg-type]
    rom = {"auto": None, "on": True, "off": False}[str(wanted.pop("rom", "auto"))]
    return HostMemory.file(str(wanted.pop("mem_path")), size, rom=rom, **wanted)  # type: ignore[arg-type]


if __name__ == "__main__":
    sys.exit(main())
