"""Rounds made of `query-migrate` answers, and how they are shown."""

from __future__ import annotations

import io
from typing import Any

from qemumig.cli.estimate import Estimate
from qemumig.cli.progress import Rounds, Sample, View, size


def report(
    syncs: int, sent: int, remaining: int, status: str = "active", mbps: float = 800.0, dirty: int = 1000
) -> dict[str, Any]:
    return {
        "status": status,
        "ram": {
            "dirty-sync-count": syncs, "transferred": sent, "remaining": remaining, "mbps": mbps,
            "dirty-pages-rate": dirty, "page-size": 4096, "total": 1 << 30,
        },
    }  # fmt: skip


def test_answer_without_ram_gives_nothing() -> None:
    assert Rounds().add({"status": "setup"}) == (None, None)


def test_sample_has_rates_in_bytes_per_second() -> None:
    sample, ended = Rounds().add(report(1, 10, 5))
    assert sample == Sample(1, 5, 100e6, 4096000, 1 << 30, Estimate())
    assert ended is None


def test_new_bitmap_sync_ends_a_round() -> None:
    rounds = Rounds()
    assert rounds.add(report(1, 100, 900))[1] is None
    assert rounds.add(report(1, 700, 300))[1] is None
    ended = rounds.add(report(2, 1000, 50))[1]
    assert ended is not None
    assert (ended.number, ended.sent, ended.remaining) == (1, 1000, 50)


def test_dirty_rate_is_seen_at_the_end_of_a_round_before_the_vmm_has_one() -> None:
    rounds = Rounds()
    rounds.add(report(1, 100, 900, dirty=0))
    ended = rounds.add(report(2, 1000, 500, dirty=0))[1]
    sample = rounds.add(report(2, 1100, 400, dirty=0))[0]
    assert ended is not None
    assert sample is not None
    assert ended.dirty_rate == sample.dirty_rate == 500 / ended.seconds


def test_completion_ends_the_last_round_once() -> None:
    rounds = Rounds()
    rounds.add(report(1, 100, 900))
    rounds.add(report(3, 9_000_000, 0, "completed"))
    rounds.add(report(3, 9_020_000, 0, "completed"))
    assert [done.number for done in rounds.finished] == [1]


def test_plain_view_writes_one_line_per_round() -> None:
    out = io.StringIO()
    view, rounds = View(out), Rounds()
    view.begin("a → b")
    for answer in (report(1, 100, 900), report(2, 1_500_000_000, 50), report(3, 1_600_000_000, 0, "completed")):
        _, ended = rounds.add(answer)
        if ended:
            view.row(ended)
    lines = out.getvalue().splitlines()
    assert lines[0] == "a → b"
    assert [line.split()[0] for line in lines[2:]] == ["1", "2"]
    assert "1.50 GB" in lines[2]


def test_sizes_read_well() -> None:
    assert (size(1_500_000_000), size(2_340_000)) == ("1.50 GB", "2.3 MB")
