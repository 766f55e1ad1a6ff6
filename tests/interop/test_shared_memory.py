"""A guest whose memory is a file that both ends map: only its devices travel (`x-ignore-shared`)."""

from __future__ import annotations

import pytest

from qemumig.cli.guest import ALL_CHECKS, FILL_HALF_RANDOM
from tests.interop.test_channels import FROM_QEMU, TO_QEMU, arrive, both_ways
from tests.support.host import qemumig_system
from tests.support.vmm import GuestParameters, Stage, migrate, with_capabilities

pytestmark = pytest.mark.usefixtures("no_leaks")

MIB = 1 << 20
GUEST = GuestParameters(fill_pages=4096, fill_mode=FILL_HALF_RANDOM, flags=ALL_CHECKS)


@both_ways
def test_only_the_devices_travel(stage: Stage, qemu: str, direction: str) -> None:
    path = stage.directory / "memory"
    backend = f"memory-backend-file,id=mem0,size=64M,mem-path={path},share=on"
    shared = ("-object", backend, "-machine", "memory-backend=mem0")
    systems = {TO_QEMU: (qemumig_system(), qemu), FROM_QEMU: (qemu, qemumig_system())}[direction]
    source = stage.vmm("source", systems[0], guest=GUEST, memory=64 * MIB, extra=shared)
    destination = stage.vmm("destination", systems[1], memory=64 * MIB, incoming=True, extra=shared)
    with_capabilities((source, destination), x_ignore_shared=True)
    ram = migrate(source, destination).report["ram"]
    assert ram["total"] < MIB and ram["transferred"] < MIB
    arrive(stage, destination)
