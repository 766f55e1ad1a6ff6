"""The ways from one VMM to another.

tcp, unix   the destination listens, the source connects
fd          both get one end of a pair of sockets over their monitors (channels.md §4)
exec, file  through a file: the source writes all of it, then the destination reads it
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from pathlib import Path

from qemumig.cli.vmm import FINAL, MigrationOutcome, Vmm, VmmError, migrate

DESCRIPTOR = "migration"

Way = Callable[[Vmm, Vmm, float], MigrationOutcome]


def by_tcp(source: Vmm, destination: Vmm, timeout: float) -> MigrationOutcome:
    return migrate(source, destination, "tcp:127.0.0.1:0", timeout=timeout)


def by_unix(source: Vmm, destination: Vmm, timeout: float) -> MigrationOutcome:
    return migrate(source, destination, f"unix:{source.directory}/{destination.name}.sock", timeout=timeout)


def by_fd(source: Vmm, destination: Vmm, timeout: float) -> MigrationOutcome:
    ends = socket.socketpair()
    for vmm, end in zip((source, destination), ends, strict=True):
        with end:
            vmm.qmp.give_fd(DESCRIPTOR, end.fileno())
    return migrate(source, destination, f"fd:{DESCRIPTOR}", timeout=timeout)


def by_exec(source: Vmm, destination: Vmm, timeout: float) -> MigrationOutcome:
    file = stored_file(source, destination)
    outcome = store_by_exec(source, file, timeout)
    load(destination, f"exec:cat {file}", timeout)
    return outcome


def by_file(source: Vmm, destination: Vmm, timeout: float) -> MigrationOutcome:
    file = stored_file(source, destination)
    outcome = store(source, f"file:{file}", timeout)
    load(destination, f"file:{file}", timeout)
    return outcome


def stored_file(source: Vmm, destination: Vmm) -> Path:
    return source.directory / f"{source.name}-{destination.name}.stream"


def store(source: Vmm, uri: str, timeout: float) -> MigrationOutcome:
    """Migrate to where nobody answers, and wait for the end; VmmError when it is not `completed`."""
    started = time.monotonic()
    source.command("migrate", uri=uri)
    while (report := source.command("query-migrate"))["status"] not in FINAL:
        if time.monotonic() - started > timeout:
            source.command("migrate_cancel")
            raise VmmError(f"{source.name}: the migration was still {report['status']} after {timeout:.0f} s")
        time.sleep(0.02)
    if report["status"] != "completed":
        reason = report.get("error-desc") or source.last_words() or "the source does not say why"
        raise VmmError(f"{source.name}: the migration {report['status']}: {reason}")
    return MigrationOutcome(started, time.monotonic(), report)


def store_by_exec(source: Vmm, file: Path, timeout: float) -> MigrationOutcome:
    """Migrate into *file* through a command; it gets its name when it is whole, for `completed` may come before that."""
    outcome = store(source, f"exec:cat >{file}.part && mv {file}.part {file}", timeout)
    until = time.monotonic() + timeout
    while not file.exists():
        if time.monotonic() > until:
            raise VmmError(f"{source.name}: the command has not ended {timeout:.0f} s after the migration")
        time.sleep(0.01)  # a name that appears raises no event here
    return outcome


def load(destination: Vmm, uri: str, timeout: float) -> None:
    """Let *destination* load what is stored, and wait until the guest is there; VmmError when it does not arrive."""
    destination.command("migrate-incoming", uri=uri)
    started = time.monotonic()
    while destination.command("query-status")["status"] == "inmigrate":
        report = destination.command("query-migrate")
        if report.get("status") == "failed":
            raise VmmError(f"{destination.name}: the load failed: {report.get('error-desc') or 'it does not say why'}")
        if time.monotonic() - started > timeout:
            raise VmmError(f"{destination.name}: still loading after {timeout:.0f} s")
        time.sleep(0.02)


WAYS: dict[str, Way] = {"tcp": by_tcp, "unix": by_unix, "exec": by_exec, "fd": by_fd, "file": by_file}
