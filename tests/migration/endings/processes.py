"""Ends of a migration between two VMMs with a real guest: one of the processes is killed, or told to quit, at any moment.

The guest fills memory and checks itself; what the surviving process holds afterwards is what it held before.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from tempfile import mkdtemp

from qemumig.cli.guest import ALL_CHECKS, FILL_HALF_RANDOM
from qemumig.cli.vmm import FINAL
from tests.support.host import qemumig_system
from tests.support.vmm import (
    GuestParameters,
    Stage,
    Vmm,
    VmmError,
    children,
    listen,
    migrate,
    open_files,
    thread_names,
    wait_until,
)

DURATION_S = 0.3  # a migration takes about as long
UNHEARD_OF_S = 3.0  # a connection that was made before the source died shows itself sooner
MEMORY = 32 << 20
GUEST = GuestParameters(fill_base=24 << 20, fill_pages=1024, fill_mode=FILL_HALF_RANDOM, flags=ALL_CHECKS)


@contextmanager
def stage_in(directory: Path) -> Iterator[Stage]:
    stage = Stage(Path(mkdtemp(dir=directory)))
    try:
        yield stage
    finally:
        stage.close()


def ends(stage: Stage) -> tuple[Vmm, Vmm]:
    """Source and destination."""
    source = stage.vmm("source", qemumig_system(), guest=GUEST, memory=MEMORY)
    return source, stage.vmm("destination", qemumig_system(), memory=MEMORY, incoming=True)


class Holdings:
    """What a process holds at one moment."""

    def __init__(self, vmm: Vmm) -> None:
        self._vmm = vmm
        self._before = self._now()

    def _now(self) -> tuple[list[str], list[str], list[int]]:
        pid = self._vmm.process.pid
        threads = [name for name in thread_names(pid) if name != "worker"]  # kept for the next command
        kinds = sorted(name.partition(":")[0] for name in open_files(pid).values())
        return threads, kinds, children(pid)

    def check(self) -> None:
        """AssertionError when it holds anything else now."""
        wait_until(lambda: self._now() == self._before, f"{self._vmm.name} holds {self._now()}, before {self._before}")


def begin(source: Vmm, destination: Vmm, chance: Random, *, exit_on_error: bool = True) -> None:
    """Start the migration, and return at some moment of it."""
    destination.command("migrate-incoming", uri="tcp:127.0.0.1:0", exit_on_error=exit_on_error)
    (where,) = destination.command("query-migrate")["socket-address"]
    source.command("migrate", uri=f"tcp:{where['host']}:{where['port']}")
    time.sleep(chance.random() * DURATION_S)


def destination_goes(chance: Random, directory: Path, go: Callable[[Vmm], None]) -> str:
    with stage_in(directory) as stage:
        source, destination = ends(stage)
        holdings = Holdings(source)
        begin(source, destination, chance)
        go(destination)
        wait_until(lambda: source.command("query-migrate")["status"] in FINAL, "the source does not end")
        report = source.command("query-migrate")
        if report["status"] == "completed":
            assert source.command("query-status")["status"] == "postmigrate"
            return "the guest had moved"
        outcome = "failed"
        if "use 'cont'" in report["error-desc"]:
            assert source.command("query-status")["status"] == "postmigrate"
            source.command("cont")
            outcome = "unknown"
        assert source.command("query-status")["status"] == "running"
        stage.assert_guest_is_well(source, arrived=False)
        holdings.check()
        if chance.random() < 0.3:
            third = stage.vmm("third", qemumig_system(), memory=MEMORY, incoming=True)
            migrate(source, third)
            third.wait_runstate("running")
            stage.assert_guest_is_well(third)
            outcome += ", then completed"
        return outcome


def source_goes(chance: Random, directory: Path, go: Callable[[Vmm], None]) -> str:
    with stage_in(directory) as stage:
        source, destination = ends(stage)
        exits = chance.random() < 0.5
        begin(source, destination, chance, exit_on_error=exits)
        go(source)
        source.process.wait(30)

        waits_until = time.monotonic() + UNHEARD_OF_S

        def has_ended() -> bool:
            if destination.process.poll() is not None:
                return True
            status = destination.command("query-migrate")["status"]
            return status in FINAL or (status == "setup" and time.monotonic() > waits_until)

        try:
            wait_until(has_ended, "the destination does not end")
            report = destination.command("query-migrate")
        except VmmError:  # its monitor closes before it is gone
            report = {}
        if not report or (exits and report["status"] == "failed"):
            assert destination.process.wait(30) == 1
            assert "load of migration failed: " in destination.last_words()
            return "the destination has ended, too"
        if report["status"] == "completed":
            destination.wait_runstate("running")
            stage.assert_guest_is_well(destination)
            return "the guest had moved"
        if report["status"] == "setup":
            return "the source had not connected yet"
        assert report["status"] == "failed" and report["error-desc"]
        assert destination.command("query-status")["status"] == "inmigrate"
        listen(destination)  # it takes another one
        return "the destination waits for another"


def kill(vmm: Vmm) -> None:
    vmm.process.kill()
    vmm.process.wait()


def quit(vmm: Vmm) -> None:
    with contextlib.suppress(VmmError):  # it went by itself a moment ago
        vmm.command("quit")
    vmm.process.wait(30)


def destination_killed(chance: Random, directory: Path) -> str:
    return destination_goes(chance, directory, kill)


def destination_quits(chance: Random, directory: Path) -> str:
    return destination_goes(chance, directory, quit)


def source_killed(chance: Random, directory: Path) -> str:
    return source_goes(chance, directory, kill)


def source_quits(chance: Random, directory: Path) -> str:
    return source_goes(chance, directory, quit)


KINDS: dict[str, Callable[[Random, Path], str]] = {
    function.__name__.replace("_", "-"): function
    for function in (destination_killed, destination_quits, source_killed, source_quits)
}
