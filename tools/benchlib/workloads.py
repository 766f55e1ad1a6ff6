"""What the guest does while it is migrated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qemumig.cli.guest import ALL_CHECKS, FILL_HALF_RANDOM, FILL_NOTHING, FILL_RANDOM, PAGE_SIZE, GuestParameters

MIB = 1 << 20
BASE = 16 * MIB  # below it: the guest's own tables
SMALL = 16  # pages that a guest rewrites which is there to be busy only


@dataclass(frozen=True)
class Workload:
    """One column of the comparison; *dirty* in bytes."""

    name: str
    what: str
    fill: int
    running: bool
    dirty: int = SMALL * PAGE_SIZE
    data_bound: bool = True  # the link or file takes the memory itself, so a bare one can be compared
    deltas: bool = False  # XBZRLE: what is measured is pages found in the cache per CPU second of the source
    least_cpus: int = 1
    prealloc: bool = False  # all of guest memory exists from the start, on both sides
    sockets: int = 1  # that many bare ones are the limit; of a file: threads
    file: str = ""  # "save" or "restore": memory goes through a file, and this half of it is measured
    capabilities: tuple[str, ...] = ()
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def guest(self, memory: int, cpus: int) -> GuestParameters:
        """The guest for a machine with that much memory (bytes)."""
        pages = self.dirty // PAGE_SIZE
        return GuestParameters(
            dirty_base=BASE,
            dirty_pages=pages * cpus if pages == SMALL else pages,
            print_every=max(1, 10_000 * cpus**2 // pages),  # near 1 ms per letter at 100 ns per page
            fill_base=BASE + self.dirty * cpus,
            fill_pages=(memory - BASE - self.dirty * cpus) // PAGE_SIZE if self.fill else 0,
            fill_mode=self.fill,
            flags=ALL_CHECKS,
            cpus=cpus,
        )


TWO_CHANNELS: Mapping[str, Any] = {"capabilities": ("multifd",), "parameters": {"multifd-channels": 2}, "sockets": 2}


def _compressed(method: str) -> Workload:
    return Workload(
        f"multifd-{method}",
        f"half-compressible memory over 2 channels with {method} level 1, guest runs and writes 64 KiB",
        FILL_HALF_RANDOM,
        running=True,
        data_bound=False,
        capabilities=("multifd",),
        parameters={"multifd-channels": 2, "multifd-compression": method},
    )


WORKLOADS = (
    Workload("random-idle", "random memory, guest stopped", FILL_RANDOM, running=False),
    Workload("random-busy", "random memory, guest runs and writes 64 KiB", FILL_RANDOM, running=True),
    Workload("zero-idle", "zero memory, guest stopped", FILL_NOTHING, running=False, data_bound=False),
    Workload(
        *("zero-prealloc", "zero memory that was allocated beforehand, guest stopped", FILL_NOTHING, False),
        data_bound=False,
        prealloc=True,
    ),
    Workload("dirtying", "guest rewrites 32 MiB without pause", FILL_HALF_RANDOM, running=True, dirty=32 * MIB),
    # the cache of 64 MiB has a slot for every page, and rounds last because the limit is low; still, a guest that has no
    # core to itself might write nothing for a whole round, and get away: one of several vCPUs always runs
    Workload(
        "xbzrle",
        "guest changes 8 bytes in each of 12288 pages without pause; MB of pages as deltas per CPU s of the source",
        FILL_NOTHING,
        running=True,
        dirty=48 * MIB,
        data_bound=False,
        deltas=True,
        least_cpus=4,
    ),
    Workload(
        *("multifd-idle", "random memory over 2 channels, guest stopped", FILL_RANDOM, False),
        **TWO_CHANNELS,
    ),
    Workload(
        *("multifd-busy", "random memory over 2 channels, guest runs and writes 64 KiB", FILL_RANDOM, True),
        **TWO_CHANNELS,
    ),
    _compressed("zstd"),
    _compressed("zlib"),
    *(
        Workload(
            *(f"mapped-{half}", f"{half} of random memory by 2 channels, mapped-ram, guest stopped", FILL_RANDOM, False),
            sockets=2,
            file=half,
            capabilities=("mapped-ram", "multifd"),
            parameters={"multifd-channels": 2},
        )
        for half in ("save", "restore")
    ),
)
