"""The comparison as a table."""

from __future__ import annotations

from typing import Any

from .workloads import Workload

BARE_SOCKET, BARE_FILE = "bare socket", "bare file"
BARE = (BARE_SOCKET, BARE_FILE)
COLUMNS = (  # heading, figure, format
    ("MB/s of guest memory", "rate", "{:.0f}"),
    ("total ms", "total_ms", "{:.0f}"),
    ("downtime ms", "downtime_ms", "{:.0f}"),
    ("silence ms", "silence_ms", "{:.1f}"),
    ("longest ms", "longest_silence_ms", "{:.1f}"),
    ("CPU s/GiB src", "cpu_source", "{:.2f}"),
    ("dst", "cpu_destination", "{:.2f}"),
    ("extra MB src", "extra_source", "{:.0f}"),
    ("dst", "extra_destination", "{:.0f}"),
)


def bare_name(workload: Workload) -> str:
    """What the limit of the machine is called."""
    return BARE_FILE if workload.file else BARE_SOCKET


def ratios(results: dict[str, Any], ours: str | None) -> None:
    """Add to each contestant's results its rate against the best QEMU's and against the limit's."""
    rates = {name: result["rate"]["median"] for name, result in results.items()}
    qemus = [rate for name, rate in rates.items() if name not in (ours, *BARE)]
    limit = next((rates[name] for name in BARE if name in rates), None)
    for name, result in results.items():
        result["ratio_to_best_qemu"] = rates[name] / max(qemus) if qemus and name not in BARE else None
        result["share_of_bare"] = rates[name] / limit if limit and name not in BARE else None


def table(title: str, results: dict[str, Any]) -> str:
    """One workload: a line per contestant, medians with (lowest..highest) where there are several runs."""
    heading = ["", *(name for name, _, _ in COLUMNS), "x best QEMU", "of bare"]
    rows = [heading]
    for name, result in results.items():
        cells = [_cell(result.get(figure), form) for _, figure, form in COLUMNS]
        rows.append([name, *cells, _ratio(result["ratio_to_best_qemu"]), _percent(result["share_of_bare"])])
    widths = [max(len(row[column]) for row in rows) for column in range(len(heading))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(["", title, *lines])


def _cell(figure: dict[str, float] | None, form: str) -> str:
    if figure is None:
        return "-"
    median, low, high = (form.format(figure[key]) for key in ("median", "min", "max"))
    return median if low == high else f"{median} ({low}..{high})"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"
