"""A handful of migrations of each kind that end at a random moment; `python -m tests.migration.endings` does many."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.migration.endings.moments import KINDS
from tests.migration.endings.run import run_one

SEED, RUNS = 20, 4


@pytest.mark.parametrize("kind", KINDS)
def test_the_guest_is_where_it_was_promised_to_be(kind: str, tmp_path: Path) -> None:
    for number in range(RUNS):
        run_one(kind, SEED, number, tmp_path)
