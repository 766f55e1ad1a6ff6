"""The comparison as a picture: an SVG with a row of panels per workload, one panel a figure, one bar a contestant.

    bar = median      whisker = lowest to highest      each panel has its own scale, from zero

Written by hand: bars and text are all there is to draw.
"""

from __future__ import annotations

from typing import Any
from xml.sax.saxutils import escape

FIGURES = (  # what is drawn: heading, figure, format; the last word says which way is better
    ("MB/s of guest memory (more)", "rate", "{:.0f}"),
    ("total ms (less)", "total_ms", "{:.0f}"),
    ("downtime ms (less)", "downtime_ms", "{:.0f}"),
    ("silence of the guest ms (less)", "silence_ms", "{:.0f}"),
    ("CPU s/GiB, source (less)", "cpu_source", "{:.2f}"),
    ("CPU s/GiB, destination (less)", "cpu_destination", "{:.2f}"),
)
COLOURS = ("#0b6e99", "#c8553d", "#e0a458", "#7a9e7e", "#6d597a", "#8d99ae")
MARGIN, NAMES, BAR_WIDTH, VALUE, GAP = 16, 110, 110, 60, 18  # of the picture, left of a panel, in it, right of it, between
BAR, STEP, HEADING = 12, 20, 44  # the height of a bar, from one to the next, above the first
PANEL = BAR_WIDTH + VALUE + GAP


def svg(found: dict[str, Any]) -> str:
    """The picture of what `tools/bench --json` writes."""
    workloads: dict[str, dict[str, Any]] = found["workloads"]
    names = list(dict.fromkeys(name for results in workloads.values() for name in results))
    colours = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(names)}
    parts, top = [], MARGIN
    for name, results in workloads.items():
        parts += _row(f"{name}, {found['memory'] >> 20} MiB, {found['repeat']} runs each", results, colours, top)
        top += HEADING + STEP * len(results) + GAP
    parts.append(_text(MARGIN, top + 10, _host(found["host"]), "note"))
    width, height = 2 * MARGIN + NAMES + PANEL * len(FIGURES), top + 24
    return "\n".join([_opening(width, height), *parts, "</svg>", ""])


def _row(title: str, results: dict[str, Any], colours: dict[str, str], top: int) -> list[str]:
    """One workload: the names on the left, a panel for each figure."""
    parts = [_text(MARGIN, top + 12, title, "title")]
    for index, name in enumerate(results):
        parts.append(_text(MARGIN + NAMES - 8, top + HEADING + STEP * index + BAR - 2, name, "name"))
    for column, (heading, figure, form) in enumerate(FIGURES):
        left = MARGIN + NAMES + PANEL * column
        parts.append(_text(left, top + HEADING - 10, heading, "heading"))
        measured = {name: result[figure] for name, result in results.items() if result.get(figure)}
        largest = max((each["max"] for each in measured.values()), default=0.0) or 1.0
        for index, name in enumerate(results):
            if name in measured:
                y = top + HEADING + STEP * index
                parts += _bar(left, y, measured[name], BAR_WIDTH / largest, form, colours[name])
    return parts


def _bar(left: float, top: float, figure: dict[str, float], scale: float, form: str, colour: str) -> list[str]:
    median, low, high = (figure[key] * scale for key in ("median", "min", "max"))
    middle = top + BAR / 2
    parts = [f'<rect x="{left}" y="{top}" width="{median:.1f}" height="{BAR}" fill="{colour}"/>']
    if high > low:
        ends = (
            f"M{left + low:.1f} {middle - 3}v6M{left + low:.1f} {middle}H{left + high:.1f}M{left + high:.1f} {middle - 3}v6"
        )
        parts.append(f'<path d="{ends}" class="whisker"/>')
    parts.append(_text(left + max(median, high) + 5, top + BAR - 2, form.format(figure["median"]), "value"))
    return parts


def _host(host: dict[str, Any]) -> str:
    return (
        f"Medians, whiskers from the lowest to the highest. {host['cpu']}, {host['cpus']} CPUs, Linux {host['kernel']}. "
        "Only ratios of one run mean anything."
    )


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}">{escape(text)}</text>'


def _opening(width: int, height: int) -> str:
    return f"""<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">
<style>
text {{ font: 11px sans-serif; fill: #222 }}
.title {{ font-weight: bold; font-size: 13px }}
.heading, .note {{ fill: #666 }}
.name {{ text-anchor: end }}
.whisker {{ stroke: #222; fill: none }}
</style>
<rect width="100%" height="100%" fill="#fff"/>"""
