"""Background snapshots: a guest that runs on, and a stream of what it was at one instant, which loads here and in QEMU."""

from __future__ import annotations

import os

import pytest

from qemumig.cli.guest import ALL_CHECKS, FILL_RANDOM
from qemumig.cli.vmm import VmmError
from tests.support.host import qemumig_system
from tests.support.postcopy import wait_status
from tests.support.vmm import MIB, GuestParameters, Stage, Vmm, thread_names, wait_until, with_capabilities

pytestmark = pytest.mark.needs("kvm", "userfaultfd")

GUEST = GuestParameters(dirty_pages=8192, print_every=5, fill_pages=2048, fill_mode=FILL_RANDOM, flags=ALL_CHECKS, cpus=2)


def snapshot(stage: Stage) -> tuple[Vmm, str]:
    """A running guest that writes to half of its memory, and a file with a snapshot of it."""
    source = stage.vmm("source", qemumig_system(), guest=GUEST, memory=64 * MIB)
    with_capabilities([source], background_snapshot=True, events=True)
    path = f"{stage.directory}/snapshot"
    source.command("migrate", uri=f"exec:cat >{path}")
    wait_status(source, "completed")
    stage.assert_guest_is_well(source, arrived=False)
    return source, path


def assert_it_loads(stage: Stage, system: str, path: str) -> None:
    destination = stage.vmm("destination", system, memory=64 * MIB, incoming=True)
    destination.command("migrate-incoming", uri=f"exec:cat {path}")
    destination.wait_runstate("running")
    stage.assert_guest_is_well(destination)


def test_the_guest_runs_on_and_the_file_loads(stage: Stage) -> None:
    source, path = snapshot(stage)
    report = source.command("query-migrate")
    assert report["ram"]["dirty-sync-count"] == 0
    assert report["ram"]["normal"] + report["ram"]["duplicate"] == report["ram"]["total"] // 4096
    assert os.path.getsize(path) == report["ram"]["transferred"]
    events = [event for event in source.qmp.events if event["event"] in ("MIGRATION", "STOP", "RESUME")]
    told = [event.get("data", {}).get("status", event["event"]) for event in events]
    assert told[-5:] == ["setup", "active", "STOP", "RESUME", "completed"]
    wait_until(lambda: not any(n.startswith("mig/") for n in thread_names(source.process.pid)), "its threads to end")
    assert_it_loads(stage, qemumig_system(), path)


def test_a_real_qemu_loads_it(stage: Stage, qemu: str) -> None:
    assert_it_loads(stage, qemu, snapshot(stage)[1])


def test_a_cancelled_snapshot_lets_the_guest_run_on(stage: Stage) -> None:
    source = stage.vmm("source", qemumig_system(), guest=GUEST, memory=64 * MIB)
    with_capabilities([source], background_snapshot=True)
    source.command("migrate", uri="exec:exec sleep 100")
    wait_status(source, "active")
    wait_until(lambda: source.command("query-migrate")["ram"]["transferred"] > 0, "some bytes to be sent")
    source.command("migrate_cancel")
    wait_status(source, "cancelled")
    stage.assert_guest_is_well(source, arrived=False)


def test_it_goes_with_no_capability_of_postcopy(stage: Stage) -> None:
    source = stage.vmm("source", qemumig_system(), guest=GUEST, memory=64 * MIB)
    with pytest.raises(VmmError, match="Background-snapshot is not compatible with postcopy-ram"):
        with_capabilities([source], background_snapshot=True, postcopy_ram=True)
