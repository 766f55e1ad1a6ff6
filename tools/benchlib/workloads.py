"""What the guest does while it is migrated."""

from __future__ import annotations

from dataclasses import dataclass

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
    data_bound: bool = True  # the link carries the memory itself, so a bare socket can be compared
    deltas: bool = False  # XBZRLE: what is measured is pages found in the cache per CPU second of the source
    only_asked_for: bool = False

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


WORKLOADS = (
    Workload("random-idle", "random memory, guest stopped", FILL_RANDOM, running=False),
    Workload("random-busy", "random memory, guest runs and writes 64 KiB", FILL_RANDOM, running=True),
    Workload("zero-idle", "zero memory, guest stopped", FILL_NOTHING, running=False, data_bound=False),
    Workload("dirtying", "guest rewrites 32 MiB without pause", FILL_HALF_RANDOM, running=True, dirty=32 * MIB),
    # a fifth of the pages finds no slot in a cache of 64 MiB, so that rounds last; still, a guest that has no core to
    # itself gets away, which ends the run: therefore only when asked for, best with --cpus 4
    Workload(
        *(
            "xbzrle",
            "guest changes 8 bytes in each of 20480 pages without pause; MB of pages as deltas per CPU s of the source",
        ),
        *(FILL_NOTHING, True, 80 * MIB, False, True, True),
    ),
)
