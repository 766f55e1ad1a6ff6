"""query-migrate of a source: the members that a real QEMU shows, while it sends and when it is done (ram.md §12)."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.host import qemumig_system
from tests.support.vmm import MIB, GuestParameters, Stage, Vmm, wait_until, with_capabilities

pytestmark = pytest.mark.usefixtures("no_leaks")

REMOVED = {"skipped"}  # in QEMU until 9.0, always 0
ADDED = {"remaining"}  # beside `ram`, in QEMU 11
WRITING = GuestParameters(dirty_pages=4096, print_every=10)


def reports(source: Vmm) -> tuple[dict[str, Any], dict[str, Any]]:
    """One of a migration that goes on, one of the same when it is done."""
    with_capabilities([source], **{"auto-converge": True})
    source.command(
        "migrate-set-parameters", max_bandwidth=16 * MIB, downtime_limit=1, cpu_throttle_initial=50, max_cpu_throttle=50
    )
    source.command("migrate", uri="exec:cat > /dev/null")
    wait_until(lambda: "cpu-throttle-percentage" in source.command("query-migrate"), "the guest to be held back", 60)
    active = source.command("query-migrate")
    source.command("migrate-set-parameters", max_bandwidth=0, downtime_limit=2000)
    wait_until(lambda: source.command("query-migrate")["status"] == "completed", "the migration to complete", 60)
    return active, source.command("query-migrate")


def members(report: dict[str, Any]) -> set[str]:
    return (set(report) - ADDED) | {f"ram.{name}" for name in set(report["ram"]) - REMOVED}


def test_the_members_are_a_qemu_s_and_agree_with_each_other(stage: Stage, qemu: str) -> None:
    ours = reports(stage.vmm("ours", qemumig_system(), guest=WRITING, memory=64 * MIB))
    theirs = reports(stage.vmm("theirs", qemu, memory=64 * MIB))
    for one, other in zip(ours, theirs, strict=True):
        assert members(one) == members(other)
        assert one["status"] == other["status"]
        assert one["ram"]["total"] == other["ram"]["total"]
    for active, completed in (ours, theirs):
        assert active["ram"]["remaining"] > 0 == completed["ram"]["remaining"]
        assert active["ram"]["dirty-pages-rate"] > 0 == completed["ram"]["dirty-pages-rate"]
        assert active["cpu-throttle-percentage"] == 50
        assert active["ram"]["pages-per-second"] > 0
        assert completed["ram"]["normal-bytes"] == completed["ram"]["normal"] * 4096
        moving_ms = completed["total-time"] - completed["setup-time"]
        assert completed["ram"]["mbps"] == pytest.approx(completed["ram"]["transferred"] * 8 / moving_ms / 1000, rel=0.05)
    active, completed = ours
    assert active["expected-downtime"] > 1  # at this bandwidth, and far from the limit
    assert completed["ram"]["transferred"] == completed["ram"]["precopy-bytes"] + completed["ram"]["downtime-bytes"]
