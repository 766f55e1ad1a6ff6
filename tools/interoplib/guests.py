"""What the guest does while it is migrated, for a machine of a given shape."""

from __future__ import annotations

from qemumig.cli.guest import ALL_CHECKS, FILL_HALF_RANDOM, PAGE_SIZE, GuestParameters
from qemumig.cli.vmm import GIB, HIGH_MEMORY, LOW_MEMORY_END

MIB = 1 << 20
BASE = 16 * MIB  # below it: the guest's own tables

CHECKING = "checking"  # modest: it rewrites 4 MiB, and all its self-checks are on
DIRTYING = "dirtying"  # it rewrites 32 MiB as fast as it can, and checks just as much
DIRTY = {CHECKING: 4 * MIB, DIRTYING: 32 * MIB}
SMALLEST_MEMORY = 64 * MIB


def guest(kind: str, memory: int, cpus: int) -> GuestParameters:
    """The guest named *kind* for that much *memory* (bytes, at least SMALLEST_MEMORY).

    Where there is memory above 3 GiB, which lies at 4 GiB, the range that is written all the time is there.
    """
    dirty = DIRTY[kind]
    high = memory > LOW_MEMORY_END + dirty + BASE
    dirty_base = HIGH_MEMORY + BASE if high else BASE
    fill_base = BASE if high else BASE + dirty
    pages = dirty // PAGE_SIZE
    return GuestParameters(
        dirty_base=dirty_base,
        dirty_pages=pages,
        print_every=max(1, 100_000 * cpus**2 // pages),  # near 10 ms per letter at 100 ns per page
        fill_base=fill_base,
        fill_pages=min(memory // 4, 64 * MIB) // PAGE_SIZE,
        fill_mode=FILL_HALF_RANDOM,
        flags=ALL_CHECKS,
        cpus=cpus,
        map_gib=max(4, -(-memory // GIB) + 2),  # the interrupt controllers are in the fourth
    )
