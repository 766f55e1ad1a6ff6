"""Migrate running guests between qemumig-system and real QEMUs, both ways, and check that they arrive well.

The guest's checks are all on: pages, FPU, privileged registers, paravirtual clock, timer interrupts.  Every cell of
the matrix is two migrations: one whose guest runs on, and one that is held on arrival (-S), so that the memory of both
ends can be compared.  "ok 31/3 ms" is total time and downtime of the first, as the source has them.  No bandwidth limit.
Exit status 0 when everything held, 1 when anything failed.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from qemumig.cli.demo import DemoError
from qemumig.cli.interrupts import Interrupted, Interrupts
from qemumig.cli.vmm import VmmError

from .guests import CHECKING, DIRTYING
from .journey import random_trial, run_hops, run_random
from .matrix import Cell, columns, rows, run_matrix
from .peers import Peer, named_qemus, ours
from .report import as_json, footnotes, markdown, table
from .transports import WAYS
from .trial import Rules


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tools/interop", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--system", metavar="COMMAND", help="our VMM (default: the qemumig-system of this checkout)")
    add("--qemu", action="append", metavar="COMMAND", help="a QEMU, repeatable ($QEMU_SYSTEM_X86_64, then PATH)")
    add("--quick", action="store_true", help="a few rows only, some seconds each")
    add("--transport", action="append", choices=WAYS, help="only rows with this transport, repeatable")
    add("--cpus", action="append", type=int, metavar="N", help="only rows with that many vCPUs, repeatable")
    add("--memory", action="append", type=int, metavar="MIB", help="only rows with that much memory, repeatable")
    add("--guest", choices=(CHECKING, DIRTYING), help="only rows with this guest: modest, or as fast as it can")
    add("--control", action="store_true", help="also QEMU to QEMU: tells a fault of ours from one of the stage")
    add("--hops", type=int, metavar="N", help="instead: one guest, N hops qemumig → QEMU → qemumig …")
    add("--random", type=int, metavar="N", help="instead: N migrations, each with a machine and a guest of its own")
    add("--seed", type=int, default=0, metavar="S", help="of --random; migration I is the first of seed S + I")
    add("--multifd", action="store_true", help="with --random: all by multifd, with options by chance")
    add("--downtime-limit", type=int, default=300, metavar="MS", help="the same for all (default 300)")
    add("--timeout", type=float, default=120, metavar="S", help="give a migration up after that long (default 120)")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print one JSON object, and nothing else")
    output.add_argument("--markdown", action="store_true", help="print the table for a document")
    args = parser.parse_args()
    if any(number is not None and number < 1 for number in (args.hops, args.random)) or args.timeout <= 0:
        parser.error("--hops, --random and --timeout must be above 0")
    if args.multifd and not args.random:
        parser.error("--multifd goes with --random")
    if args.downtime_limit < 0 or args.seed < 0:
        parser.error("--downtime-limit and --seed must not be negative")
    return args


def say(text: str) -> None:
    """Progress goes beside the result."""
    print(text, file=sys.stderr, flush=True)


def run(args: argparse.Namespace, rules: Rules) -> dict[str, Any]:
    """Do what was asked for; returns what came out, `ok` among it."""
    system, qemus = ours(args.system), named_qemus(args.qemu)
    found: dict[str, Any] = {"system": system.command, "qemus": {qemu.name: qemu.command for qemu in qemus}}
    if args.hops:
        run_hops(rules, system, qemus, args.hops, say)
        return found | {"ok": True, "hops": args.hops}
    if args.random:
        seeds = range(args.seed, args.seed + args.random)
        trials = [random_trial(seed, system, qemus, multifd=args.multifd) for seed in seeds]
        failures = run_random(rules, trials, say)
        return found | {"ok": not failures, "migrations": len(trials), "seed": args.seed, "failures": failures}
    cells = matrix(args, rules, system, qemus)
    return found | {"ok": all(cell.result != "failed" for cell in cells), "cells": cells}


def matrix(args: argparse.Namespace, rules: Rules, system: Peer, qemus: list[Peer]) -> list[Cell]:
    wanted = [
        row
        for row in rows(args.quick)
        if (not args.transport or row.transport in args.transport)
        and (not args.cpus or row.cpus in args.cpus)
        and (not args.memory or row.memory >> 20 in args.memory)
        and args.guest in (None, row.kind)
    ]
    across = columns(system, qemus, control=args.control)
    if not wanted:
        raise VmmError("no row of the matrix is like that: see --transport, --cpus, --memory, --guest and --quick")
    count = iter(range(1, len(wanted) * len(across) + 1))

    def progress(cell: Cell) -> None:
        told = cell.error or f"{cell.total_ms} ms"
        say(f"{next(count)}/{len(wanted) * len(across)} {cell.row}, {cell.column}: {cell.result}, {told}")

    return run_matrix(rules, wanted, across, progress)


def show(args: argparse.Namespace, found: dict[str, Any]) -> None:
    """Print the result in the form that was asked for."""
    cells: list[Cell] | None = found.pop("cells", None)
    if args.json:
        print(json.dumps(found | ({"rows": as_json(cells)} if cells is not None else {}), indent=2))
    elif cells is None:
        print("\n".join([*found.get("failures", []), "everything held" if found["ok"] else "not everything held"]))
    elif args.markdown:
        print(markdown(cells))
    else:
        print("\n".join([table(cells), *footnotes(cells)]))


def main() -> int:
    args = arguments()
    with Interrupts() as interrupts:
        try:
            found = run(args, Rules(interrupts, args.downtime_limit, args.timeout))
        except (DemoError, VmmError) as error:
            say(f"tools/interop: {error}")
            return 1
        except Interrupted as error:
            say(f"tools/interop: interrupted by {error}")
            return 128 + error.signum
    show(args, found)
    return 0 if found["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
