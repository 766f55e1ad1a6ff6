"""Machines made for a test, with the self-checking guest inside; what moves from one to another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvm.config import MachineConfig
from kvm.machine import MicroVM
from qemumig.savevm.devices.kvmclock import KVMCLOCK
from qemumig.savevm.reader import BytesReader
from tests.support import guest
from tests.support.guest import Letters

MIB = 1 << 20
PAGE = 4096


class Workshop:
    """Makes machines with the guest inside, remembers their events, and closes them after the test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.events: list[tuple] = []
        self.warnings: list[str] = []
        self._machines: list[MicroVM] = []

    def image(self, **parameters: int) -> str:
        return guest.write_image(self.folder, **{"print_every": 20, "dirty_pages": 256, **parameters})

    def machine(
        self,
        letters: Letters | None = None,
        *,
        bios: str | None = None,
        on_event: dict[str, Callable[[], None]] | None = None,
        **config: Any,
    ) -> MicroVM:
        """A stopped machine of 64 MiB; *config* as in MachineConfig, *on_event*: what to call at an event."""

        def emit(name: str, data: dict | None = None) -> None:
            self.events.append((name, *(data or {}).values()))
            (on_event or {}).get(name, lambda: None)()

        settings = {"ram_size": 64 * MIB, "cpu_features": {"pni": False}, **config}
        made = MicroVM(
            MachineConfig(bios=self.image() if bios is None else bios, serial=letters, **settings),  # type: ignore[arg-type]
            emit,
            self.warnings.append,
        )
        self._machines.append(made)
        return made

    def close(self) -> None:
        for machine in self._machines:
            machine.close()


def running_guest(workshop: Workshop, cpus: int = 1, **parameters: int) -> tuple[MicroVM, Letters]:
    """A machine whose guest has all checks on and every vCPU at work."""
    letters = Letters()
    bios = workshop.image(**{"flags": guest.ALL_CHECKS, "ncpus": cpus, **parameters})
    machine = workshop.machine(letters, bios=bios, cpus=cpus, max_cpus=cpus)
    machine.start()
    wait_for_all(letters, cpus)
    return machine, letters


def wait_for_all(letters: Letters, cpus: int, rounds: int = 2) -> None:
    for cpu in range(cpus):
        letters.wait(rounds, bytes([ord("B") + cpu]))
    assert letters.errors == b""


def move(source: MicroVM, destination: MicroVM) -> None:
    """Carry a stopped machine's memory and device records over, the records by way of their bytes."""
    for ours, theirs in zip(source.ram_blocks, destination.ram_blocks, strict=True):
        assert (ours.idstr, ours.used_length) == (theirs.idstr, theirs.used_length)
        theirs.owner.write(0, ours.owner.read(0, ours.used_length))  # type: ignore[attr-defined]
    destination.load_device_state(over_the_wire(source))


def over_the_wire(machine: MicroVM) -> list[tuple[Any, Any]]:
    return [
        (section, section.vmstate.load(BytesReader(data), section.vmstate.version_id))
        for section, data in device_bytes(machine)
    ]


def device_bytes(machine: MicroVM) -> list[tuple[Any, bytes]]:
    return [(section, section.vmstate.save(record)[0]) for section, record in machine.save_device_state()]


def all_ticked(machine: MicroVM, cpus: int) -> bool:
    """The timer of every vCPU has interrupted it."""
    return all(guest.status(machine.read_physical, cpu).ticks for cpu in range(cpus))


def clock_of(machine: MicroVM) -> int:
    return next(record.clock for section, record in machine.save_device_state() if section.vmstate is KVMCLOCK)
