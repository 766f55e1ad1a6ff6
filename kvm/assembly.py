"""From the command line's records to a machine: its memory, its disks, what is loaded, its configuration.

    Arguments ─▶ objects ─▶ MachineConfig ◀─ serial port, disks, bytes to load
                                 └─▶ MicroVM, or an EmptyMachine

Whatever is opened on the way is given to the ExitStack of whoever called.  All errors are UsageErrors, or say by their
type that it was the machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from typing import TYPE_CHECKING

from qemumig.commands.command import CommandError

from .arguments import Arguments, ObjectRequest
from .block_options import IDE, IDE_PLACES, VIRTIO, Disks
from .boot import FirmwareError
from .chardev import CharBackend, reason
from .config import MachineConfig
from .from_text import block_pairs
from .keyval import UsageError
from .loader_options import add_loader, is_loader

if TYPE_CHECKING:
    from .empty_machine import EmptyMachine
    from .machine import Emit, MicroVM
    from .user_objects import UserObjects

MEMORY_KINDS = "memory-backend-"


class Assembly:
    """One machine in the making; *warn* says a line to the user."""

    def __init__(self, arguments: Arguments, warn: Callable[[str], None], closers: AsyncExitStack) -> None:
        from .user_objects import UserObjects

        self._arguments = arguments
        self._warn = warn
        self._closers = closers
        self.objects: UserObjects = UserObjects()
        closers.callback(self.objects.close)
        self.disks = self._no_disks()

    def _no_disks(self) -> Disks:
        arguments = self._arguments
        if arguments.machine_type.is_empty:
            disks = Disks(self._warn, 0)
        elif arguments.machine_type.is_pc:
            disks = Disks(self._warn, IDE_PLACES, IDE, snapshot=arguments.snapshot)
        else:
            disks = Disks(self._warn, arguments.chipset.virtio_slots, VIRTIO, snapshot=arguments.snapshot)
        self._closers.callback(disks.close)
        return disks

    def make_objects(self) -> None:
        """-object, in its order, and the machine's memory if none of them is that."""
        for request in self._arguments.objects:
            self._make_object(request)

    def _make_object(self, request: ObjectRequest) -> None:
        try:
            self.objects.create(request.kind, request.id, request.properties)
        except CommandError as error:
            raise UsageError(error.desc) from error

    def config(self, serial: CharBackend | None) -> MachineConfig:
        """All that the machine is made from; *serial*: where its serial port goes."""
        arguments = self._arguments
        config = MachineConfig(
            machine_type=arguments.machine_type,
            runs_guest=arguments.runs_guest,
            cpus=arguments.cpus,
            max_cpus=arguments.max_cpus,
            bios=arguments.bios or "",
            cpu_model=arguments.cpu_model,
            cpu_features=arguments.cpu_features,
            kernel_irqchip=arguments.kernel_irqchip,
            chipset=arguments.chipset,
            isa_serial=arguments.machine_switch("isa-serial", True),
            serial=serial,
            vapic=arguments.vapic,
            legacy_virtio=arguments.legacy_virtio,
            uuid=arguments.uuid,
            name=arguments.name,
            incoming=arguments.incoming is not None,
        )
        if arguments.kernel is not None:
            _refuse_kernel(arguments.kernel)
        if arguments.machine_type.is_empty:
            config.cpus, config.ram_size = 0, 0
            self._add_disks(config)
            if config.blobs:
                raise UsageError(f"-device loader: machine '{arguments.machine_type.name}' has no memory")
            return config
        config.ram_size = arguments.ram_size or config.ram_size
        self._add_memory(config)
        self._add_disks(config)
        return config

    def _add_memory(self, config: MachineConfig) -> None:
        arguments = self._arguments
        if arguments.memory_backend is None:
            request = ObjectRequest("memory-backend-ram", arguments.machine_type.ram_idstr, {"size": config.ram_size})
            self._make_object(request)
        else:
            request = arguments.require_object(arguments.memory_backend)
            if not request.kind.startswith(MEMORY_KINDS):
                raise UsageError(f"Invalid parameter type for 'memory-backend', expected: {MEMORY_KINDS}*")
        made = self.objects.get(request.id)
        assert made is not None
        made.in_use = True
        config.ram_backend = made.value
        config.ram_idstr = ram_idstr(request)
        if arguments.ram_size not in (0, made.value.size):
            raise UsageError("Machine memory size does not match the size of the memory backend")
        config.ram_size = made.value.size

    def _add_disks(self, config: MachineConfig) -> None:
        arguments = self._arguments
        for text in arguments.blockdevs:
            with about(f"-blockdev {text}"):
                self.disks.add_node(block_pairs(text))
        for drive in arguments.drives:
            with about(drive.option):
                self.disks.add_drive(drive.text)
        for text in arguments.devices:
            with about(f"-device {text}"):
                if is_loader(text):
                    add_loader(text, config)
                else:
                    self.disks.add_device(text)
        config.disks = self.disks.disks

    def make_machine(self, config: MachineConfig, emit: Emit) -> MicroVM | EmptyMachine:
        """The machine, stopped."""
        if config.machine_type.is_empty:
            from .empty_machine import EmptyMachine

            return EmptyMachine(config, emit)
        from .machine import MicroVM

        return MicroVM(config, emit, self._warn)


@contextmanager
def about(option: str) -> Iterator[None]:
    """A UsageError inside is about *option*."""
    try:
        yield
    except UsageError as error:
        raise error.during(option) from error


def ram_idstr(request: ObjectRequest) -> str:
    """The name on the wire of RAM from a memory backend (machine.md §2)."""
    if request.properties.get("x-use-canonical-path-for-ramblock-id"):
        return f"/objects/{request.id}"
    return request.id


def _refuse_kernel(path: str) -> None:
    """Say why -kernel does not start *path*: first of all, whether there is such a file, as QEMU does."""
    try:
        open(path, "rb").close()
    except OSError as error:
        raise FirmwareError(f"qemu: could not open kernel file '{path}': {reason(error)}") from error
    raise UsageError(f"-kernel {path}: kernels are not loaded here; a firmware image is (-bios), or a boot sector (-hda)")
