"""VMM processes for tests: a guest on a stage, migrated in one line; and what a program must not leave behind.

    source = stage.vmm("source", qemu, guest=GuestParameters(...))      a running guest that prints
    destination = stage.vmm("destination", qemumig_system(), incoming=True)
    migrate(source, destination)                                       raises when it fails
    stage.assert_guest_is_well(destination)

The trick: the guest checks itself (`qemumig/cli/guest.py`), so a test only asks whether it still makes passes and
has not complained.  Both ends may be any VMM that takes QEMU's command line and QMP.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from qemumig.cli.guest import COLD_START, GuestParameters, failures_in
from qemumig.cli.vmm import MachineShape, MigrationOutcome, Vmm, VmmError, listen, migrate, with_capabilities

__all__ = [
    "GuestParameters",
    "Leaks",
    "MachineShape",
    "MigrationOutcome",
    "Stage",
    "Vmm",
    "VmmError",
    "children",
    "listen",
    "migrate",
    "open_files",
    "thread_names",
    "wait_until",
    "with_capabilities",
]

MIB = 1 << 20


class Stage:
    """The VMMs of one test, all with the same guest and machine; `close` ends them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.vmms: list[Vmm] = []

    def vmm(
        self,
        name: str,
        system: str,
        *,
        guest: GuestParameters | None = None,
        memory: int = 128 * MIB,
        incoming: bool = False,
        stopped: bool = False,
        unlimited: bool = True,
        extra: tuple[str, ...] = (),
    ) -> Vmm:
        """Start *system* with the guest of the stage (*guest* chooses it, once) and connect its monitor.

        A guest that runs has printed a few letters when this returns.  *unlimited* takes the bandwidth limit off.
        """
        image = self.directory / "guest.bin"
        if guest is not None or not image.exists():
            self.guest = guest or GuestParameters()
            image.write_bytes(self.guest.image())
        shape = MachineShape(memory, self.guest.cpus, image, extra)
        vmm = Vmm(name, system, self.directory, shape, incoming=incoming, stopped=stopped)
        self.vmms.append(vmm)
        vmm.connect()
        if unlimited:
            vmm.command("migrate-set-parameters", max_bandwidth=0)
        if not incoming and not stopped:
            assert vmm.serial.wait_more(4, 30), f"{name}: the guest printed only {vmm.serial.output()!r}"
        return vmm

    def assert_guest_is_well(self, vmm: Vmm, *, arrived: bool = True) -> None:
        """The guest makes passes on every vCPU and no check failed; *arrived*: it was not started here anew."""
        before = vmm.guest_status()

        def all_moved() -> bool:
            now = vmm.guest_status()
            assert not [status.complaint for status in now if status.complaint]
            return all(b.passes > a.passes for a, b in zip(before, now, strict=True))

        wait_until(all_moved, f"{vmm.name}: some vCPU makes no pass")
        output = vmm.serial.output()
        assert failures_in(output) == []
        assert not arrived or COLD_START.encode() not in output, f"{vmm.name}: the guest was started anew"

    def close(self) -> None:
        """End every VMM, the last one first."""
        for vmm in reversed(self.vmms):
            vmm.close()


def wait_until(condition: Callable[[], bool], what: str, timeout: float = 30) -> None:
    """Ask until *condition* holds; AssertionError "*what*" after *timeout* seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"after {timeout:.0f} s: {what}"
        time.sleep(0.01)


# --- what a process holds


def children(pid: int) -> list[int]:
    """Process ids of the children of all threads of *pid*."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            found += map(int, (task / "children").read_text().split())
    return sorted(found)


def open_files(pid: int) -> dict[int, str]:
    """Descriptor: what it points to, of *pid*."""
    found = {}
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found[int(entry.name)] = os.readlink(entry)
        except FileNotFoundError:
            continue  # the descriptor of this very listing, or one closed meanwhile
    return found


def thread_names(pid: int) -> list[str]:
    """Names of the threads of *pid*, as the kernel has them."""
    names = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            names.append((task / "comm").read_text().strip())
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended meanwhile
    return sorted(names)


class Leaks:
    """What this process holds at one moment; `check` compares with a later one."""

    def __init__(self) -> None:
        self._threads = {thread.ident for thread in threading.enumerate()}
        self._files = open_files(os.getpid())
        self._children = set(children(os.getpid()))

    def check(self) -> None:
        """AssertionError names every thread, child and descriptor that came and did not go."""
        threads = [t.name for t in threading.enumerate() if t.ident not in self._threads]
        files = {fd: name for fd, name in open_files(os.getpid()).items() if self._files.get(fd) != name}
        offspring = set(children(os.getpid())) - self._children
        assert not threads, f"threads left behind: {threads}"
        assert not offspring, f"children left behind: {sorted(offspring)}"
        assert not files, f"descriptors left behind: {files}"
