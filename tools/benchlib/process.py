"""What a VMM process costs: processor time without its vCPUs, and memory beyond the guest's; and a fair start."""

from __future__ import annotations

import mmap
import os
import re
from dataclasses import dataclass
from pathlib import Path

from qemumig.cli.vmm import Vmm

TICK = os.sysconf("SC_CLK_TCK")
MAPPING = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ \d+\s*(.*)$")


def cpu_seconds(vmm: Vmm) -> float:
    """Processor time so far, the vCPU threads left out; threads that have ended are in it."""
    pid = vmm.process.pid
    vcpus = [cpu["thread-id"] for cpu in vmm.command("query-cpus-fast")]
    whole = _ticks(Path(f"/proc/{pid}/stat"))
    return (whole - sum(_ticks(Path(f"/proc/{pid}/task/{tid}/stat")) for tid in vcpus)) / TICK


def _ticks(path: Path) -> int:
    fields = path.read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])  # utime, stime


def forget_peak(vmm: Vmm) -> None:
    """Let the peak of resident memory start anew from what it is now."""
    Path(f"/proc/{vmm.process.pid}/clear_refs").write_text("5")


def peak_overhead(vmm: Vmm) -> int:
    """Peak resident bytes since `forget_peak`, less what is resident of guest RAM now.

    A migration never shrinks guest RAM, so its size now was its size at the peak.
    """
    status = Path(f"/proc/{vmm.process.pid}/status").read_text()
    found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    if found is None:
        raise OSError(f"/proc/{vmm.process.pid}/status has no VmHWM")
    return int(found[1]) * 1024 - guest_resident(vmm)


@dataclass
class _Run:
    """Neighbouring mappings without a name: guest RAM may be split by advice to parts of it."""

    end: int
    size: int = 0
    resident: int = 0


def guest_resident(vmm: Vmm) -> int:
    """Resident bytes of guest RAM: of the nameless mappings that together are as large as it."""
    runs: list[_Run] = []
    nameless = False
    for line in Path(f"/proc/{vmm.process.pid}/smaps").read_text().splitlines():
        if found := MAPPING.match(line):
            start, end = int(found[1], 16), int(found[2], 16)
            nameless = not found[3]
            if nameless and (not runs or runs[-1].end != start):
                runs.append(_Run(start))
            if nameless:
                runs[-1].end, runs[-1].size = end, runs[-1].size + end - start
        elif nameless and line.startswith("Rss:"):
            runs[-1].resident += int(line.split()[1]) * 1024
    memory = vmm.shape.memory
    return sum(min(run.resident, memory) for run in runs if run.size >= memory)


def warm_memory(size: int) -> None:
    """Touch *size* bytes of fresh memory and give them back, so that the next who asks gets pages that exist.

    In a virtual machine whose host takes free pages away, a first touch costs the host's work on top of the kernel's;
    who comes first would pay for all.
    """
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        for offset in range(0, size, mmap.PAGESIZE):
            memory[offset] = 1
