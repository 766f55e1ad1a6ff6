"""Compressed pages of QEMU until 9.0, both ways (compress.md): taken without being asked for, sent when -global says so."""

from __future__ import annotations

import pytest

from qemumig.cli.guest import ALL_CHECKS
from tests.support.host import qemumig_system
from tests.support.vmm import MIB, GuestParameters, Stage, Vmm, migrate, with_capabilities
from tools.interoplib.peers import real

pytestmark = pytest.mark.usefixtures("no_leaks")

FILL_REPEATED = 2  # pages that compress well
# What is left is weighed against a bandwidth of compressed bytes, which is low: few pages are written all the time.
CHECKING = GuestParameters(dirty_pages=32, print_every=1600, fill_pages=4096, fill_mode=FILL_REPEATED, flags=ALL_CHECKS)


def ends(stage: Stage, qemu: str, direction: str) -> tuple[Vmm, Vmm]:
    if real(qemu).is_since(9, 1):
        pytest.skip("this QEMU has no capability 'compress' any more (9.1)")
    here = f"{qemumig_system()} -global migration.x-compress=on"
    there, here = (here, qemu) if direction == "to-qemu" else (qemu, qemumig_system())
    source = stage.vmm("source", there, guest=CHECKING, memory=64 * MIB)
    return source, stage.vmm("destination", here, memory=64 * MIB, incoming=True, stopped=True)


@pytest.mark.parametrize("xbzrle", [False, True], ids=["alone", "xbzrle"])
@pytest.mark.parametrize("direction", ["to-qemu", "from-qemu"])
def test_compressed_pages_arrive(stage: Stage, qemu: str, direction: str, xbzrle: bool) -> None:
    source, destination = ends(stage, qemu, direction)
    with_capabilities([source, destination], xbzrle=xbzrle)
    with_capabilities([destination if direction == "to-qemu" else source], compress=True)
    ram = migrate(source, destination).report["ram"]
    assert ram["normal"] < 4096  # the pages that were filled went compressed
    destination.wait_runstate("paused")
    assert destination.memory_digest() == source.memory_digest()
    destination.command("cont")
    stage.assert_guest_is_well(destination)
