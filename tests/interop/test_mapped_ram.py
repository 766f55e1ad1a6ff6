"""mapped-ram between qemumig and a real QEMU: a file that one wrote loads in the other (ram.md §10)."""

from __future__ import annotations

import os

import pytest

from qemumig.cli.guest import ALL_CHECKS, FILL_HALF_RANDOM
from tests.support.host import qemumig_system
from tests.support.vmm import MIB, GuestParameters, Stage, Vmm, VmmError, wait_until, with_capabilities
from tools.interoplib.peers import options, ours, real

pytestmark = pytest.mark.usefixtures("no_leaks")

both_ways = pytest.mark.parametrize("direction", ["to-qemu", "from-qemu"])

CHECKING = GuestParameters(dirty_pages=2048, print_every=50, fill_pages=4096, fill_mode=FILL_HALF_RANDOM, flags=ALL_CHECKS)
MEMORY = 96 * MIB


def ends(stage: Stage, direction: str, qemu: str) -> tuple[Vmm, Vmm]:
    """Source and destination, which is held stopped; both have the capability."""
    pair = ours(qemumig_system()), real(qemu)
    if not pair[1].is_since(9):
        pytest.skip("this QEMU is older than mapped-ram (9.0)")
    there, here = pair if direction == "to-qemu" else pair[::-1]
    extra = options(there, here)
    source = stage.vmm("source", f"{there.command} {extra.source}", guest=CHECKING, memory=MEMORY)
    destination = stage.vmm(
        "destination", f"{here.command} {extra.destination}", memory=MEMORY, incoming=True, stopped=True
    )
    with_capabilities([source, destination], **{"mapped-ram": True})
    return source, destination


def save_and_load(stage: Stage, source: Vmm, destination: Vmm, uri: str) -> None:
    """Save the running guest, load it, compare all of memory, and let it go on."""
    source.command("migrate", uri=uri)
    wait_until(lambda: source.command("query-migrate")["status"] in ("completed", "failed"), "the source to end")
    report = source.command("query-migrate")
    assert report["status"] == "completed", report
    destination.command("migrate-incoming", uri=uri)
    destination.wait_runstate("paused")
    assert destination.memory_digest() == source.memory_digest()
    destination.command("cont")
    stage.assert_guest_is_well(destination)


@both_ways
@pytest.mark.parametrize("offset", ["", ",offset=5000"], ids=["", "offset"])
def test_a_running_guest_is_saved_and_goes_on(stage: Stage, qemu: str, direction: str, offset: str) -> None:
    source, destination = ends(stage, direction, qemu)
    file = stage.directory / "guest.ram"
    save_and_load(stage, source, destination, f"file:{file}{offset}")
    assert file.stat().st_size > MEMORY
    assert file.stat().st_blocks * 512 < 48 * MIB  # what is zero is a hole


@both_ways
def test_with_multifd_the_numbers_of_channels_may_differ(stage: Stage, qemu: str, direction: str) -> None:
    """By direct-io, too, where the file system has it; what the file looks like does not tell."""
    source, destination = ends(stage, direction, qemu)
    with_capabilities([source, destination], multifd=True)
    file = stage.directory / "guest.ram"
    file.touch()
    try:
        os.close(os.open(file, os.O_RDONLY | os.O_DIRECT))
        direct_io = True
    except OSError:
        direct_io = False
    source.command("migrate-set-parameters", multifd_channels=3, direct_io=direct_io)
    destination.command("migrate-set-parameters", multifd_channels=2, direct_io=direct_io)
    save_and_load(stage, source, destination, f"file:{file}")
    assert file.stat().st_blocks * 512 < 48 * MIB


@both_ways
def test_through_descriptors_that_a_client_passed_in(stage: Stage, qemu: str, direction: str) -> None:
    source, destination = ends(stage, direction, qemu)
    file = stage.directory / "guest.ram"
    paths = []
    for vmm, flags in ((source, os.O_WRONLY | os.O_CREAT), (destination, os.O_RDONLY)):
        fd = os.open(file, flags, 0o600)
        paths.append(vmm.qmp.add_fd(fd))
        os.close(fd)
    assert paths[0] == paths[1]
    save_and_load(stage, source, destination, f"file:{paths[0]}")


def test_a_transport_that_cannot_be_sought_is_refused_as_qemu_refuses_it(stage: Stage, qemu: str) -> None:
    source, destination = ends(stage, "to-qemu", qemu)
    for vmm, command in ((source, "migrate"), (destination, "migrate-incoming")):
        with pytest.raises(VmmError, match=r"Migration requires seekable transport \(e\.g\. file\)"):
            vmm.command(command, uri="tcp:127.0.0.1:0")
