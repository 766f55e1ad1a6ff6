"""Migrations between processes that have the guest's memory in common, in one file (`x-ignore-shared`)."""

from __future__ import annotations

import mmap

import pytest

from tests.support.pair import Cut, Pair, wait_for

pytestmark = pytest.mark.usefixtures("no_leaks")

SIZE = 4 << 20


def shared_pair(cut: Cut | None = None) -> Pair:
    return Pair(cut=cut, capabilities={"x-ignore-shared": True}, ram_size=SIZE, shared_ram=mmap.mmap(-1, SIZE))


def test_the_guest_moves_and_its_memory_stays_where_it_is() -> None:
    with shared_pair() as pair:
        wait_for(lambda: pair.source.guest.passes > 1, "the guest to warm up")
        pair.migrate()
        assert pair.statuses == ("completed", "completed")
        pair.assert_guest_at("destination")
        assert pair.link.passed[0] < 200 << 10, "hardly more than the devices' state"
        ram = pair.migration.query()["ram"]
        assert (ram["total"], ram["normal"]) == (64 << 10, 0)


@pytest.mark.parametrize("after", [40, 2000])
def test_a_destination_that_fails_leaves_the_memory_alone(after: int) -> None:
    with shared_pair(Cut(after)) as pair:
        pair.migrate()
        assert pair.statuses == ("failed", "failed")
        pair.assert_guest_at("source")
