"""The process in which one target is fuzzed, by libFuzzer by way of atheris; started by __main__, see build.environment.

python -m tests.fuzz.engine TARGET [libFuzzer's options and folders]
"""

from __future__ import annotations

import sys

import atheris  # type: ignore[import-not-found,import-untyped,unused-ignore]

from tests.fuzz.oracle import Leftovers, is_sanitized
from tests.fuzz.targets import target

RUNS_BETWEEN_LOOKS = 500  # at threads and descriptors


def main() -> None:
    name, *arguments = sys.argv[1:]
    with atheris.instrument_imports(include=["qemumig"]):
        run = target(name).run
    if not is_sanitized():
        raise SystemExit("this process has no AddressSanitizer: start it by `python -m tests.fuzz`")
    leftovers: Leftovers | None = None
    runs = 0

    def run_one(data: bytes) -> None:
        nonlocal leftovers, runs
        run(data)
        runs += 1
        if leftovers is None:
            leftovers = Leftovers()
        elif runs % RUNS_BETWEEN_LOOKS == 0:
            leftovers.check()

    atheris.Setup([name, *arguments], run_one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
