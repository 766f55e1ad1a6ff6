"""VMM processes under control: start, memory, the end, and what is not left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qemumig.cli.guest import STATUS_ADDRESS
from qemumig.cli.vmm import GIB, MachineShape, SerialLog, Vmm, VmmError, listen
from tests.support.vmm import MIB, Stage, migrate, wait_until


def test_memory_above_3_gib_lies_at_4_gib() -> None:
    assert MachineShape(2 * GIB, 1, Path()).ranges() == [(0, 2 * GIB)]
    assert MachineShape(5 * GIB, 1, Path()).ranges() == [(0, 3 * GIB), (4 * GIB, 2 * GIB)]


@pytest.mark.usefixtures("no_leaks")
def test_program_that_does_not_exist_is_named(directory: Path) -> None:
    with pytest.raises(VmmError, match=r"src: /nonexistent/vmm cannot be started: No such file"):
        Vmm("src", "/nonexistent/vmm", directory, MachineShape(MIB, 1, Path()))


@pytest.mark.usefixtures("no_leaks")
def test_program_that_ends_at_once_is_told_with_its_last_words(directory: Path) -> None:
    vmm = Vmm("src", "/bin/sh -c 'echo no; echo bad luck >&2; exit 7'", directory, MachineShape(MIB, 1, Path()))
    with pytest.raises(VmmError, match="src did not start, it ended with status 7: bad luck"):
        vmm.connect()
    vmm.close()
    vmm.close()


@pytest.mark.usefixtures("no_leaks")
def test_program_that_ends_while_its_monitor_is_asked_is_told_so(stage: Stage, qemu: str) -> None:
    vmm = stage.vmm("src", qemu)
    vmm.process.kill()
    with pytest.raises(VmmError, match="src ended with status -9"):
        vmm.command("query-status")
    stage.close()


@pytest.mark.usefixtures("no_leaks")
def test_serial_log_counts_what_comes(directory: Path) -> None:
    log = SerialLog("x", directory / "serial")
    assert not log.wait_more(1, timeout=0)
    with (directory / "serial").open("wb") as guest:
        guest.write(b"AB")
    assert log.wait_more(0, timeout=0)
    wait_until(lambda: log.output() == b"AB", "the letters come")
    log.close()


@pytest.mark.usefixtures("no_leaks")
def test_guest_memory_is_read_whole(stage: Stage, qemu: str) -> None:
    source = stage.vmm("source", qemu)
    source.command("stop")
    found = bytearray()
    source.save_memory(0, source.shape.memory, found.extend)
    assert len(found) == source.shape.memory
    assert int.from_bytes(found[STATUS_ADDRESS : STATUS_ADDRESS + 8], "little") == source.guest_status()[0].passes
    assert source.memory_digest() == source.memory_digest()
    stage.close()


@pytest.mark.usefixtures("no_leaks")
def test_guest_moves_between_two_qemus(stage: Stage, qemu: str) -> None:
    source, destination = stage.vmm("source", qemu), stage.vmm("destination", qemu, incoming=True)
    outcome = migrate(source, destination)
    assert outcome.report["status"] == "completed"
    destination.wait_runstate("running")
    stage.assert_guest_is_well(destination)
    stage.close()


def test_failed_migration_says_why(stage: Stage, qemu: str) -> None:
    source = stage.vmm("source", qemu)
    destination = stage.vmm("destination", qemu, memory=64 * MIB, incoming=True)
    with pytest.raises(VmmError, match=r"migration failed.*destination ended with status 1: .*load of migration"):
        migrate(source, destination)


def test_listen_gives_the_port_that_was_taken(stage: Stage, qemu: str) -> None:
    destination = stage.vmm("destination", qemu, incoming=True)
    host, port = listen(destination).removeprefix("tcp:").split(":")
    assert host == "127.0.0.1"
    assert int(port) > 0


def test_vmm_dies_with_a_parent_that_is_killed(directory: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from qemumig.cli.vmm import *\n"
        "vmm = Vmm('x', 'sh -c \"exec sleep 1000\"', Path(sys.argv[1]), MachineShape(1, 1, Path()))\n"
        "print(vmm.process.pid, flush=True); time.sleep(1000)"
    )
    parent = subprocess.Popen([sys.executable, "-c", script, str(directory)], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert Path(f"/proc/{child}").exists()
    parent.kill()
    parent.wait()
    parent.stdout.close()
    wait_until(lambda: is_gone(child), f"process {child} is gone")


def is_gone(pid: int) -> bool:
    """No process any more, or one that only waits to be reaped by whoever inherited it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_closed_vmm_leaves_no_process(stage: Stage, qemu: str) -> None:
    vmm = stage.vmm("source", qemu)
    vmm.close()
    with pytest.raises(ProcessLookupError):
        os.kill(vmm.process.pid, 0)
