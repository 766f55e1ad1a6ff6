"""Measure qemumig-system against real QEMUs and a bare socket, in one run on one machine.

Every contestant stands on both ends, with the same guest, the same memory and TCP on loopback (or a file), without a
bandwidth limit; they take turns (A B C A B C …), so that a noisy machine is noisy for all; who lacks what a workload asks
for is left out.  Medians with (lowest to highest).
"MB/s" is guest memory by the time from `migrate` to the source's `completed`; "silence" is what the guest's own output
shows of the downtime; CPU is without the vCPU threads.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from qemumig.cli.demo import DemoError, default_system, memory_size
from qemumig.cli.interrupts import Interrupted, Interrupts
from qemumig.cli.vmm import LOW_MEMORY_END, VmmError

from . import faults
from .measure import Bench, Contestant, Lacks, Run, summary
from .plot import svg
from .report import bare_name, ratios, table
from .workloads import WORKLOADS, Workload

OURS = "qemumig"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tools/bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ", ".join(f"{workload.name} ({workload.what})" for workload in WORKLOADS)
    add = parser.add_argument
    add("--system", metavar="COMMAND", help="our VMM (default: the qemumig-system of this checkout)")
    add("--no-system", action="store_true", help="measure only the others")
    add("--qemu", action="append", metavar="COMMAND", help="a QEMU, repeatable ($QEMU_SYSTEM_X86_64, then PATH)")
    add("--workload", action="append", choices=[w.name for w in WORKLOADS], help=f"repeatable; there are {names}")
    add("--faults", action="store_true", help="measure page faults of postcopy instead of a workload")
    add("--memory", type=memory_size, default="1G", metavar="SIZE", help="guest memory, at most 3G (default 1G)")
    add("--cpus", type=int, default=1, metavar="N", help="virtual CPUs (default 1; xbzrle: at least 4)")
    add("--repeat", type=int, default=5, metavar="N", help="runs of each contestant and workload (default 5)")
    add("--downtime-limit", type=int, default=300, metavar="MS", help="the same for all (default 300)")
    add("--timeout", type=float, default=120, metavar="S", help="a migration that takes longer ends the bench (120)")
    add(
        "--files",
        type=Path,
        metavar="DIRECTORY",
        help="where guests are saved (default: where temporary files go); in memory (/dev/shm) no disk is measured",
    )
    add("--json", type=Path, metavar="FILE", help="also write all figures of all runs there")
    add("--plot", type=Path, metavar="FILE.svg", help="also draw the figures there")
    add(
        "--from",
        type=Path,
        dest="former",
        metavar="FILE",
        help="measure nothing: tables and --plot of a former run's --json",
    )
    args = parser.parse_args()
    if args.plot and args.plot.suffix != ".svg":
        parser.error(f"--plot {args.plot}: the name of an .svg file is expected")
    if not 64 << 20 <= args.memory <= LOW_MEMORY_END or not 1 <= args.cpus <= 16 or args.repeat < 1:
        parser.error("--memory is 64M to 3G, --cpus 1 to 16, --repeat at least 1")
    return args


def contestants(args: argparse.Namespace) -> list[Contestant]:
    """Ours first, then every QEMU, named after its version."""
    found = [] if args.no_system else [Contestant(OURS, args.system or default_system())]
    named = args.qemu or [path for path in os.environ.get("QEMU_SYSTEM_X86_64", "").split(":") if path]
    if not named and (on_path := shutil.which("qemu-system-x86_64")):
        named = [on_path]
    found += [Contestant(f"QEMU {version(command)}", command) for command in named]
    if not found:
        raise VmmError("there is nothing to measure: --qemu or $QEMU_SYSTEM_X86_64 names a QEMU")
    return found


def version(command: str) -> str:
    """What the program calls its version."""
    try:
        told = subprocess.run([*shlex.split(command), "-version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise VmmError(f"{command} does not tell its version: {error}") from error
    return told.stdout.partition("version ")[2].split()[0]


def measure_workload(bench: Bench, workload: Workload, entered: list[Contestant], repeat: int) -> dict[str, Any]:
    """All runs of one workload, in turns."""
    runs: dict[str, list[Run]] = {each.name: [] for each in entered}
    if workload.data_bound:
        bare = bare_name(workload)
        runs[bare] = []
    for turn in range(1, repeat + 1):
        for each in [each for each in entered if each.name in runs]:
            try:
                run = bench.migrate(each, workload)
            except Lacks as reason:
                print(f"{workload.name}: {each.name} is left out: {reason}", file=sys.stderr, flush=True)
                del runs[each.name]
                continue
            progress(workload, turn, repeat, each.name, run)
            runs[each.name].append(run)
        if workload.data_bound:
            progress(workload, turn, repeat, bare, run := bench.bare(entered[-1], workload))
            runs[bare].append(run)
    results = {name: summary(done) for name, done in runs.items()}
    ratios(results, OURS)
    return results


def progress(workload: Workload, turn: int, repeat: int, name: str, run: Run) -> None:
    took = "" if run.total_ms is None else f", {run.total_ms:.0f} ms"
    print(f"{workload.name} {turn}/{repeat}  {name}: {run.rate:.0f} MB/s{took}", file=sys.stderr, flush=True)


def host() -> dict[str, Any]:
    """What the figures were taken on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else "",
        "cpus": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def heading(workload: str, found: dict[str, Any]) -> str:
    """What stands above a workload's table."""
    what = next((known.what for known in WORKLOADS if known.name == workload), "")
    return f"{workload}: {what}, {found['memory'] >> 20} MiB"


def former_run(path: Path) -> dict[str, Any]:
    """What an earlier bench wrote with --json; VmmError when it did not."""
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        tables = [table(heading(name, found), results) for name, results in found["workloads"].items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise VmmError(f"{path} is nothing that --json wrote: {error!r}") from error
    for each in tables:
        print(each, flush=True)
    return found


def keep(args: argparse.Namespace, found: dict[str, Any]) -> None:
    """Write what was found where it is wanted."""
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")
    if args.plot:
        args.plot.write_text(svg(found))


def main() -> int:
    args = arguments()
    try:
        if args.faults:
            return measure_faults(args)
        if args.former is None:
            return measure(args)
        keep(args, former_run(args.former))
    except (DemoError, VmmError, OSError) as error:
        print(f"tools/bench: {error}", file=sys.stderr)
        return 1
    return 0


def measure_faults(args: argparse.Namespace) -> int:
    """What the guest waits for in postcopy; the exit status."""
    found: dict[str, Any] = {"host": host(), "memory": args.memory, "repeat": args.repeat}
    with Interrupts() as interrupts:
        try:
            found["faults"] = faults.measure(contestants(args), args.memory, args.repeat, interrupts)
        except Interrupted as error:
            print(f"tools/bench: interrupted by {error}", file=sys.stderr)
            return 128 + error.signum
    print(faults.table(found["faults"], OURS), flush=True)
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0


def measure(args: argparse.Namespace) -> int:
    """Measure everything that is asked for; the exit status."""
    wanted = [w for w in WORKLOADS if not args.workload or w.name in args.workload]
    found: dict[str, Any] = {"host": host(), "memory": args.memory, "cpus": args.cpus, "repeat": args.repeat}
    found |= {"downtime_limit_ms": args.downtime_limit, "workloads": {}}
    with Interrupts() as interrupts:
        try:
            entered = contestants(args)
            found["contestants"] = {each.name: each.command for each in entered}
            bench = Bench(args.memory, args.cpus, args.downtime_limit, args.timeout, interrupts, args.files)
            for workload in wanted:
                results = measure_workload(bench, workload, entered, args.repeat)
                found["workloads"][workload.name] = results
                print(table(heading(workload.name, found), results), flush=True)
        except Interrupted as error:
            print(f"tools/bench: interrupted by {error}", file=sys.stderr)
            return 128 + error.signum
    keep(args, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
