"""One guest on many hops, and many guests on one hop each, at random."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import cycle

from qemumig.cli.guest import ALL_CHECKS, FILL_HALF_RANDOM, FILL_RANDOM, PAGE_SIZE, GuestParameters
from qemumig.cli.vmm import VmmError

from .guests import BASE, CHECKING, MIB, guest
from .matrix import plural, size
from .multifd import WAYS as MULTIFD_WAYS
from .multifd import random_multifd
from .peers import Peer, options
from .transports import WAYS
from .trial import Rules, Stage, Trial, hop

MEMORY = 256 * MIB
CPUS = 2
DIRTY_LIMIT = 32 * MIB  # more than that the smallest memory of `random_trial` may not hold

Say = Callable[[str], None]


def run_hops(rules: Rules, system: Peer, qemus: Sequence[Peer], hops: int, say: Say) -> None:
    """qemumig → QEMU → qemumig → the next QEMU …, each hop by the next way that both ends have.

    At each hop the memory of both stopped ends is compared, and then the guest is asked.  VmmError ends the journey.
    """
    route = [peer for qemu in qemus for peer in (system, qemu)]
    ways = cycle(WAYS)
    with Stage(rules, guest(CHECKING, MEMORY, CPUS), MEMORY) as stage:
        # nobody knows yet whom the first end will meet; a newer QEMU never meets an older one here: qemumig is between
        here, peer = stage.source(route[0]), route[0]
        for number in range(1, hops + 1):
            following = route[number % len(route)]
            transport = next(way for way in ways if peer.has(way) and following.has(way))
            there = stage.destination(following, options(peer, following).destination, name=f"hop{number}", held=True)
            outcome = hop(here, there, transport, rules.timeout, held=True)
            here.close()
            say(
                f"hop {number}/{hops}: {peer.name} → {following.name} by {transport}: ok, "
                f"{outcome.report['total-time']} ms, memory equal"
            )
            here, peer = there, following


@dataclass(frozen=True)
class RandomTrial:
    """A trial made of nothing but its seed, so that it can be made again alone."""

    seed: int
    trial: Trial

    def __str__(self) -> str:
        trial = self.trial
        parameters = trial.guest
        return (
            f"seed {self.seed}: {trial.source.name} → {trial.destination.name} by {trial.transport}, "
            f"{plural(parameters.cpus)}, {size(trial.memory)}, {parameters.dirty_pages} pages rewritten from "
            f"{parameters.dirty_base:#x} on with {parameters.spin} loops between, {parameters.fill_pages} filled"
            f"{', held on arrival' if trial.held else ''}{f', {trial.multifd}' if trial.multifd else ''}"
        )


def random_trial(seed: int, system: Peer, qemus: Sequence[Peer], *, multifd: bool = False) -> RandomTrial:
    """Even seeds go to a QEMU, odd ones come from it; everything else is chance.  *multifd*: so, on many connections."""
    chance = random.Random(seed)
    qemu = chance.choice(qemus)
    source, destination = (qemu, system) if seed % 2 else (system, qemu)
    ways = MULTIFD_WAYS if multifd else WAYS
    transport = chance.choice([way for way in ways if source.has(way) and destination.has(way)])
    memory = chance.randrange(96 * MIB, 768 * MIB, PAGE_SIZE)
    trial = Trial(source, destination, transport, memory, _guest(chance, memory), chance.random() < 0.5)
    if multifd:
        chosen = random_multifd(chance, source, destination, transport)
        trial = replace(trial, multifd=chosen, guest=chosen.limit(trial.guest))
    return RandomTrial(seed, trial)


def _guest(chance: random.Random, memory: int) -> GuestParameters:
    cpus = chance.choice((1, 2, 3, 4))
    pages = chance.randrange(cpus, DIRTY_LIMIT // PAGE_SIZE)
    base = chance.randrange(BASE, memory - 2 * DIRTY_LIMIT, PAGE_SIZE)
    fill_base = base + pages * PAGE_SIZE
    return GuestParameters(
        dirty_base=base,
        dirty_pages=pages,
        print_every=max(1, 100_000 * cpus**2 // pages),
        spin=chance.choice((0, 0, 10, 1000)),
        fill_base=fill_base,
        fill_pages=chance.randrange((memory - fill_base) // PAGE_SIZE),
        fill_mode=chance.choice((FILL_RANDOM, FILL_HALF_RANDOM)),
        flags=ALL_CHECKS,
        cpus=cpus,
        apic_count=chance.choice((1_000_000, 10_000_000)),
    )


def run_random(rules: Rules, trials: Sequence[RandomTrial], say: Say) -> list[str]:
    """Run them all; returns what failed, each with the words that make it again."""
    failures = []
    for number, each in enumerate(trials, 1):
        try:
            outcome = each.trial.run(rules)
        except VmmError as error:
            failures.append(f"{each}: {error}")
            say(f"{number}/{len(trials)} {each}: FAILED: {error}")
            continue
        say(f"{number}/{len(trials)} {each}: ok, {outcome.report['total-time']} ms")
    return failures
