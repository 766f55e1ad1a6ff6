"""XBZRLE between qemumig and a real QEMU, both ways, with a guest that checks itself and memory compared (xbzrle.md)."""

from __future__ import annotations

from typing import Any

import pytest

from qemumig.cli.guest import ALL_CHECKS, FILL_HALF_RANDOM
from tests.support.host import qemumig_system
from tests.support.vmm import MIB, GuestParameters, Stage, Vmm, listen, wait_until, with_capabilities
from tools.interoplib.peers import options, ours, real

pytestmark = pytest.mark.usefixtures("no_leaks")

both_ways = pytest.mark.parametrize("direction", ["to-qemu", "from-qemu"])

REWRITING = GuestParameters(dirty_pages=2048, print_every=50, fill_pages=1024, fill_mode=FILL_HALF_RANDOM, flags=ALL_CHECKS)
CACHE_MEMBERS = ["bytes", "cache-miss", "cache-miss-rate", "cache-size", "encoding-rate", "overflow", "pages"]


def stats(source: Vmm) -> dict[str, Any]:
    found: dict[str, Any] = source.command("query-migrate").get("xbzrle-cache", {"pages": 0, "cache-size": 0})
    return found


def begin(stage: Stage, direction: str, qemu: str, cache_size: int) -> tuple[Vmm, Vmm]:
    """A migration whose second round takes an eighth of a second, so that the guest gives the third one something to do."""
    pair = ours(qemumig_system()), real(qemu)
    there, here = pair if direction == "to-qemu" else pair[::-1]
    extra = options(there, here)
    source = stage.vmm("source", f"{there.command} {extra.source}", guest=REWRITING, memory=64 * MIB)
    destination = stage.vmm(
        "destination", f"{here.command} {extra.destination}", memory=64 * MIB, incoming=True, stopped=True
    )
    with_capabilities([source, destination], xbzrle=True)
    source.command("migrate-set-parameters", max_bandwidth=64 * MIB, downtime_limit=1, xbzrle_cache_size=cache_size)
    source.command("migrate", uri=listen(destination))
    return source, destination


def finish(stage: Stage, source: Vmm, destination: Vmm) -> dict[str, Any]:
    """Let it end; returns the source's last report."""
    source.command("migrate-set-parameters", max_bandwidth=0, downtime_limit=1000)
    wait_until(lambda: source.command("query-migrate")["status"] in ("completed", "failed"), "the source to end")
    report: dict[str, Any] = source.command("query-migrate")
    assert report["status"] == "completed", report
    destination.wait_runstate("paused")
    assert destination.memory_digest() == source.memory_digest()
    destination.command("cont")
    stage.assert_guest_is_well(destination)
    return report


@both_ways
def test_deltas_arrive_and_the_memory_is_equal(stage: Stage, qemu: str, direction: str) -> None:
    source, destination = begin(stage, direction, qemu, 16 * MIB)
    wait_until(lambda: stats(source)["pages"] > 1000, "pages to be found in the cache")
    report = finish(stage, source, destination)
    cache = report["xbzrle-cache"]
    assert sorted(cache) == CACHE_MEMBERS
    assert cache["cache-size"] == 16 * MIB
    assert cache["cache-miss"] > 1000
    assert 0 < cache["bytes"] < 100 * cache["pages"]  # a page differs in some bytes only
    assert report["ram"]["dirty-sync-count"] >= 4


def test_a_cache_too_small_and_resized_on_the_way_loses_nothing(stage: Stage, qemu: str) -> None:
    """Where a QEMU keeps its table until the next migration, here the table follows, and keeps what fits."""
    source, destination = begin(stage, "to-qemu", qemu, MIB)
    for size in (MIB, 2 * MIB, MIB // 2):
        source.command("migrate-set-parameters", xbzrle_cache_size=size)
        wait_until(lambda size=size: stats(source)["cache-size"] == size, "the cache to follow")
        seen = stats(source)["pages"]
        wait_until(lambda seen=seen: stats(source)["pages"] > seen + 200, "pages to be found in the cache")
    finish(stage, source, destination)


def test_a_qemu_with_a_cache_too_small_is_understood(stage: Stage, qemu: str) -> None:
    source, destination = begin(stage, "from-qemu", qemu, MIB)
    wait_until(lambda: stats(source)["pages"] > 500, "pages to be found in the cache")
    finish(stage, source, destination)
