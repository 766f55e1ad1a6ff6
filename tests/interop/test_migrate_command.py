"""`qemumig migrate`: it drives any VMM with QMP, tells the truth while it lasts, and where the guest is afterwards."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from qemumig.cli.guest import ALL_CHECKS
from tests.support.host import qemumig_system
from tests.support.vmm import GuestParameters, Stage, Vmm

pytestmark = pytest.mark.needs("kvm")

MODEST = GuestParameters(dirty_pages=256, print_every=20, flags=ALL_CHECKS)
RESTLESS = GuestParameters(dirty_pages=4096, print_every=200)
SLOW = ("--max-bandwidth", "8M")


def start(*argv: object) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-c",
        "import sys; from qemumig.cli import main; sys.exit(main())",
        "migrate",
        *map(str, argv),
    ]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, **pipes)  # type: ignore[call-overload, no-any-return]


def run(*argv: object) -> tuple[int, str, str]:
    """Exit status, output, errors."""
    with start(*argv) as process:
        out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def second_monitor(stage: Stage, name: str) -> tuple[str, ...]:
    """A monitor for the tool: the test holds the first one."""
    return ("-qmp", f"unix:{stage.directory}/{name}.second,server=on,wait=off")


def monitors(stage: Stage) -> list[object]:
    return ["--qmp", stage.directory / "source.second", "--incoming-qmp", stage.directory / "destination.second"]


def pair(stage: Stage, source: str, destination: str, guest: GuestParameters = MODEST) -> tuple[Vmm, Vmm]:
    return (
        stage.vmm("source", source, guest=guest, unlimited=False, extra=second_monitor(stage, "source")),
        stage.vmm("destination", destination, incoming=True, extra=second_monitor(stage, "destination")),
    )


@pytest.fixture(params=["to-qemu", "from-qemu"])
def both_ways(request: pytest.FixtureRequest, stage: Stage, qemu: str) -> Iterator[tuple[Vmm, Vmm]]:
    ends = qemumig_system(), qemu
    yield pair(stage, *(ends if request.param == "to-qemu" else ends[::-1]))


def test_a_guest_moves_between_qemumig_and_qemu(both_ways: tuple[Vmm, Vmm], stage: Stage) -> None:
    source, destination = both_ways
    settings = ["--max-bandwidth", "0", "--downtime-limit", "500", "--set", "announce-rounds=3", "--capability", "events"]
    status, out, err = run(*monitors(stage), *settings, "--json", "tcp:127.0.0.1:0")
    assert (status, err) == (0, "")
    told = json.loads(out)
    report = source.command("query-migrate")
    assert (told["ok"], told["status"]) == (True, "completed")
    assert (told["total_ms"], told["downtime_ms"]) == (report["total-time"], report["downtime"])
    assert (told["transferred_bytes"], told["bitmap_syncs"]) == (
        report["ram"]["transferred"],
        report["ram"]["dirty-sync-count"],
    )
    for vmm in (source, destination):
        parameters = vmm.command("query-migrate-parameters")
        assert (parameters["max-bandwidth"], parameters["downtime-limit"], parameters["announce-rounds"]) == (0, 500, 3)
    destination.wait_runstate("running")
    stage.assert_guest_is_well(destination)


@pytest.mark.needs("userfaultfd")
def test_postcopy_follows_the_first_round_of_a_guest_that_would_never_converge(stage: Stage, qemu: str) -> None:
    _, destination = pair(stage, qemu, qemu, RESTLESS)
    status, out, err = run(*monitors(stage), "--max-bandwidth", "32M", "--postcopy", f"unix:{stage.directory}/m")
    assert (status, err) == (0, ""), out
    assert "postcopy: the guest goes on at the destination" in out
    assert out.splitlines()[-1].startswith("completed in ")
    stage.assert_guest_is_well(destination)


def test_a_guest_that_does_not_converge_is_called_that_and_stays(stage: Stage) -> None:
    source, _ = pair(stage, qemumig_system(), qemumig_system(), replace(RESTLESS, dirty_pages=1024))  # some 0.5 s a round
    status, out, err = run(*monitors(stage), *SLOW, "--timeout", "4", "--set", "downtime-limit=10", "tcp:127.0.0.1:0")
    assert status == 1
    assert "does not converge at this rate" in out
    assert "not done after 4 s: cancelled" in out
    assert err == "qemumig migrate: the migration was cancelled; the guest is at the source, running\n"
    stage.assert_guest_is_well(source, arrived=False)


def test_ctrl_c_cancels_and_says_where_the_guest_is(stage: Stage, qemu: str) -> None:
    source, _ = pair(stage, qemu, qemumig_system(), RESTLESS)
    with start(*monitors(stage), *SLOW, "tcp:127.0.0.1:0") as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "remain" in line:
                break
        os.kill(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    assert err == "qemumig migrate: the migration was cancelled; the guest is at the source, running\n"
    assert source.command("query-migrate")["status"] == "cancelled"
    stage.assert_guest_is_well(source, arrived=False)


def test_what_the_server_refuses_is_told_in_its_words(stage: Stage) -> None:
    source = stage.vmm("source", qemumig_system(), guest=MODEST, extra=second_monitor(stage, "source"))
    monitor = ["--qmp", stage.directory / "source.second"]
    for argv, words in (
        (["--capability", "nosuch"], "Parameter 'capability' does not accept value 'nosuch'"),
        (["--set", "nosuch=1"], "Parameter 'nosuch' is unexpected"),
        ([], "Failed to connect to"),
    ):
        status, out, err = run(*monitor, *argv, f"unix:{stage.directory}/nobody")
        assert status == 1
        assert words in err and err.startswith("qemumig migrate: "), out
    assert "the guest is at the source, running" in err
    stage.assert_guest_is_well(source, arrived=False)


def test_without_a_monitor_there_it_says_so(tmp_path: Path) -> None:
    status, out, err = run("--qmp", tmp_path / "none", "tcp:127.0.0.1:1")
    assert (status, out) == (1, "")
    assert err == f"qemumig migrate: source: no monitor at {tmp_path}/none: No such file or directory\n"
