"""Postcopy of which either process is killed at any moment: `python -m tests.migration.kills --runs 200 --seed 1`.

What is left must be what state-machine.md §5 calls unavoidable, and the one that is left says it in words:

    killed        before the switch     in between                        after it
    destination   the guest runs on at the source; or it stands still     lost: the source says so, and lets nobody
                  there and runs on after `migrate_cancel` and `cont`     run it again
    source        the destination ends as well                            the guest runs on what is there; says what is not

A guest that has printed anything at the destination never runs at the source again.  With `--peer` a real QEMU stands at
one of the ends; what a QEMU that is left says and does is told, not judged.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from qemumig.cli.guest import ALL_CHECKS, FILL_RANDOM, failures_in
from qemumig.cli.vmm import VmmError
from tests.migration.endings.processes import kill, quit
from tests.support.host import qemumig_system
from tests.support.postcopy import advise, wait_status
from tests.support.vmm import MIB, GuestParameters, Leaks, Stage, Vmm, listen, migrate, wait_until
from tools.interoplib.peers import ours, real

MEMORY = 64 * MIB
MOMENTS = {  # what is waited for before chance waits a little longer: the longest wait, in seconds
    "active": 0.1,
    "device": 0.02,
    "postcopy-active": 0.5,
}
LATER = ("device", "postcopy-device", "postcopy-active", "completed")
PRINTED_S = 0.2  # what a guest printed is read by then
OLD_PREEMPT = ("-global", "migration.x-preempt-pre-7-2=on")
SETTLED = ("completed", "failed", "postcopy-paused")


@dataclass
class Scene:
    """A guest on its way, dressed by *chance*."""

    stage: Stage
    source: Vmm
    destination: Vmm
    ours: tuple[bool, bool]  # whether source, destination are qemumig

    def begin(self, chance: random.Random) -> None:
        """Start, and return at some moment of it."""
        self.source.command("migrate", uri=listen(self.destination))
        wait_status(self.source, "active")
        wait_until(lambda: self.source.command("query-migrate")["ram"]["transferred"] > 0, "some bytes to be sent")
        moment = chance.choices(list(MOMENTS), (1, 4, 5))[0]
        if moment != "active":
            self.source.command("migrate-start-postcopy")
            wait_status(self.source, *(LATER if moment == "device" else LATER[2:]))
        time.sleep(chance.random() * MOMENTS[moment])

    # ---- the destination is gone ----

    def judge_source(self, chance: random.Random) -> str:
        source = self.source
        status = wait_status(source, *SETTLED)
        time.sleep(PRINTED_S)
        has_run_there = self.destination.serial.output() != b""
        if status == "completed":
            return "had moved"
        if status == "failed":
            return self._runs_here(chance, has_run_there)
        assert source.command("query-status")["status"] == "finish-migrate"
        if not self.ours[0]:
            return "paused, as QEMU says"
        words = source.command("query-migrate")["error-desc"]
        if "if it has ended, 'migrate_cancel'" in words:
            source.command("migrate_cancel")
            wait_status(source, "failed")
            source.command("cont")
            return "in between: " + self._runs_here(chance, has_run_there)
        assert "if the destination is gone for good, so is the guest" in words, words
        for command in ("migrate_cancel", "cont"):
            with pytest.raises(VmmError):
                source.command(command)
        return "lost"

    def _runs_here(self, chance: random.Random, has_run_there: bool) -> str:
        assert not (has_run_there and self.ours[0]), "it has run at the destination"
        self.source.wait_runstate("running")
        if has_run_there:  # a QEMU of 11.1 resumes it all the same, whoever the destination was
            return "goes on at the source, a QEMU, although it has run at the destination"
        self.stage.assert_guest_is_well(self.source, arrived=False)
        if not self.ours[0] or chance.random() < 0.7:
            return "goes on at the source"
        third = self.stage.vmm("third", qemumig_system(), memory=MEMORY, incoming=True)
        advise([self.source, third], postcopy_preempt=False, multifd=False)
        self.source.command("migrate-set-parameters", max_bandwidth=0)
        migrate(self.source, third)
        third.wait_runstate("running")
        self.stage.assert_guest_is_well(third)
        return "goes on at the source, and moves after all"

    # ---- the source is gone ----

    def judge_destination(self) -> str:
        destination = self.destination
        try:
            status = wait_status(destination, *SETTLED)
        except VmmError:  # its monitor closes before it is gone
            status = "failed"
        if status == "failed":
            assert destination.process.wait(30) == 1
            assert not self.ours[1] or "load of migration failed: " in destination.last_words()
            assert not destination.serial.output()
            return "lost with the source"
        if status == "completed":
            destination.wait_runstate("running")
            self.stage.assert_guest_is_well(destination)
            return "had moved"
        destination.wait_runstate("running")
        if self.ours[1]:
            words = destination.command("query-migrate")["error-desc"]
            assert "if the source is gone for good, the guest" in words, words
        time.sleep(PRINTED_S)
        assert failures_in(destination.serial.output()) == []
        if self.ours[1]:
            quit(destination)  # its vCPUs wait for pages that will never come
            assert destination.process.returncode == 0
        return "runs on what has come"


def run_one(seed: int, number: int, directory: Path, peer: str | None) -> str:
    """Run *number*; how it ended.  AssertionError when anything is not as it should be."""
    chance = random.Random(f"{seed} {number}")
    leaks = Leaks()
    stage = Stage(Path(tempfile.mkdtemp(dir=directory)))
    try:
        scene = set_up(stage, chance, peer)
        scene.begin(chance)
        if chance.random() < 0.5:
            kill(scene.destination)
            outcome = "destination killed: " + scene.judge_source(chance)
        else:
            kill(scene.source)
            outcome = "source killed: " + scene.judge_destination()
    finally:
        stage.close()
    leaks.check()
    return outcome


def set_up(stage: Stage, chance: random.Random, peer: str | None) -> Scene:
    cpus, preempt, peer_is_source = chance.choice((1, 2)), chance.random() < 0.5, chance.random() < 0.5
    are_ours = (peer is None or not peer_is_source, peer is None or peer_is_source)
    commands = [qemumig_system() if is_ours else str(peer) for is_ours in are_ours]
    version = real(peer) if peer is not None else ours()
    old = preempt and version.is_before(8)
    multifd = chance.random() < 0.3 and not version.is_before(10, 1)
    extra = [OLD_PREEMPT if old and is_ours else () for is_ours in are_ours]
    guest = GuestParameters(
        dirty_pages=4096, print_every=cpus, fill_pages=4096, fill_mode=FILL_RANDOM, flags=ALL_CHECKS, cpus=cpus
    )
    source = stage.vmm("source", commands[0], guest=guest, memory=MEMORY, unlimited=False, extra=extra[0])
    destination = stage.vmm("destination", commands[1], memory=MEMORY, incoming=True, unlimited=False, extra=extra[1])
    bandwidth = chance.choice((0, 64 * MIB))
    advise([source, destination], postcopy_bandwidth=bandwidth, postcopy_preempt=preempt, multifd=multifd)
    return Scene(stage, source, destination, are_ours)


def run(numbers: range | list[int], seed: int, peer: str | None) -> int:
    """All runs and a line about each kind of end; how many went wrong."""
    outcomes: Counter[str] = Counter()
    failures = 0
    start = time.monotonic()
    directory = Path(tempfile.mkdtemp(prefix="qmt-"))
    try:
        for number in numbers:
            try:
                outcomes[outcome := run_one(seed, number, directory, peer)] += 1
                print(f"run {number}: {outcome}", flush=True)
            except Exception as error:
                failures += 1
                print(f"run {number} of seed {seed}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        shutil.rmtree(directory)
    print(f"{len(numbers)} runs in {time.monotonic() - start:.0f} s, {failures} went wrong")
    for outcome, count in sorted(outcomes.items()):
        print(f"  {count:4}  {outcome}", flush=True)
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.migration.kills", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--runs", type=int, default=200, help="how many (200)")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    parser.add_argument("--only", type=int, help="the number of a single run")
    parser.add_argument("--peer", metavar="QEMU", help="a real QEMU for one of the ends")
    args = parser.parse_args()
    print(f"seed {args.seed}", flush=True)
    return 1 if run(range(args.runs) if args.only is None else [args.only], args.seed, args.peer) else 0


if __name__ == "__main__":
    sys.exit(main())
