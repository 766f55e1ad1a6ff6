"""One migration, and the proof that it went well.

Proof     running   the guest arrives running: every vCPU makes passes and gets timer interrupts, none of the guest's
                    own checks has failed, and nobody started it anew
          held      the destination is started with -S: the memory of both stopped ends has the same digest; then the
                    guest is started, and the same is asked of it
"""

from __future__ import annotations

import shutil
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from qemumig.cli.guest import COLD_START, FAILURES, GuestParameters, failures_in
from qemumig.cli.interrupts import Interrupts
from qemumig.cli.vmm import MachineShape, MigrationOutcome, Vmm, VmmError

from .multifd import Multifd
from .peers import Peer, options
from .transports import WAYS

LETTERS = 4
START_TIMEOUT = 30.0  # seconds; the guest fills its memory first


@dataclass(frozen=True)
class Rules:
    """What holds for all migrations of a run; *downtime_limit* in ms, *timeout* in seconds."""

    interrupts: Interrupts
    downtime_limit: int = 300
    timeout: float = 120.0


class Stage:
    """The VMMs of one guest, in a directory of their own; leaving it ends them."""

    def __init__(self, rules: Rules, guest: GuestParameters, memory: int) -> None:
        self._rules = rules
        self._guest = guest
        self._memory = memory
        self._owned = ExitStack()

    def __enter__(self) -> Stage:
        with self._rules.interrupts.held():
            self._directory = Path(tempfile.mkdtemp(prefix="qemumig-interop-"))
            self._owned.callback(shutil.rmtree, self._directory, ignore_errors=True)
        image = self._directory / "guest.bin"
        image.write_bytes(self._guest.image())
        self._shape = MachineShape(self._memory, self._guest.cpus, image)
        return self

    def __exit__(self, *_: object) -> None:
        self._owned.close()

    def source(self, peer: Peer, extra: str = "") -> Vmm:
        """*peer* with the guest, which runs and has printed a few letters."""
        vmm = self._start("source", peer, extra)
        if not vmm.serial.wait_more(LETTERS, START_TIMEOUT):
            raise VmmError(f"{vmm.name}: the guest printed {vmm.serial.output()!r} in {START_TIMEOUT:.0f} s, no more")
        return vmm

    def destination(self, peer: Peer, extra: str = "", *, name: str = "destination", held: bool = False) -> Vmm:
        """*peer*, waiting for a guest; *held*: which is not to run when it has come."""
        return self._start(name, peer, extra, incoming=True, stopped=held)

    def _start(self, name: str, peer: Peer, extra: str, *, incoming: bool = False, stopped: bool = False) -> Vmm:
        command = f"{peer.command} {extra}".rstrip()
        with self._rules.interrupts.held():
            vmm = Vmm(name, command, self._directory, self._shape, incoming=incoming, stopped=stopped)
            self._owned.callback(vmm.close)
        vmm.connect()
        vmm.command("migrate-set-parameters", max_bandwidth=0, downtime_limit=self._rules.downtime_limit)
        return vmm


@dataclass(frozen=True)
class Trial:
    """A migration to be tried: who, how, and whether the destination is held stopped."""

    source: Peer
    destination: Peer
    transport: str
    memory: int
    guest: GuestParameters
    held: bool = False
    multifd: Multifd | None = None

    def run(self, rules: Rules) -> MigrationOutcome:
        """Do it and prove it; VmmError says in one sentence what went wrong."""
        extra = options(self.source, self.destination)
        here, there = extra.source, extra.destination
        if self.multifd is not None:
            here += f" {self.multifd.options(self.source, is_source=True)}"
            there += f" {self.multifd.options(self.destination, is_source=False)}"
        with Stage(rules, self.guest, self.memory) as stage:
            source = stage.source(self.source, here)
            destination = stage.destination(self.destination, there, held=self.held)
            if self.multifd is not None:
                self.multifd.prepare(source, destination)
            return hop(source, destination, self.transport, rules.timeout, held=self.held)


def hop(source: Vmm, destination: Vmm, transport: str, timeout: float, *, held: bool) -> MigrationOutcome:
    """Migrate, and prove that the guest is well where it is now."""
    outcome = WAYS[transport](source, destination, timeout)
    source.wait_runstate("postmigrate")
    if held:
        destination.wait_runstate("paused")
        compare_memory(source, destination)
        destination.command("cont")
    destination.wait_runstate("running")
    prove_guest(destination, timeout)
    return outcome


def compare_memory(source: Vmm, destination: Vmm) -> None:
    """The guest's memory is the same on both stopped ends; VmmError when not."""
    there, here = source.memory_digest(), destination.memory_digest()
    if there != here:
        raise VmmError(f"guest memory differs: SHA-256 {there[:16]}… on {source.name}, {here[:16]}… on {destination.name}")


def prove_guest(vmm: Vmm, timeout: float) -> None:
    """Every vCPU makes passes and gets timer interrupts, none complains, and nobody started the guest anew."""
    before = vmm.guest_status()
    deadline = time.monotonic() + timeout
    while True:
        vmm.serial.wait_more(LETTERS, max(0.0, deadline - time.monotonic()))
        after = vmm.guest_status()
        _refuse_complaints(vmm, [f"vCPU {cpu}: {status.complaint}" for cpu, status in enumerate(after) if status.complaint])
        if all(b.passes > a.passes and b.ticks > a.ticks for a, b in zip(before, after, strict=True)):
            break
        if time.monotonic() > deadline:
            moved = [(b.passes - a.passes, b.ticks - a.ticks) for a, b in zip(before, after, strict=True)]
            raise VmmError(f"{vmm.name}: in {timeout:.0f} s the vCPUs made only {moved} (passes, timer interrupts)")
    output = vmm.serial.output()
    _refuse_complaints(vmm, [f"it printed {letter!r}: {FAILURES[letter]}" for letter in failures_in(output)])
    if COLD_START.encode() in output:
        raise VmmError(f"{vmm.name}: the guest was reset instead of resumed")


def _refuse_complaints(vmm: Vmm, complaints: list[str]) -> None:
    if complaints:
        raise VmmError(f"{vmm.name}: the guest found a fault: {complaints[0]}")
