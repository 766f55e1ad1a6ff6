"""What came out, for people and for programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .matrix import Cell, Column, Row, size

NOT_THERE = "–"


def as_json(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """One object a row, with a cell for each column."""
    found: dict[Row, dict[str, Any]] = {}
    for cell in cells:
        row = cell.row
        entry = {"transport": row.transport, "cpus": row.cpus, "memory": row.memory, "guest": row.kind, "cells": {}}
        found.setdefault(row, entry)["cells"][str(cell.column)] = cell.as_json()
    return list(found.values())


def table(cells: Sequence[Cell]) -> str:
    """A line per row: total time and downtime of each cell, as the source has them."""
    across = _columns(cells)
    lines = [["transport", "vCPUs", "memory", "guest", *map(str, across)]]
    for row in dict.fromkeys(cell.row for cell in cells):
        heads = [row.transport, str(row.cpus), size(row.memory), row.kind]
        lines.append([*heads, *(_text(cell) for cell in cells if cell.row == row)])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _columns(cells: Sequence[Cell]) -> list[Column]:
    return list(dict.fromkeys(cell.column for cell in cells))


def _text(cell: Cell) -> str:
    if cell.result == "ok":
        return f"ok {cell.total_ms}/{cell.downtime_ms} ms"
    return NOT_THERE if cell.result == "lacking" else "FAILED"


def markdown(cells: Sequence[Cell]) -> str:
    """A line per transport and guest: how many of its machines arrived well, of how many that were tried."""
    across = _columns(cells)
    lines = ["| transport | guest | vCPUs | memory | " + " | ".join(map(str, across)) + " |"]
    lines.append("|---|---|---|---|" + "---|" * len(across))
    for transport, kind in dict.fromkeys((cell.row.transport, cell.row.kind) for cell in cells):
        these = [cell for cell in cells if (cell.row.transport, cell.row.kind) == (transport, kind)]
        shapes = [", ".join(map(str, sorted({c.row.cpus for c in these})))]
        shapes.append(", ".join(map(size, sorted({c.row.memory for c in these}))))
        counts = [_count([cell for cell in these if cell.column == column]) for column in across]
        lines.append("| " + " | ".join([f"`{transport}`", kind, *shapes, *counts]) + " |")
    return "\n".join([*lines, "", *footnotes(cells)])


def _count(cells: Sequence[Cell]) -> str:
    tried = [cell for cell in cells if cell.result != "lacking"]
    good = sum(cell.result == "ok" for cell in tried)
    return f"{good} of {len(tried)}" if tried else NOT_THERE


def footnotes(cells: Sequence[Cell]) -> list[str]:
    """What is not there, and why; and every failure, in full."""
    lacking = dict.fromkeys(cell.error for cell in cells if cell.result == "lacking")
    failed = [f"FAILED {cell.row}, {cell.column}: {cell.error}" for cell in cells if cell.result == "failed"]
    return [*(f"{NOT_THERE} {reason}" for reason in lacking), *failed]
