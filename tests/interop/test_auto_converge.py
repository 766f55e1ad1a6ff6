"""auto-converge: a guest that writes faster than it is sent loses time, and has all of it again there (convergence.md)."""

from __future__ import annotations

import pytest

from qemumig.cli.guest import ALL_CHECKS
from tests.support.host import qemumig_system
from tests.support.vmm import MIB, GuestParameters, Stage, listen, thread_names, wait_until, with_capabilities

pytestmark = pytest.mark.usefixtures("no_leaks")

WRITING = GuestParameters(dirty_pages=8192, print_every=10, flags=ALL_CHECKS, cpus=2)


def test_a_guest_that_is_too_fast_is_held_back_and_arrives(stage: Stage, qemu: str) -> None:
    source = stage.vmm("source", qemumig_system(), guest=WRITING, memory=96 * MIB)
    destination = stage.vmm("destination", qemu, memory=96 * MIB, incoming=True)
    with_capabilities([source], **{"auto-converge": True})
    source.command(
        "migrate-set-parameters", max_bandwidth=48 * MIB, downtime_limit=1, cpu_throttle_initial=60, max_cpu_throttle=60
    )
    source.command("migrate", uri=listen(destination))
    wait_until(lambda: "cpu-throttle-percentage" in source.command("query-migrate"), "the guest to be held back", 60)
    report = source.command("query-migrate")
    assert report["cpu-throttle-percentage"] == 60
    assert report["ram"]["dirty-pages-rate"] > 0
    assert "throttle" in thread_names(source.process.pid)
    source.command("migrate-set-parameters", max_bandwidth=0, downtime_limit=2000)
    wait_until(lambda: source.command("query-migrate")["status"] == "completed", "the migration to complete", 60)
    assert "cpu-throttle-percentage" not in source.command("query-migrate")
    assert "throttle" not in thread_names(source.process.pid)
    destination.wait_runstate("running")
    stage.assert_guest_is_well(destination)
