"""The matrix: every way, every shape of machine, against every version in both directions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from qemumig.cli.vmm import GIB, VmmError

from .guests import CHECKING, DIRTYING, MIB, guest
from .peers import Peer
from .transports import WAYS
from .trial import Rules, Trial


@dataclass(frozen=True)
class Row:
    """What is migrated, and by which way; *memory* in bytes."""

    transport: str
    cpus: int
    memory: int
    kind: str = CHECKING

    def __str__(self) -> str:
        return f"{self.transport}, {plural(self.cpus)}, {size(self.memory)}, {self.kind}"


@dataclass(frozen=True)
class Column:
    """From where to where."""

    source: Peer
    destination: Peer

    def __str__(self) -> str:
        return f"{self.source.name} → {self.destination.name}"

    def lacking(self, transport: str) -> Peer | None:
        """The end that does not have the transport, if there is one."""
        return next((peer for peer in (self.source, self.destination) if not peer.has(transport)), None)


@dataclass(frozen=True)
class Cell:
    """What came out: `ok`, `failed` (with *error*), or `lacking`: one end does not have the transport at all."""

    row: Row
    column: Column
    result: str
    error: str = ""
    total_ms: int = 0  # of the migration of the running guest, as the source has it
    downtime_ms: int = 0

    def as_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {"result": self.result}
        if self.result == "ok":
            return found | {"total_ms": self.total_ms, "downtime_ms": self.downtime_ms}
        return found | {"error": self.error}


def rows(quick: bool) -> list[Row]:
    """All rows, or the few that show most; the way varies slowest."""
    if quick:
        return [*(Row(way, 2, 64 * MIB) for way in WAYS), Row("tcp", 2, 512 * MIB, DIRTYING)]
    checking = [Row(*shape) for shape in product(WAYS, (1, 2, 4), (64 * MIB, 512 * MIB, 4 * GIB))]
    dirtying = [Row(way, cpus, memory, DIRTYING) for way in WAYS for cpus, memory in ((1, 64 * MIB), (2, 512 * MIB))]
    return checking + dirtying


def columns(system: Peer, qemus: Sequence[Peer], *, control: bool = False) -> list[Column]:
    """To each QEMU and from it; *control* adds every QEMU to every QEMU, where we have no part."""
    found = [Column(*pair) for qemu in qemus for pair in ((system, qemu), (qemu, system))]
    return found + ([Column(*pair) for pair in product(qemus, repeat=2)] if control else [])


def run_matrix(
    rules: Rules, wanted: Sequence[Row], across: Sequence[Column], progress: Callable[[Cell], None]
) -> list[Cell]:
    """Every cell, row by row; *progress* gets each when it is done."""
    cells = []
    for row, column in product(wanted, across):
        progress(cell := run_cell(rules, row, column))
        cells.append(cell)
    return cells


def run_cell(rules: Rules, row: Row, column: Column) -> Cell:
    """Migrate twice: a guest that runs on, and one that is held on arrival so that its memory can be compared."""
    if peer := column.lacking(row.transport):
        return Cell(row, column, "lacking", f"QEMU {peer.name} has no {row.transport}:")
    parameters = guest(row.kind, row.memory, row.cpus)
    outcomes = []
    for held in (False, True):
        trial = Trial(column.source, column.destination, row.transport, row.memory, parameters, held)
        try:
            outcomes.append(trial.run(rules))
        except VmmError as error:
            return Cell(row, column, "failed", f"{'held: ' if held else ''}{error}")
    report = outcomes[0].report
    return Cell(row, column, "ok", total_ms=report["total-time"], downtime_ms=report["downtime"])


def size(memory: int) -> str:
    """ "512M", "4G" """
    return f"{memory >> 30}G" if memory % GIB == 0 else f"{memory >> 20}M"


def plural(cpus: int) -> str:
    return f"{cpus} vCPU{'s' if cpus > 1 else ''}"
