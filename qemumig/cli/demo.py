"""`qemumig demo`: the main job, watched.

A guest that checks itself and writes to its memory all the time moves from one VMM to a second one while it runs,
over TCP on loopback and without a bandwidth limit; then on to a third, which is held stopped, so that the memory
of both ends can be compared bit by bit; there it runs again.

    source ──▶ destination ──▶ return (held, compared, then started)

With `--postcopy` it runs on the other side as soon as its devices are there, and what it touches is fetched while it waits:
how many pages those are, how long each wait takes, and how long all of the guest stood still, is told as well.

Whatever happens, Ctrl-C included: no process, socket, thread or temporary file stays behind.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from .guest import (
    ALL_CHECKS,
    COLD_START,
    FAILURES,
    FILL_HALF_RANDOM,
    PAGE_SIZE,
    GuestParameters,
    failures_in,
)
from .interrupts import Interrupted, Interrupts
from .progress import MB, Rounds, View, conclude, size, view_for
from .vmm import LOW_MEMORY_END, MachineShape, MigrationOutcome, Vmm, VmmError, migrate, with_capabilities

MIB = 1 << 20
DIRTY_BASE = 16 * MIB
LETTERS_BEFORE = 20  # the guest has proved to be alive
LETTERS_AFTER = 100
POLL_SECONDS = 0.02
SLOW_PRECOPY = 64 * MIB  # bytes per second: so little has moved when postcopy begins that nearly all is left to it
CADENCE_SECONDS = 1.0  # how long the guest is listened to before and after the switchover
SUFFIXES = {"": MIB, "K": 1 << 10, "M": MIB, "G": 1 << 30}


class DemoError(Exception):
    """The demonstration failed; one sentence says why."""


def memory_size(text: str) -> int:
    """ "512M" → bytes; a bare number is MiB, as after QEMU's `-m`."""
    number, suffix = (text[:-1], text[-1].upper()) if text[-1:].isalpha() else (text, "")
    if suffix not in SUFFIXES or not number.isdecimal() or not int(number):
        raise argparse.ArgumentTypeError(f"{text!r} is no size: a whole number with K, M or G is expected")
    return int(number) * SUFFIXES[suffix]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `qemumig demo`."""
    add = parser.add_argument
    add("--memory", type=memory_size, default="1G", metavar="SIZE", help="guest memory (default 1G)")
    add("--cpus", type=int, default=2, metavar="N", help="virtual CPUs, 1 to 16 (default 2)")
    add("--dirty", type=memory_size, default="32M", metavar="SIZE", help="memory rewritten all the time (32M)")
    add("--spin", type=int, default=0, metavar="N", help="delay loop per page: lowers the dirty rate (0)")
    add("--downtime-limit", type=int, default=300, metavar="MS", help="longest downtime aimed at (300 ms)")
    add("--timeout", type=float, default=120, metavar="S", help="give up on a migration after that long (120 s)")
    add("--postcopy", action="store_true", help="let the guest run there before its memory is there")
    add("--system", metavar="COMMAND", help="the VMM on every end (default: qemumig-system)")
    add("--source-system", metavar="COMMAND", help="the VMM the guest starts in, e.g. a QEMU with its options")
    add("--destination-system", metavar="COMMAND", help="the VMM the guest moves to")
    add("--json", action="store_true", help="print one JSON object with all figures, and nothing else")


def run(args: argparse.Namespace) -> int:
    """Give the demonstration: 0 when everything held, 1 when it did not, 128 + signal when interrupted."""
    view = view_for(args.json)
    result: dict[str, Any] = {"ok": False}
    status = 1
    with Interrupts() as interrupts, ExitStack() as owned:
        try:
            Demo(args, view, interrupts, owned).give(result)
            result["ok"], status = True, 0
            interrupts.hold()
        except (DemoError, VmmError) as error:
            interrupts.hold()
            result["error"] = str(error)
        except Interrupted as error:
            result["error"], status = f"interrupted by {error}", 128 + error.signum
        view.end()
        owned.close()
    conclude("qemumig demo", result, args.json)
    return status


def default_system() -> str:
    """The qemumig-system that belongs to this Python, else the one on PATH."""
    beside = Path(sys.executable).parent / "qemumig-system"
    found = str(beside) if beside.exists() else shutil.which("qemumig-system")
    if found is None:
        raise DemoError(f"there is no qemumig-system beside {sys.executable} nor on PATH; --system names another VMM")
    return found


@dataclass
class Faults:
    """What the guest touched before it was there."""

    requests: int
    seconds: float  # from the switch to the last page
    blocked_ms: int | None  # all vCPUs waited at once
    distribution: list[int]  # waits by octaves of microseconds; empty where the destination does not count them

    def within_us(self, share: float) -> int | None:
        """How long *share* of the waits took at most, rounded up to a power of two."""
        seen = 0
        for octave, count in enumerate(self.distribution):
            seen += count
            if seen and seen >= share * sum(self.distribution):
                return 2 << octave
        return None

    def as_json(self) -> dict[str, Any]:
        return {
            "requests": self.requests,
            "requests_per_s": round(self.requests / self.seconds, 1) if self.seconds else None,
            "seconds": round(self.seconds, 3),
            "blocked_ms": self.blocked_ms,
            "waits": sum(self.distribution),
            "median_us": self.within_us(0.5),
            "p90_us": self.within_us(0.9),
            "p99_us": self.within_us(0.99),
        }


class Switch:
    """Starts postcopy as soon as a migration is under way, and notes when the guest was handed over."""

    def __init__(self, source: Vmm) -> None:
        self._source = source
        self._asked = False
        self.handed_over: float | None = None

    def look(self, report: dict[str, Any]) -> None:
        """Given every report of the source."""
        if not self._asked and report.get("status") == "active" and report["ram"]["transferred"]:
            self._asked = True
            self._source.command("migrate-start-postcopy")
        if self.handed_over is None and report.get("status") == "postcopy-active":
            self.handed_over = time.monotonic()

    def faults(self, outcome: MigrationOutcome, destination: Vmm) -> Faults:
        """What both ends say, now that it is over."""
        report = destination.command("query-migrate")
        return Faults(
            outcome.report["ram"]["postcopy-requests"],
            outcome.ended - self.handed_over if self.handed_over is not None else 0.0,
            report.get("postcopy-blocktime"),
            report.get("postcopy-latency-dist", []),
        )


@dataclass
class Hop:
    """One migration, in figures; times in milliseconds."""

    source: str
    destination: str
    outcome: MigrationOutcome
    rounds: Rounds
    silence: dict[str, float] = field(default_factory=dict)
    faults: Faults | None = None

    def as_json(self) -> dict[str, Any]:
        report = self.outcome.report
        ram = report["ram"]
        seconds = report["total-time"] / 1000
        return {
            "source": self.source,
            "destination": self.destination,
            "total_ms": report["total-time"],
            "downtime_ms": report["downtime"],
            **{key: round(value, 2) for key, value in self.silence.items()},
            "transferred_bytes": ram["transferred"],
            "wire_mb_per_s": round(ram["transferred"] / seconds / MB, 1) if seconds else None,
            "memory_mb_per_s": round(ram["total"] / seconds / MB, 1) if seconds else None,
            "pages": {"normal": ram["normal"], "zero": ram["duplicate"]},
            "bitmap_syncs": ram["dirty-sync-count"],
            **({"postcopy": self.faults.as_json()} if self.faults is not None else {}),
            "rounds": [done.as_json() for done in self.rounds.finished],
        }


class Demo:
    """The demonstration, step by step; what it takes is noted in *owned* at once."""

    def __init__(self, args: argparse.Namespace, view: View, interrupts: Interrupts, owned: ExitStack) -> None:
        self.args = args
        self.view = view
        self._interrupts = interrupts
        self._owned = owned
        self._checks: dict[str, bool] = {}

    def give(self, result: dict[str, Any]) -> None:
        """All of it; *result* is filled as it goes."""
        result["checks"] = self._checks
        self._prepare()
        source, destination = self._start_first_two()
        there = self._hop(source, destination)
        self._listen_after(source, destination, there)
        result["there"] = there.as_json()
        self._prove_guest(destination, "the guest's self-checks are clean on the destination")
        self._tell(there)
        source.close()

        back = self._start("return", self._source_system, incoming=True, stopped=True)
        home = self._hop(destination, back)
        result["back"] = home.as_json()
        self._tell(home)
        self._compare_memory(destination, back)
        destination.close()
        back.command("cont")
        back.wait_runstate("running")
        self._prove_guest(back, "the guest's self-checks are clean after the way back")

    # --- the stage

    def _prepare(self) -> None:
        args = self.args
        check_sizes(args)
        self._source_system = args.source_system or args.system or default_system()
        self._destination_system = args.destination_system or args.system or default_system()
        with self._interrupts.held():
            self._directory = Path(tempfile.mkdtemp(prefix="qemumig-demo-"))
            self._owned.callback(shutil.rmtree, self._directory, ignore_errors=True)
        image = self._directory / "guest.bin"
        image.write_bytes(guest_parameters(args).image())
        self._shape = MachineShape(args.memory, args.cpus, image)

    def _start(self, name: str, system: str, *, incoming: bool = False, stopped: bool = False) -> Vmm:
        with self._interrupts.held():
            vmm = Vmm(name, system, self._directory, self._shape, incoming=incoming, stopped=stopped)
            self._owned.callback(vmm.close)
        vmm.connect()
        bandwidth = SLOW_PRECOPY if self.args.postcopy else 0
        vmm.command("migrate-set-parameters", max_bandwidth=bandwidth, downtime_limit=self.args.downtime_limit)
        if self.args.postcopy:
            with_capabilities([vmm], postcopy_ram=True, postcopy_blocktime=True)
        return vmm

    def _start_first_two(self) -> tuple[Vmm, Vmm]:
        source = self._start("source", self._source_system)
        destination = self._start("destination", self._destination_system, incoming=True)
        self.view.say(f"source: {self._source_system}, version {source.qmp.version}")
        self.view.say(f"destination: {self._destination_system}, version {destination.qmp.version}")
        self.view.say(
            f"guest: {size(self.args.memory)}, {self.args.cpus} vCPUs, rewrites {size(self.args.dirty)} "
            "without pause, all self-checks on"
        )
        if not source.serial.wait_more(LETTERS_BEFORE, self.args.timeout):
            raise DemoError(f"the guest printed {source.serial.output()!r} in {self.args.timeout:.0f} s, no more")
        time.sleep(CADENCE_SECONDS)  # its normal cadence is what the downtime is compared with
        return source, destination

    # --- a migration

    def _hop(self, source: Vmm, destination: Vmm) -> Hop:
        rounds = Rounds(self.args.downtime_limit)
        switch = Switch(source) if self.args.postcopy else None

        def progress(report: dict[str, Any]) -> None:
            if switch is not None:
                switch.look(report)
            sample, ended = rounds.add(report)
            if ended:
                self.view.row(ended)
            elif sample:
                self.view.look(sample)

        self.view.begin(f"{source.name} → {destination.name}")
        try:
            outcome = migrate(source, destination, progress=progress, timeout=self.args.timeout, poll=POLL_SECONDS)
        finally:
            self.view.end()
        faults = switch.faults(outcome, destination) if switch is not None else None
        return Hop(source.name, destination.name, outcome, rounds, faults=faults)

    def _listen_after(self, source: Vmm, destination: Vmm, hop: Hop) -> None:
        destination.wait_runstate("running")
        if not destination.serial.wait_more(LETTERS_AFTER, self.args.timeout):
            raise DemoError(
                f"the guest printed {destination.serial.output()!r} on the destination "
                f"within {self.args.timeout:.0f} s, no more"
            )
        time.sleep(CADENCE_SECONDS)
        hop.silence = silence(source, destination, hop.outcome)

    # --- the proof

    def _prove_guest(self, vmm: Vmm, claim: str) -> None:
        """Every vCPU makes passes, none complains, and nobody started the guest anew."""
        before = vmm.guest_status()
        deadline = time.monotonic() + self.args.timeout
        while True:
            vmm.serial.wait_more(LETTERS_BEFORE, self.args.timeout)
            after = vmm.guest_status()
            self._complain(vmm, [status.complaint for status in after])
            if all(b.passes > a.passes for a, b in zip(before, after, strict=True)):
                break
            if time.monotonic() > deadline:
                raise DemoError(f"{vmm.name}: passes went from {[s.passes for s in before]} to no more on some vCPU")
        output = vmm.serial.output()
        self._complain(vmm, [f"it printed {c!r}: {FAILURES[c]}" for c in failures_in(output)])
        if COLD_START.encode() in output:
            raise DemoError(f"{vmm.name}: the guest was reset instead of resumed")
        self._checked(claim)

    def _complain(self, vmm: Vmm, complaints: list[str]) -> None:
        for cpu, complaint in enumerate(complaints):
            if complaint:
                raise DemoError(f"{vmm.name}: the guest found a fault (vCPU {cpu}): {complaint}")

    def _compare_memory(self, source: Vmm, destination: Vmm) -> None:
        source_digest, destination_digest = source.memory_digest(), destination.memory_digest()
        if source_digest != destination_digest:
            raise DemoError(
                f"guest memory differs: SHA-256 {source_digest[:16]}… on {source.name}, "
                f"{destination_digest[:16]}… on {destination.name}"
            )
        self._checked("guest memory is equal on both stopped ends (all but the page of the host's clock)")

    def _checked(self, claim: str) -> None:
        self._checks[claim] = True
        self.view.say(f"  ✓ {claim}")

    def _tell(self, hop: Hop) -> None:
        facts = hop.as_json()
        say = self.view.say
        say(
            f"  total {facts['total_ms']} ms, downtime {facts['downtime_ms']} ms as the source has it; "
            f"{facts['memory_mb_per_s']} MB/s of guest memory"
        )
        if hop.silence:
            say(
                f"  the guest was silent for {facts['silence_ms']} ms across the switchover (normally it prints "
                f"every {facts['cadence_ms']} ms); longest silence around it {facts['longest_silence_ms']} ms"
            )
        if hop.faults is not None:
            self._tell_faults(hop.faults)
        say(f"  pages: {facts['pages']['normal']} sent whole, {facts['pages']['zero']} as zero")

    def _tell_faults(self, faults: Faults) -> None:
        facts = faults.as_json()
        text = f"  postcopy: {facts['requests']} pages asked for in {facts['seconds']} s"
        if facts["waits"]:
            text += (
                f", {facts['waits']} waits: half within {facts['median_us']} µs, 90 % within {facts['p90_us']} µs, "
                f"99 % within {facts['p99_us']} µs"
            )
        if facts["blocked_ms"] is not None:
            text += f"; all vCPUs waited at once for {facts['blocked_ms']} ms"
        self.view.say(text)


def check_sizes(args: argparse.Namespace) -> None:
    """Refuse figures that no guest can have."""
    room = min(args.memory, LOW_MEMORY_END) - DIRTY_BASE - MIB
    if not 1 <= args.cpus <= 16:
        raise DemoError(f"--cpus {args.cpus}: 1 to 16 are possible")
    if not args.cpus * PAGE_SIZE <= args.dirty <= room:
        raise DemoError(
            f"--dirty {args.dirty} bytes: at least a page per vCPU, and at most {max(room, 0)} bytes fit into "
            f"--memory {args.memory}"
        )
    if args.spin < 0 or args.downtime_limit < 0 or args.timeout <= 0:
        raise DemoError("--spin and --downtime-limit must not be negative, --timeout must be above 0")


def guest_parameters(args: argparse.Namespace) -> GuestParameters:
    """A guest that rewrites `--dirty` bytes; two thirds of the rest hold data, a third was never touched."""
    fill_base = DIRTY_BASE + args.dirty
    pages = args.dirty // PAGE_SIZE
    return GuestParameters(
        dirty_base=DIRTY_BASE,
        dirty_pages=pages,
        print_every=max(1, 10_000 * args.cpus**2 // pages),  # near 1 ms per letter at 100 ns per page
        spin=args.spin,
        fill_base=fill_base,
        fill_pages=(min(args.memory, LOW_MEMORY_END) - fill_base) * 2 // 3 // PAGE_SIZE,
        fill_mode=FILL_HALF_RANDOM,
        flags=ALL_CHECKS,
        cpus=args.cpus,
    )


def silence(source: Vmm, destination: Vmm, outcome: MigrationOutcome) -> dict[str, float]:
    """The downtime as the guest's own output shows it, in milliseconds.

    silence_ms: from the last letter on the source to the first on the destination; cadence_ms: the usual time
    between letters before the migration; longest_silence_ms: the longest one from just before to a second after.
    """
    before = [when for when, _ in source.serial.pieces()]
    after = [when for when, _ in destination.serial.pieces()]
    usual = [b - a for a, b in pairwise(before) if b < outcome.started]
    both = [when for when in before + after if before[-1] - 0.2 <= when <= after[0] + CADENCE_SECONDS]
    return {
        "silence_ms": (after[0] - before[-1]) * 1000,
        "cadence_ms": statistics.median(usual) * 1000,
        "longest_silence_ms": max(b - a for a, b in pairwise(both)) * 1000,
    }
