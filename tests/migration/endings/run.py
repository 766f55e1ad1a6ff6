"""One run: its choices, its end, and that nothing stays behind."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from random import Random

from tests.migration.endings import moments, processes
from tests.support.vmm import Leaks

KINDS: dict[str, Callable[[Random, Path], str]] = {**moments.KINDS, **processes.KINDS}


class Scratch:
    """A directory with a short name, for as long as runs go on."""

    def __enter__(self) -> Path:
        self._path = Path(tempfile.mkdtemp(prefix="qmt-"))
        return self._path

    def __exit__(self, *exception: object) -> None:
        shutil.rmtree(self._path)


def run_one(kind: str, seed: int, number: int, directory: Path) -> str:
    """Run *number* of a kind; how it ended.  AssertionError when anything is not as it should be."""
    leaks, shared_memory = Leaks(), set(os.listdir("/dev/shm"))
    outcome = KINDS[kind](Random(f"{seed} {kind} {number}"), directory)
    leaks.check()
    left = set(os.listdir("/dev/shm")) - shared_memory
    assert not left, f"shared memory left behind: {sorted(left)}"
    return outcome
