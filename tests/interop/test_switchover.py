"""A switchover that waits, for the destination's consent and for somebody's word, between qemumig and a real QEMU."""

from __future__ import annotations

import pytest

from tests.interop.test_channels import GUEST, TO_QEMU, arrive, both_ways
from tests.support.host import qemumig_system
from tests.support.vmm import Stage, listen, wait_until, with_capabilities
from tools.interoplib.peers import real

pytestmark = pytest.mark.usefixtures("no_leaks")


@both_ways
def test_the_guest_moves_when_both_sides_agree(stage: Stage, qemu: str, direction: str) -> None:
    """A QEMU before 8.1 knows nothing of consent, so it is asked for none; one since 11 sends none for want of devices."""
    ours = f"{qemumig_system()} -global migration.switchover-ack-legacy={'off' if real(qemu).is_since(11) else 'on'}"
    there, here = (ours, qemu) if direction == TO_QEMU else (qemu, ours)
    source = stage.vmm("source", there, guest=GUEST)
    destination = stage.vmm("destination", here, incoming=True)
    with_capabilities((source,), pause_before_switchover=True)
    if real(qemu).is_since(8, 1):
        with_capabilities((source, destination), return_path=True, switchover_ack=True)
    source.command("migrate", uri=listen(destination))
    wait_until(lambda: source.command("query-migrate")["status"] == "pre-switchover", "the source does not pause")
    assert source.command("query-status")["status"] == "finish-migrate"
    source.command("migrate-continue", state="pre-switchover")
    wait_until(lambda: source.command("query-migrate")["status"] == "completed", "the source does not go on")
    arrive(stage, destination)
