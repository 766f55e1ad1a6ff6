"""Fuzz the targets in turn, or choose anew what is kept of what was found; see the package."""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests.fuzz.build import PLACE, build, environment
from tests.fuzz.targets import NAMES, target

CORPUS = Path(__file__).parent / "corpus"
SLICE_S = 30
LONGEST_KEPT = 4096  # bytes
MOST_KEPT = 140  # inputs of one target
LIMITS = ("-timeout=5", "-rss_limit_mb=1500", "-malloc_limit_mb=256", "-max_len=20000", "-print_funcs=0")


@dataclass
class Score:
    """What all slices of one target have come to."""

    seconds: float = 0
    runs: int = 0
    features: int = 0
    inputs: int = 0
    peak_mb: int = 0

    def add(self, output: str, seconds: float) -> None:
        """Add one slice, of which libFuzzer has said *output*."""
        self.seconds += seconds
        self.runs += number(r"stat::number_of_executed_units: *(\d+)", output)
        self.peak_mb = max(self.peak_mb, number(r"stat::peak_rss_mb: *(\d+)", output))
        self.features = number(r"cov: \d+ ft: (\d+)", output)
        self.inputs = number(r"corp: (\d+)", output)

    def __str__(self) -> str:
        return (
            f"{self.seconds:7.0f} s {self.runs:10} runs, {self.features:6} features, "
            f"{self.inputs:5} inputs, at most {self.peak_mb} MB"
        )


def number(pattern: str, output: str) -> int:
    """The last number that *pattern* finds."""
    found: list[str] = re.findall(pattern, output)
    return int(found[-1]) if found else 0


def engine(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.fuzz.engine", name, *arguments]
    return subprocess.run(
        command, cwd=PLACE, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def found_place(name: str) -> Path:
    """The folder of all that was found for *name*, with what there is to begin with."""
    place = PLACE / "found" / name
    place.mkdir(parents=True, exist_ok=True)
    for seed in target(name).seeds():
        path = place / hashlib.sha1(seed).hexdigest()
        if not path.exists():
            path.write_bytes(seed)
    return place


def fuzz(name: str, seconds: int, score: Score) -> bool:
    """One slice; False when it ended with a finding."""
    faults = PLACE / "faults" / name
    faults.mkdir(parents=True, exist_ok=True)
    kept = [str(CORPUS / name)] if (CORPUS / name).is_dir() else []
    options = [*LIMITS, f"-max_total_time={seconds}", "-print_final_stats=1", f"-artifact_prefix={faults}/"]
    began = time.monotonic()
    done = engine(name, *options, str(found_place(name)), *kept)
    score.add(done.stdout, time.monotonic() - began)
    print(f"{name:10} {score}", flush=True)
    if done.returncode:
        print(done.stdout[-8000:], file=sys.stderr)
    return done.returncode == 0


def fuzz_all(names: list[str], seconds: int) -> int:
    scores = {name: Score() for name in names}
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 1:
        for name in names:
            if not fuzz(name, max(1, int(min(SLICE_S, left / len(names)))), scores[name]):
                return 1
    print(f"together   {sum(s.seconds for s in scores.values()):7.0f} s {sum(s.runs for s in scores.values()):10} runs")
    return 0


def keep(name: str) -> None:
    """Let corpus/ hold a small choice of what was found that reaches what small inputs reach; faults stay."""
    kept = CORPUS / name
    kept.mkdir(parents=True, exist_ok=True)
    known = {path.read_bytes() for place in (found_place(name), kept) for path in place.iterdir()}
    chosen = cover(name, sorted((data for data in known if len(data) < LONGEST_KEPT), key=lambda data: (len(data), data)))
    for path in kept.iterdir():
        if not path.name.startswith("fault-"):
            path.unlink()
    for data in chosen:
        (kept / hashlib.sha1(data).hexdigest()[:16]).write_bytes(data)
    sizes = [path.stat().st_size for path in kept.iterdir()]
    print(f"{name:10} {len(sizes)} inputs of {sum(sizes)} bytes are kept")


def cover(name: str, inputs: list[bytes]) -> list[bytes]:
    """Of *inputs* some that reach what they reach together: again and again the one that adds most for its length."""
    reached = features_of(name, inputs)
    missing: set[str] = set().union(*reached)
    chosen: list[bytes] = []
    while missing and len(chosen) < MOST_KEPT:
        best = max(range(len(inputs)), key=lambda n: len(reached[n] & missing) / (len(inputs[n]) + 64))
        chosen.append(inputs[best])
        missing -= reached[best]
    return chosen


def features_of(name: str, inputs: list[bytes]) -> list[set[str]]:
    """What each input reaches, as libFuzzer counts it: places in the code, and about how often."""
    with tempfile.TemporaryDirectory() as scratch:
        paths = [Path(scratch) / str(index) for index in range(len(inputs))]
        for path, data in zip(paths, inputs, strict=True):
            path.write_bytes(data)
        control = Path(scratch) / "control"
        control.write_text("\n".join([str(len(paths)), "0", *map(str, paths), ""]))
        done = engine(name, *LIMITS, "-merge_inner=1", f"-merge_control_file={control}")
        if done.returncode:
            raise SystemExit(done.stdout[-8000:])
        reached: list[set[str]] = [set() for _ in inputs]
        for line in control.read_text().splitlines():
            word, *numbers = line.split()
            if word == "FT":
                reached[int(numbers[0])] |= set(numbers[1:])
    return reached


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="target", help=f"of {', '.join(NAMES)} (default: all)")
    parser.add_argument("--seconds", type=int, default=60, help="how long, all targets together")
    parser.add_argument("--keep", action="store_true", help="do not fuzz: choose anew what is kept in corpus/")
    arguments = parser.parse_args()
    names = arguments.targets or list(NAMES)
    if unknown := set(names) - set(NAMES):
        parser.error(f"no such target: {', '.join(sorted(unknown))}")
    build()
    if not arguments.keep:
        return fuzz_all(names, arguments.seconds)
    for name in names:
        keep(name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
