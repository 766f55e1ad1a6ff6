"""Postcopy between qemumig and a real QEMU, with a guest that checks itself and touches its memory all the time."""

from __future__ import annotations

import pytest

from qemumig.cli.guest import ALL_CHECKS, FILL_RANDOM
from tests.interop.test_precopy import both_ways, ends
from tests.interop.test_tls import KEY, credentials
from tests.qemumig.channels.pki import psk_directory
from tests.support.postcopy import advise, begin, break_and_recover, wait_completed
from tests.support.vmm import MIB, GuestParameters, Stage, Vmm, with_capabilities

pytestmark = [pytest.mark.usefixtures("no_leaks"), pytest.mark.needs("userfaultfd")]

GUEST = GuestParameters(dirty_pages=4096, print_every=20, fill_pages=4096, fill_mode=FILL_RANDOM, flags=ALL_CHECKS, cpus=2)
OLD_PREEMPT = ("-global", "migration.x-preempt-pre-7-2=on")


def pair(stage: Stage, direction: str, qemu: str, *, held: bool = False, extra: tuple[str, ...] = ()) -> tuple[Vmm, Vmm]:
    """Source and destination, 64 MiB; *held*: the guest does not start there.  *extra* options are for qemumig."""
    there, here = ends(direction, qemu)
    vmms = [
        stage.vmm(
            name,
            peer.command,
            guest=GUEST if name == "source" else None,
            memory=64 * MIB,
            incoming=name == "destination",
            stopped=held and name == "destination",
            unlimited=False,
            extra=extra if peer.command != qemu else (),
        )
        for name, peer in (("source", there), ("destination", here))
    ]
    return vmms[0], vmms[1]


@both_ways
def test_the_guest_runs_there_before_its_memory_is_there(stage: Stage, qemu: str, direction: str) -> None:
    source, destination = pair(stage, direction, qemu)
    advise([source, destination])
    with_capabilities([destination], postcopy_blocktime=True)
    begin(source, destination)
    report = wait_completed(source, destination)
    stage.assert_guest_is_well(destination)
    ram = report["ram"]
    assert isinstance(ram, dict)
    assert ram["postcopy-bytes"] > 32 * MIB
    assert source.command("query-status")["status"] == "postmigrate"
    assert len(destination.command("query-migrate")["postcopy-vcpu-blocktime"]) == GUEST.cpus


@both_ways
@pytest.mark.parametrize("layout", ["one-channel", "multifd", "multifd-preempt"])
def test_memory_is_equal_when_the_guest_is_held_there(stage: Stage, qemu: str, direction: str, layout: str) -> None:
    if layout != "one-channel" and not any(peer.is_since(10, 1) for peer in ends(direction, qemu)):
        pytest.skip("QEMU has multifd and postcopy together from 10.1 on")
    source, destination = pair(stage, direction, qemu, held=True)
    advise([source, destination], multifd=layout != "one-channel", postcopy_preempt="preempt" in layout)
    begin(source, destination, where="paused")
    wait_completed(source, destination)
    assert destination.memory_digest() == source.memory_digest()
    destination.command("cont")
    stage.assert_guest_is_well(destination)


@both_ways
def test_urgent_pages_have_a_channel_of_their_own(stage: Stage, qemu: str, direction: str) -> None:
    old = any(peer.is_before(8) for peer in ends(direction, qemu))
    source, destination = pair(stage, direction, qemu, extra=OLD_PREEMPT if old else ())
    advise([source, destination], postcopy_preempt=True)
    begin(source, destination)
    wait_completed(source, destination)
    stage.assert_guest_is_well(destination)


@both_ways
@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "tls"])
@pytest.mark.parametrize("preempt", [False, True], ids=["one-channel", "preempt"])
def test_a_broken_link_is_mended_again_and_again(
    stage: Stage, qemu: str, direction: str, preempt: bool, encrypted: bool
) -> None:
    old = any(peer.is_before(8) for peer in ends(direction, qemu))
    source, destination = pair(stage, direction, qemu, extra=OLD_PREEMPT if old and preempt else ())
    if encrypted:
        keys = psk_directory(stage.directory / "keys", qemu=KEY)
        credentials(source, "psk", "client", keys)
        credentials(destination, "psk", "server", keys)
    advise([source, destination], postcopy_bandwidth=16 * MIB, postcopy_preempt=preempt)
    begin(source, destination)
    break_and_recover(source, destination, f"unix:{stage.directory}/r")
    break_and_recover(destination, source, f"unix:{stage.directory}/s", swapped=True)
    source.command("migrate-set-parameters", max_postcopy_bandwidth=0)
    wait_completed(source, destination)
    stage.assert_guest_is_well(destination)
