"""One of the two processes of a migration goes away at some moment; `python -m tests.migration.endings` does many.

In postcopy `python -m tests.migration.kills` does.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.migration import kills
from tests.migration.endings.processes import KINDS
from tests.migration.endings.run import run_one

DESTINATION_KILLED, SOURCE_KILLED = 5, 3  # runs in which the guest is at the destination by then

pytestmark = pytest.mark.needs("kvm")


@pytest.mark.parametrize("seed", [20, 21])
@pytest.mark.parametrize("kind", KINDS)
def test_the_guest_is_with_whoever_has_it(kind: str, seed: int, directory: Path) -> None:
    run_one(kind, seed, 0, directory)


@pytest.mark.needs("userfaultfd")
@pytest.mark.parametrize("number", [DESTINATION_KILLED, SOURCE_KILLED])
def test_who_is_left_in_postcopy_says_what_became_of_the_guest(number: int, directory: Path) -> None:
    kills.run_one(20, number, directory, None)
