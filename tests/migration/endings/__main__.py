"""The batch runner; see the package."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter

from tests.migration.endings.run import KINDS, Scratch, run_one


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.migration.endings", description="Migrations that end at random moments."
    )
    parser.add_argument("--runs", type=int, default=100, help="how many of each kind (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="chooses the moments (default: %(default)s)")
    parser.add_argument("--kind", action="append", choices=sorted(KINDS), help="only these kinds; may be repeated")
    parser.add_argument("--only", type=int, help="the number of a single run")
    arguments = parser.parse_args()
    failures = 0
    for kind in arguments.kind or KINDS:
        failures += run_kind(kind, arguments.seed, range(arguments.runs) if arguments.only is None else [arguments.only])
    return 1 if failures else 0


def run_kind(kind: str, seed: int, numbers: range | list[int]) -> int:
    """All runs of one kind and a line about them; how many went wrong."""
    outcomes: Counter[str] = Counter()
    failures = 0
    start = time.monotonic()
    with Scratch() as directory:
        for number in numbers:
            try:
                outcomes[run_one(kind, seed, number, directory)] += 1
            except Exception as error:
                failures += 1
                print(f"{kind}: run {number} of seed {seed}: {type(error).__name__}: {error}", file=sys.stderr)
    told = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common())
    seconds = time.monotonic() - start
    print(f"{kind:24} {len(numbers)} runs in {seconds:.0f} s, {failures} went wrong: {told}", flush=True)
    return failures


if __name__ == "__main__":
    sys.exit(main())
