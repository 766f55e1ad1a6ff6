"""What a migration looks like from outside: its trace, and the names of its threads."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.host import qemumig_system
from tests.support.vmm import GuestParameters, Stage, migrate

pytestmark = pytest.mark.needs("kvm")

STATES = ["setup", "active", "device", "completed"]


def names(path: Path, *wanted: str) -> list[str]:
    """The lines of a trace that begin with one of *wanted*."""
    return [line.rstrip() for line in path.read_text().splitlines() if line.startswith(wanted)]


def test_a_migration_can_be_followed_by_its_trace(stage: Stage) -> None:
    traces = {side: stage.directory / f"{side}.trace" for side in ("source", "destination")}
    options = {side: ("-trace", f"*,file={path}") for side, path in traces.items()}
    source = stage.vmm("source", qemumig_system(), guest=GuestParameters(), extra=options["source"])
    destination = stage.vmm("destination", qemumig_system(), incoming=True, extra=options["destination"])
    migrate(source, destination)
    destination.wait_runstate("running")
    stage.assert_guest_is_well(destination)

    assert names(traces["source"], "migrate_set_state") == [f"migrate_set_state new state {one}" for one in STATES]
    states = [f"migrate_set_state new state {one}" for one in STATES if one != "device"]
    assert names(traces["destination"], "migrate_set_state") == states
    sent = [line.split()[1].rstrip(",") for line in names(traces["source"], "vmstate_save")]
    loaded = [line.split()[1].rstrip(",") for line in names(traces["destination"], "vmstate_load ")]
    assert sent == loaded and {"cpu", "serial", "globalstate"} <= set(sent)
    assert names(traces["source"], "runstate_set")[-1] == (
        "runstate_set current_run_state finish-migrate new_state postmigrate"
    )
    assert "loadvm_process_command com=OPEN_RETURN_PATH len=0" in names(traces["destination"], "loadvm")


def test_a_trace_is_switched_on_while_the_program_runs(stage: Stage) -> None:
    source = stage.vmm("source", qemumig_system(), guest=GuestParameters(), extra=("-msg", "timestamp=on"))
    source.command("trace-event-set-state", name="migrate_*", enable=True)
    source.command("migrate", uri=f"unix:{stage.directory}/nobody")
    source.command("human-monitor-command", command_line="trace-event * off")
    log = (stage.directory / "source.log").read_text()
    assert "Z migrate_set_state new state setup" in log
