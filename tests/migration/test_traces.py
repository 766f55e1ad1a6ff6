"""What a migration looks like from outside: its trace, and the names of its threads."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.host import qemumig_system
from tests.support.vmm import GuestParameters, Stage, listen, migrate, thread_names, wait_until

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


# What each thread is called while a migration is under way; `worker` stands for any number of them.
AT_SOURCE = {"CPU 0/KVM", "CPU 1/KVM", "vm/control", "mig/src/main", "mig/src/return"}
AT_DESTINATION = {"CPU 0/KVM", "CPU 1/KVM", "vm/control", "mig/dst/main"}
OF_THE_HOST = ("kvm-nx-lpage-re", "kvm-pit/", "vhost-")  # the kernel's own, which show up with ours on some versions


def names_but(pid: int, *others: str) -> set[str]:
    return {name for name in thread_names(pid) if not name.startswith(("worker", *OF_THE_HOST)) and name not in others}


def test_every_thread_has_a_name_of_its_own_in_top(stage: Stage) -> None:
    """The kernel's names, which `top -H` shows; the first thread is called as the process is."""
    guest = GuestParameters(dirty_pages=4096, cpus=2)
    source = stage.vmm("source", qemumig_system(), guest=guest, unlimited=False, extra=("-name", "vm,process=origin"))
    extra = ("-name", "guest=vm,debug-threads=on")
    destination = stage.vmm("destination", qemumig_system(), incoming=True, extra=extra)
    source.command("migrate-set-parameters", max_bandwidth=1 << 20)
    source.command("migrate", uri=listen(destination))
    wait_until(lambda: source.command("query-migrate")["status"] == "active", "the source is not active")
    assert names_but(source.process.pid, "origin") == AT_SOURCE
    at_first = "mig/dst/surplus"  # turns others away, for a second
    assert names_but(destination.process.pid, "qemumig-system", at_first) == AT_DESTINATION
    listed = source.command("query-migrationthreads")
    assert [one["name"] for one in listed] == ["mig/src/main"]
    comm = Path(f"/proc/{source.process.pid}/task/{listed[0]['thread-id']}/comm")
    assert comm.read_text() == "mig/src/main\n"
    assert thread_names(source.process.pid).count("origin") == 1
    source.command("migrate_cancel")


def test_what_a_monitor_is_asked_and_answers_is_a_line_each(stage: Stage) -> None:
    trace = stage.directory / "trace"
    options = ("-trace", f"enable=*qmp_*,file={trace}", "-trace", "handle_hmp_command")
    source = stage.vmm("source", qemumig_system(), guest=GuestParameters(), unlimited=False, extra=options)
    source.command("human-monitor-command", command_line="info name")
    source.command("trace-event-set-state", name="*", enable=False)
    assert names(trace, "handle_hmp") == ["handle_hmp_command cmdline: info name"]
    assert names(trace, "handle_qmp_command")[1:] == [
        'handle_qmp_command req: {"execute": "human-monitor-command", "arguments": {"command-line": "info name"}}',
        'handle_qmp_command req: {"execute": "trace-event-set-state", "arguments": {"name": "*", "enable": false}}',
    ]
    answers = ['{"return": {}}', '{"return": ""}']
    assert names(trace, "monitor_qmp_respond") == [f"monitor_qmp_respond resp: {answer}" for answer in answers]
