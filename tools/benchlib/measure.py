"""One migration of one contestant, measured from outside."""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from qemumig.cli.demo import silence
from qemumig.cli.guest import PAGE_SIZE
from qemumig.cli.interrupts import Interrupts
from qemumig.cli.vmm import FINAL, MachineShape, MigrationOutcome, Vmm, VmmError, listen, with_capabilities

from . import barefile, baresocket
from .process import cpu_seconds, forget_peak, peak_overhead, warm_memory
from .workloads import Workload

GIB = 1 << 30
START_TIMEOUT = 120.0  # the guest fills its memory first
LETTERS = 20
CADENCE_SECONDS = 1.0
DELTA_BANDWIDTH = 64 << 20  # bytes per second …
DELTA_SHARE = 64  # … and this part of it once deltas flow
DELTA_POLL_SECONDS = 1.0  # the source's CPU time answers the questions, too: few of them
DELTA_CPU_SECONDS = 0.5  # of sending deltas are measured; a process's CPU time is counted in hundredths


class Lacks(Exception):
    """A contestant cannot do what a workload asks for."""


@dataclass(frozen=True)
class Contestant:
    """A VMM on both ends."""

    name: str
    command: str


@dataclass(frozen=True)
class Run:
    """Figures of one migration; None where the workload or the contestant has none."""

    rate: float  # guest memory, MB/s
    wire_rate: float | None = None  # bytes sent, MB/s
    total_ms: float | None = None
    downtime_ms: float | None = None  # as the source has it
    silence_ms: float | None = None  # between the last letter there and the first here
    longest_silence_ms: float | None = None  # from just before the switchover to a second after
    cpu_source: float | None = None  # seconds per GiB of guest memory, without vCPUs
    cpu_destination: float | None = None
    extra_source: float | None = None  # peak memory beyond the guest's, MB
    extra_destination: float | None = None


def figures() -> list[str]:
    return [each.name for each in fields(Run)]


@dataclass
class Bench:
    """What all runs have in common; *memory* in bytes."""

    memory: int
    cpus: int
    downtime_limit: int  # ms
    timeout: float
    interrupts: Interrupts
    files: Path | None = None  # where what a workload saves goes; None: the directory for temporary files

    def migrate(self, contestant: Contestant, workload: Workload) -> Run:
        """Start both ends, migrate, measure, and make sure that the guest is well; Lacks when it cannot do that."""
        with ExitStack() as owned:
            self._shape = self._new_shape(owned, workload)
            destination = self._vmm(owned, "destination", contestant.command, incoming=True)
            self._configure(destination, workload)
            source = self._start(owned, contestant, workload)
            self._configure(source, workload)
            if workload.deltas:
                return self._encode(source, destination, workload)
            if workload.file:
                return self._through_file(source, destination, workload)
            outcome, costs = self._measured(source, destination)
            quiet: dict[str, float] = {}
            if workload.running:
                quiet = self._listen(source, destination, outcome)
            self._check_guest(source, destination, workload)
            return self._run(outcome, costs, quiet)

    def bare(self, load: Contestant, workload: Workload) -> Run:
        """The bare socket or file, while a guest of *load* does what it would do under a migration."""
        with ExitStack() as owned:
            self._shape = self._new_shape(owned, workload)
            if workload.running:
                self._start(owned, load, workload)
            if workload.file:
                run = barefile.measure(self.memory, self._shape.image.parent / "bare", workload.file, workload.sockets)
            else:
                run = baresocket.measure(self.memory, workload.sockets)
        return Run(
            rate=self.memory / run.seconds / 1e6, total_ms=run.seconds * 1000, cpu_source=run.cpu / self.memory * GIB
        )

    # --- the stage

    def _new_shape(self, owned: ExitStack, workload: Workload) -> MachineShape:
        """The machine of both ends, with a directory of its own."""
        with self.interrupts.held():
            directory = Path(tempfile.mkdtemp(prefix="qemumig-bench-", dir=self.files))
            owned.callback(shutil.rmtree, directory, ignore_errors=True)
        image = directory / "guest.bin"
        cpus = max(self.cpus, workload.least_cpus)
        image.write_bytes(workload.guest(self.memory, cpus).image())
        backend = f"memory-backend-ram,id=ram,size={self.memory},prealloc=on"
        extra = ("-object", backend, "-machine", "memory-backend=ram") if workload.prealloc else ()
        return MachineShape(self.memory, cpus, image, extra)

    def _start(self, owned: ExitStack, contestant: Contestant, workload: Workload) -> Vmm:
        """The source, with its guest running or stopped."""
        source = self._vmm(owned, "source", contestant.command)
        if not source.serial.wait_more(LETTERS, START_TIMEOUT):
            raise VmmError(f"{contestant.name}: the guest printed only {source.serial.output()!r}")
        time.sleep(CADENCE_SECONDS)
        if not workload.running:
            source.command("stop")
        return source

    def _vmm(self, owned: ExitStack, name: str, command: str, *, incoming: bool = False) -> Vmm:
        with self.interrupts.held():
            vmm = Vmm(name, command, self._shape.image.parent, self._shape, incoming=incoming)
            owned.callback(vmm.close)
        vmm.connect()
        vmm.command("migrate-set-parameters", max_bandwidth=0, downtime_limit=self.downtime_limit)
        with_capabilities([vmm], events=True)
        return vmm

    def _configure(self, vmm: Vmm, workload: Workload) -> None:
        """Set what the workload asks for; Lacks when this VMM knows nothing of it."""
        known = {one["capability"] for one in vmm.command("query-migrate-capabilities")}
        if missing := [name for name in workload.capabilities if name not in known]:
            raise Lacks(f"it has no {missing[0]}")
        with_capabilities([vmm], **dict.fromkeys(workload.capabilities, True))
        if workload.parameters:
            vmm.command("migrate-set-parameters", **workload.parameters)

    # --- the measurement

    def _measured(self, source: Vmm, destination: Vmm) -> tuple[MigrationOutcome, dict[str, float]]:
        """Migrate; the monitors are left alone meanwhile: an event tells the end."""
        uri = listen(destination)
        warm_memory(2 * self.memory)
        started, ended, costs = self._timed([source, destination], lambda: source.command("migrate", uri=uri), source)
        return MigrationOutcome(started, ended, source.command("query-migrate")), costs

    def _timed(self, vmms: Sequence[Vmm], start: Callable[[], Any], last: Vmm) -> tuple[float, float, dict[str, float]]:
        """Call *start*, wait for the word of *last* that the migration is done: when that was, and what it cost *vmms*."""
        before = {vmm.name: cpu_seconds(vmm) for vmm in vmms}
        for vmm in vmms:
            forget_peak(vmm)
        started = time.monotonic()
        start()
        while (status := self._next_status(last)) not in FINAL:
            pass
        ended = time.monotonic()
        if status != "completed":
            report = last.command("query-migrate")
            raise VmmError(f"the migration {status}: {report.get('error-desc')}; {vmms[-1].last_words()}")
        for vmm in vmms:
            if vmm is not last:
                vmm.wait_event("MIGRATION", 30, status="completed")
        costs = {f"cpu_{vmm.name}": cpu_seconds(vmm) - before[vmm.name] for vmm in vmms}
        costs |= {f"extra_{vmm.name}": peak_overhead(vmm) / 1e6 for vmm in vmms}
        return started, ended, costs

    def _through_file(self, source: Vmm, destination: Vmm, workload: Workload) -> Run:
        """Save the guest and restore it; one of the two is what is measured."""
        uri = f"file:{self._shape.image.parent / 'saved'}"
        warm_memory(2 * self.memory)
        saved = self._timed([source], lambda: source.command("migrate", uri=uri), source)
        warm_memory(self.memory)
        loaded = self._timed([destination], lambda: destination.command("migrate-incoming", uri=uri), destination)
        self._check_guest(source, destination, workload)
        started, ended, costs = saved if workload.file == "save" else loaded
        return self._run(MigrationOutcome(started, ended, source.command("query-migrate")), costs, {})

    def _encode(self, source: Vmm, destination: Vmm, workload: Workload) -> Run:
        """Let deltas flow for some seconds, count pages and CPU time meanwhile, then let the migration end."""
        with_capabilities([source, destination], xbzrle=True)
        # the limit gives the guest time to write everything again; and as long as it is low, so is what may be left
        source.command("migrate-set-parameters", max_bandwidth=DELTA_BANDWIDTH, downtime_limit=1)
        source.command("migrate", uri=listen(destination))
        # the first round sends every page, the second fills the cache; deltas are so small that rounds would end at once
        source.wait_event("MIGRATION_PASS", self.timeout, **{"pass": 3})
        source.command("migrate-set-parameters", max_bandwidth=DELTA_BANDWIDTH // DELTA_SHARE)
        samples = self._sample_deltas(source)
        source.command("migrate-set-parameters", max_bandwidth=0, downtime_limit=2000)
        while (status := self._next_status(source)) not in FINAL:
            pass
        if status != "completed":
            raise VmmError(f"the migration {status}: {source.command('query-migrate').get('error-desc')}")
        destination.wait_event("MIGRATION", 30, status="completed")
        self._listen_for_guest(destination)
        self._check_guest(source, destination, workload)
        (cpu, pages), (cpu_then, pages_then) = samples
        return Run(rate=(pages_then - pages) * PAGE_SIZE / (cpu_then - cpu) / 1e6)

    def _sample_deltas(self, source: Vmm) -> tuple[tuple[float, int], tuple[float, int]]:
        """(CPU seconds, pages found in the cache) once deltas flow, and some CPU time later."""
        samples: list[tuple[float, int]] = []
        deadline = time.monotonic() + self.timeout
        while time.monotonic() < deadline:
            time.sleep(DELTA_POLL_SECONDS)
            report = source.command("query-migrate")
            if report["status"] not in ("setup", "active"):
                raise VmmError("the guest left the source before it had sent enough deltas")
            samples.append((cpu_seconds(source), report["xbzrle-cache"]["pages"]))
            if samples[-1][0] > samples[0][0] + DELTA_CPU_SECONDS:
                return samples[0], samples[-1]
        raise VmmError(f"deltas took less than {DELTA_CPU_SECONDS} CPU seconds in {self.timeout:.0f} s")

    def _next_status(self, source: Vmm) -> str:
        status: str = source.wait_event("MIGRATION", self.timeout)["data"]["status"]
        return status

    def _listen_for_guest(self, destination: Vmm) -> None:
        if not destination.serial.wait_more(LETTERS, self.timeout):
            raise VmmError(f"the guest is silent on the destination: {destination.serial.output()!r}")

    def _listen(self, source: Vmm, destination: Vmm, outcome: MigrationOutcome) -> dict[str, float]:
        self._listen_for_guest(destination)
        time.sleep(CADENCE_SECONDS)
        return silence(source, destination, outcome)

    def _check_guest(self, source: Vmm, destination: Vmm, workload: Workload) -> None:
        """A migration that breaks the guest has no speed."""
        there, here = source.guest_status(), destination.guest_status()
        complaints = [status.complaint for status in here if status.complaint]
        if complaints:
            raise VmmError(f"the guest found a fault after the migration: {complaints[0]}")
        if not workload.running and there != here:
            raise VmmError(f"the stopped guest's status differs: {there} there, {here} here")
        if workload.running and any(b.passes <= a.passes for a, b in zip(there, here, strict=True)):
            raise VmmError(f"the guest makes no passes after the migration: {here}")

    def _run(self, outcome: MigrationOutcome, costs: dict[str, float], quiet: dict[str, float]) -> Run:
        seconds = outcome.ended - outcome.started
        per_gib = self.memory / GIB
        figures = costs | {
            name: seconds_spent / per_gib for name, seconds_spent in costs.items() if name.startswith("cpu_")
        }
        return Run(
            rate=self.memory / seconds / 1e6,
            wire_rate=outcome.report["ram"]["transferred"] / seconds / 1e6,
            total_ms=seconds * 1000,
            downtime_ms=outcome.report["downtime"],
            silence_ms=quiet.get("silence_ms"),
            longest_silence_ms=quiet.get("longest_silence_ms"),
            **figures,
        )


def summary(runs: list[Run]) -> dict[str, Any]:
    """Median, min and max of every figure, and the runs themselves."""
    found: dict[str, Any] = {}
    for name in figures():
        values = [value for run in runs if (value := getattr(run, name)) is not None]
        if values:
            found[name] = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return found | {"runs": [asdict(run) for run in runs]}
