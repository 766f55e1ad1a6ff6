"""The limit of the machine for saving and restoring: pages into a file or out of it, and nothing else.

Threads share the work in equal parts, in calls of 1 MiB at fixed places, as the channels of multifd do; no test for zero,
no bitmap, no device state.  What is saved is noise in memory that is there already, what is restored goes into fresh memory
that is advised for huge pages.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .baresocket import BareRun, cpu_of_this_process, filled_memory, fresh_memory
from .process import warm_memory

CALL = 1 << 20


def measure(size: int, path: Path, half: str, threads: int) -> BareRun:
    """*half* is "save" or "restore" of *size* bytes in the file *path*, which is new, by that many threads."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with filled_memory(size) as memory, memoryview(memory) as pages:
            warm_memory(size)
            run = _timed(lambda piece, place: os.pwrite(file, piece, place), pages, threads)
        if half == "save":
            return run
        warm_memory(size)
        with fresh_memory(size) as memory, memoryview(memory) as pages:
            return _timed(lambda piece, place: os.preadv(file, [piece], place), pages, threads)
    finally:
        os.close(file)


def _timed(move: Callable[[memoryview, int], int], pages: memoryview, threads: int) -> BareRun:
    """Let *move* take every piece of *pages*."""
    share = -(-len(pages) // threads // CALL) * CALL

    def part(first: int) -> None:
        for place in range(first, min(first + share, len(pages)), CALL):
            with pages[place : place + CALL] as piece:
                if (moved := move(piece, place)) != len(piece):
                    raise OSError(f"a bare call at {place} moved {moved} bytes of {len(piece)}")

    cpu, began = cpu_of_this_process(), time.monotonic()
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(part, range(0, len(pages), share)):
            pass
    return BareRun(time.monotonic() - began, cpu_of_this_process() - cpu)
