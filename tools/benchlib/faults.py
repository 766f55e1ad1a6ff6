"""Page faults of postcopy: `tools/bench --faults`.

A guest that touches all of its memory at random moves with `postcopy-preempt` as soon as it can, without a limit for the
rest.  It counts itself how long each touch took.  As many of the longest at the destination are taken as pages were asked
for: what the guest waited for.  Measured in the same way for everybody:

    wait          half, and 99 of 100, of those waits took no longer
    all there     from the destination's RESUME to its `completed`
    gap           from the last letter that the guest printed at the source to the first at the destination: one a ms
"""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from qemumig.cli.interrupts import Interrupts
from qemumig.cli.vmm import FINAL, MachineShape, Vmm, VmmError, listen, with_capabilities

from . import toucher
from .measure import Contestant
from .process import warm_memory

START_TIMEOUT = 120.0
LETTERS = 20
CYCLES_A_LETTER = 2_500_000  # about a millisecond
SLOW_PRECOPY = 8 << 20  # bytes per second
SPARE = 256 << 20  # for everything beside the guest's memory
HEADINGS = {
    "median_us": "wait: median us",
    "p99_us": "99th us",
    "all_there_ms": "all there ms",
    "gap_ms": "gap ms",
    "requests": "pages asked for",
}
SHARED = {"median_us": "ours of it: median", "p99_us": "99th", "all_there_ms": "all there", "gap_ms": "gap"}


@dataclass(frozen=True)
class Run:
    """Figures of one migration."""

    median_us: float
    p99_us: float
    all_there_ms: float
    gap_ms: float
    requests: int


def measure(entered: list[Contestant], memory: int, repeat: int, interrupts: Interrupts) -> dict[str, Any]:
    """All runs, in turns."""
    runs: dict[str, list[Run]] = {each.name: [] for each in entered}
    for turn in range(1, repeat + 1):
        for each in entered:
            run = migrate(each, memory, interrupts)
            runs[each.name].append(run)
            told = f"{run.median_us:.0f} us, 99th {run.p99_us:.0f} us, all there after {run.all_there_ms:.0f} ms"
            print(f"faults {turn}/{repeat}  {each.name}: {told}", file=sys.stderr, flush=True)
    return {name: summary(done) for name, done in runs.items()}


def summary(runs: list[Run]) -> dict[str, Any]:
    """Median, min and max of every figure, and the runs themselves."""
    found: dict[str, Any] = {}
    for name in HEADINGS:
        values = [getattr(run, name) for run in runs]
        found[name] = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return found | {"runs": [asdict(run) for run in runs]}


def migrate(contestant: Contestant, memory: int, interrupts: Interrupts) -> Run:
    """Start both ends, migrate, measure, and make sure that no touch was lost."""
    with ExitStack() as owned:
        with interrupts.held():
            directory = Path(tempfile.mkdtemp(prefix="qemumig-bench-"))
            owned.callback(shutil.rmtree, directory, ignore_errors=True)
        guest = directory / "guest.bin"
        guest.write_bytes(toucher.image(memory, CYCLES_A_LETTER))
        shape = MachineShape(memory, 1, guest)
        ends = []
        for name in ("source", "destination"):
            with interrupts.held():
                vmm = Vmm(name, contestant.command, directory, shape, incoming=name == "destination")
                owned.callback(vmm.close)
            vmm.connect()
            with_capabilities([vmm], events=True, postcopy_ram=True, postcopy_preempt=True)
            ends.append(vmm)
        return _run(ends[0], ends[1], memory)


def _run(source: Vmm, destination: Vmm, memory: int) -> Run:
    _wait_touched(source, memory)
    rate = toucher.cycles_a_second(source)
    warm_memory(memory + SPARE)  # now: a host may take back within seconds what nobody uses
    source.command("migrate-set-parameters", max_bandwidth=SLOW_PRECOPY, max_postcopy_bandwidth=0)
    source.command("migrate", uri=listen(destination))
    while not source.command("query-migrate").get("ram", {}).get("transferred"):
        time.sleep(0.01)
    source.command("migrate-start-postcopy")
    while (status := source.wait_event("MIGRATION", START_TIMEOUT)["data"]["status"]) not in FINAL:
        pass
    if status != "completed":
        raise VmmError(f"the migration {status}: {source.command('query-migrate').get('error-desc')}")
    resumed = destination.wait_event("RESUME", START_TIMEOUT)
    completed = destination.wait_event("MIGRATION", START_TIMEOUT, status="completed")
    if not destination.serial.wait_more(LETTERS, START_TIMEOUT):
        raise VmmError(f"the guest is silent on the destination: {destination.serial.output()!r}")
    waits = toucher.touches(destination).since(toucher.touches(source))
    requests = source.command("query-migrate")["ram"]["postcopy-requests"]
    waits = toucher.longest(waits, requests)
    destination.command("stop")
    toucher.check(destination, memory)
    return Run(
        median_us=toucher.percentile(waits, 0.5) / rate * 1e6,
        p99_us=toucher.percentile(waits, 0.99) / rate * 1e6,
        all_there_ms=(_seconds(completed) - _seconds(resumed)) * 1000,
        gap_ms=(destination.serial.pieces()[0][0] - source.serial.pieces()[-1][0]) * 1000,
        requests=requests,
    )


def _wait_touched(source: Vmm, memory: int) -> None:
    """Until every page was touched, some of them twice: what is measured is no first touch."""
    deadline = time.monotonic() + START_TIMEOUT
    while toucher.touches(source).count < (memory - toucher.BASE) // toucher.PAGE_SIZE * 2:
        if time.monotonic() > deadline:
            raise VmmError(f"{source.name}: the guest has not touched all of its memory in {START_TIMEOUT:.0f} s")
        time.sleep(0.1)


def _seconds(event: dict[str, Any]) -> float:
    stamp = event["timestamp"]
    return float(stamp["seconds"]) + float(stamp["microseconds"]) / 1e6


def table(results: dict[str, Any], ours: str) -> str:
    """A line per contestant, medians with (lowest..highest), and what ours is of each."""
    rows = [["", *HEADINGS.values(), *SHARED.values()]]
    for name, result in results.items():
        cells = [_cell(result[figure]) for figure in HEADINGS]
        shares = [_share(results[ours][each], result[each]) if ours in results and name != ours else "-" for each in SHARED]
        rows.append([name, *cells, *shares])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def _share(ours: dict[str, float], other: dict[str, float]) -> str:
    return f"{ours['median'] / other['median']:.2f}" if other["median"] else "-"


def _cell(figure: dict[str, float]) -> str:
    if figure["min"] == figure["max"]:
        return f"{figure['median']:.0f}"
    return f"{figure['median']:.0f} ({figure['min']:.0f}..{figure['max']:.0f})"


assert list(HEADINGS) == [field.name for field in fields(Run)]
