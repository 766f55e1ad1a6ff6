"""One of the two processes of a migration goes away at some moment; `python -m tests.migration.endings` does many."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.migration.endings.processes import KINDS
from tests.migration.endings.run import run_one

pytestmark = pytest.mark.needs("kvm")


@pytest.mark.parametrize("seed", [20, 21])
@pytest.mark.parametrize("kind", KINDS)
def test_the_guest_is_with_whoever_has_it(kind: str, seed: int, directory: Path) -> None:
    run_one(kind, seed, 0, directory)
