"""Precopy between qemumig and a real QEMU, both ways and by every way that both have, with a guest that checks itself."""

from __future__ import annotations

import pytest

from qemumig.cli.guest import ALL_CHECKS, FILL_HALF_RANDOM
from qemumig.cli.interrupts import Interrupts
from tests.support.host import qemumig_system
from tests.support.vmm import MIB, GuestParameters, Stage, VmmError, listen, migrate, wait_until, with_capabilities
from tools.interoplib.guests import CHECKING, DIRTYING, guest
from tools.interoplib.journey import run_hops
from tools.interoplib.peers import Peer, ours, real
from tools.interoplib.transports import WAYS
from tools.interoplib.trial import Rules, Trial

pytestmark = pytest.mark.usefixtures("no_leaks")

TIMEOUT = 30.0
TO_QEMU, FROM_QEMU = "to-qemu", "from-qemu"
both_ways = pytest.mark.parametrize("direction", [TO_QEMU, FROM_QEMU])


def ends(direction: str, qemu: str) -> tuple[Peer, Peer]:
    """Source and destination."""
    pair = ours(qemumig_system()), real(qemu)
    return pair if direction == TO_QEMU else pair[::-1]


@both_ways
@pytest.mark.parametrize("held", [False, True], ids=["runs-on", "held"])
@pytest.mark.parametrize(("transport", "cpus"), [("tcp", 1), ("unix", 2), ("exec", 2), ("fd", 1), ("file", 2)])
def test_guest_moves_and_does_not_notice(qemu: str, direction: str, transport: str, cpus: int, held: bool) -> None:
    """Held on arrival, its memory is compared as well; a QEMU that does not have the transport refuses it."""
    source, destination = ends(direction, qemu)
    with Interrupts() as interrupts:
        trial = Trial(source, destination, transport, 64 * MIB, guest(CHECKING, 64 * MIB, cpus), held)
        if source.has(transport) and destination.has(transport):
            assert trial.run(Rules(interrupts, timeout=TIMEOUT)).report["status"] == "completed"
        else:
            refuser = "source" if direction == FROM_QEMU else "destination"
            with pytest.raises(VmmError, match=rf"{refuser} refuses migrate.*(migration protocol|'uri')"):
                trial.run(Rules(interrupts, timeout=TIMEOUT))


@both_ways
def test_guest_that_dirties_memory_as_fast_as_it_can_arrives(qemu: str, direction: str) -> None:
    with Interrupts() as interrupts:
        trial = Trial(*ends(direction, qemu), "tcp", 128 * MIB, guest(DIRTYING, 128 * MIB, 2))
        report = trial.run(Rules(interrupts, timeout=TIMEOUT)).report
    assert report["ram"]["dirty-sync-count"] >= 2
    assert report["ram"]["normal"] > 32 * MIB // 4096


@both_ways
def test_memory_above_three_gib_arrives_in_its_place(qemu: str, direction: str) -> None:
    memory = 3200 * MIB
    parameters = guest(CHECKING, memory, 1)
    assert parameters.dirty_base > 4 << 30
    with Interrupts() as interrupts:
        Trial(*ends(direction, qemu), "unix", memory, parameters).run(Rules(interrupts, timeout=TIMEOUT))


@both_ways
def test_paused_guest_arrives_paused_with_equal_memory(stage: Stage, qemu: str, direction: str) -> None:
    there, here = ends(direction, qemu)
    parameters = GuestParameters(fill_pages=1024, fill_mode=FILL_HALF_RANDOM, flags=ALL_CHECKS, cpus=2)
    source = stage.vmm("source", there.command, guest=parameters, memory=64 * MIB)
    destination = stage.vmm("destination", here.command, memory=64 * MIB, incoming=True)
    source.command("stop")
    status = source.guest_status()
    migrate(source, destination)
    destination.wait_runstate("paused")
    assert destination.memory_digest() == source.memory_digest()
    assert destination.guest_status() == status
    destination.command("cont")
    stage.assert_guest_is_well(destination)


@both_ways
def test_cancelled_migration_leaves_the_guest_where_it_was(stage: Stage, qemu: str, direction: str) -> None:
    there, here = ends(direction, qemu)
    parameters = GuestParameters(fill_pages=4096, fill_mode=FILL_HALF_RANDOM, flags=ALL_CHECKS)
    source = stage.vmm("source", there.command, guest=parameters)
    with_capabilities([source], events=True)
    source.command("migrate-set-parameters", max_bandwidth=4 * MIB)
    destination = stage.vmm("destination", here.command, incoming=True)
    source.command("migrate", uri=listen(destination))
    source.wait_event("MIGRATION", TIMEOUT, status="active")
    wait_until(lambda: source.command("query-migrate")["ram"]["transferred"] > MIB, "a megabyte to be sent")
    source.command("migrate_cancel")
    source.wait_event("MIGRATION", TIMEOUT, status="cancelled")
    stage.assert_guest_is_well(source, arrived=False)
    wait_until(destination.has_died, "the destination to end")
    assert destination.process.returncode == 1
    assert "load of migration failed" in destination.last_words()

    source.command("migrate-set-parameters", max_bandwidth=0)
    second = stage.vmm("second", here.command, incoming=True)
    migrate(source, second)
    second.wait_runstate("running")
    stage.assert_guest_is_well(second)


def test_guest_goes_there_and_back_by_every_way(qemu: str) -> None:
    """Its memory is compared at each hop."""
    told: list[str] = []
    system, peer = ours(qemumig_system()), real(qemu)
    ways = [way for way in WAYS if peer.has(way)]
    with Interrupts() as interrupts:
        run_hops(Rules(interrupts, timeout=TIMEOUT), system, [peer], len(ways), told.append)
    assert len(told) == len(ways)
    for line, way in zip(told, ways, strict=True):
        assert f" by {way}: ok" in line
