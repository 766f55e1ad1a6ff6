"""A migration that is switched to postcopy early: almost all of memory moves while the guest runs at the destination.

    advise([source, destination])                 the capability, on both sides, and a source that is slow before the switch
    begin(source, destination)                    … until the guest runs at the destination
    wait_completed(source, destination)           … until all of it is there
    break_and_recover(source, destination, uri)   in between: the connection ends, and they go on over another

The trick: `max-bandwidth` is so low that precopy gets nowhere, and postcopy has a limit of its own.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from qemumig.cli.vmm import Vmm, VmmError, listen, with_capabilities
from tests.support.vmm import wait_until

PATIENCE_S = 60.0
ENDED = ("completed", "failed", "cancelled")


def advise(vmms: Sequence[Vmm], *, postcopy_bandwidth: int = 0, **capabilities: bool) -> None:
    """Switch postcopy on, and *capabilities* with it; *postcopy_bandwidth* in bytes per second."""
    with_capabilities(vmms, postcopy_ram=True, events=True, **capabilities)
    vmms[0].command("migrate-set-parameters", max_bandwidth=8 << 20, max_postcopy_bandwidth=postcopy_bandwidth)


def begin(source: Vmm, destination: Vmm, uri: str = "tcp:127.0.0.1:0", *, where: str = "running") -> None:
    """Migrate, and switch to postcopy as soon as rounds have begun, until the guest is there, in run state *where*."""
    source.command("migrate", uri=listen(destination, uri))
    wait_status(source, "active")
    wait_until(lambda: source.command("query-migrate")["ram"]["transferred"] > 0, "some bytes to be sent")
    source.command("migrate-start-postcopy")
    destination.wait_runstate(where)


def wait_status(vmm: Vmm, *wanted: str, timeout: float = PATIENCE_S) -> str:
    """Wait until *vmm* says that its migration has one of the statuses *wanted*; VmmError when it ended in another."""
    deadline = time.monotonic() + timeout
    while (report := vmm.command("query-migrate")).get("status") not in wanted:
        if (report.get("status") in ENDED and report["status"] not in wanted) or time.monotonic() > deadline:
            raise VmmError(f"{vmm.name} is {report.get('status')} ({report.get('error-desc')}), expected {wanted}")
        time.sleep(0.01)
    return str(report["status"])


def wait_completed(source: Vmm, destination: Vmm) -> dict[str, object]:
    """Wait for both ends; the source's last report."""
    wait_status(source, "completed")
    wait_status(destination, "completed")
    report: dict[str, object] = source.command("query-migrate")
    return report


def break_and_recover(breaker: Vmm, other: Vmm, uri: str, *, swapped: bool = False) -> None:
    """Let *breaker* end the connection, and go on over *uri*; it is the source unless *swapped*."""
    source, destination = (other, breaker) if swapped else (breaker, other)
    for vmm in (source, destination):
        wait_status(vmm, "postcopy-active")
    breaker.command("migrate-pause")
    for vmm in (source, destination):
        wait_status(vmm, "postcopy-paused")
    destination.command("migrate-recover", uri=uri)
    source.command("migrate", uri=uri, resume=True)
    for vmm in (source, destination):
        wait_status(vmm, "postcopy-active", "completed")
