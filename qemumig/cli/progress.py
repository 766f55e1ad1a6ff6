"""A migration as it goes on: one row per round, drawn live on a terminal and as plain lines elsewhere.

In    the answers of `query-migrate`, as they come
Out   `Rounds` makes samples and finished rounds of them; a `View` shows these

A round is what lies between two bitmap syncs (ram.md §8).  Rates are in bytes per second, sizes in bytes.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any, TextIO

from .estimate import Estimate, Estimator

MB = 1_000_000
DEVICE_STATE = 200_000  # what follows the last page is no round, and smaller than this


@dataclass(frozen=True)
class Sample:
    """One look at a running migration."""

    number: int  # of the round
    remaining: int
    bandwidth: float
    dirty_rate: float
    total: int
    left: Estimate


@dataclass(frozen=True)
class Round:
    """A finished round."""

    number: int
    seconds: float
    sent: int
    bandwidth: float
    dirty_rate: float
    remaining: int  # when it ended

    def as_json(self) -> dict[str, Any]:
        return {k: round(v, 3) if isinstance(v, float) else v for k, v in asdict(self).items()}


class Rounds:
    """Turns answers of `query-migrate` into rounds; *downtime_limit_ms* is the migration's."""

    def __init__(self, downtime_limit_ms: int = 300) -> None:
        self.finished: list[Round] = []
        self._estimator = Estimator(downtime_limit_ms / 1000)
        self._number = 0
        self._began = (time.monotonic(), 0)  # when the round began, bytes sent until then
        self._dirty_rate = 0.0  # what the last round's end showed

    def add(self, report: dict[str, Any]) -> tuple[Sample | None, Round | None]:
        """Take one answer: the sample it gives, and the round that has just ended, if one has."""
        ram = report.get("ram")
        if ram is None:
            return None, None
        now, sent = time.monotonic(), ram["transferred"]
        number = max(1, ram["dirty-sync-count"])
        bandwidth = ram["mbps"] * 1e6 / 8 or self._measured(now, sent)
        dirty_rate = ram["dirty-pages-rate"] * ram["page-size"] or self._dirty_rate
        left = self._left(report, now, number, bandwidth)
        sample = Sample(number, ram["remaining"], bandwidth, dirty_rate, ram["total"], left)
        over = report.get("status") == "completed" and sent > self._began[1] + DEVICE_STATE
        ended = self._end(now, sent, sample) if self._number and (number > self._number or over) else None
        self._number = number
        return sample, ended

    def _left(self, report: dict[str, Any], now: float, number: int, bandwidth: float) -> Estimate:
        remaining = report["ram"]["remaining"]
        if str(report.get("status")).startswith("postcopy"):
            return self._estimator.look_back(now, remaining)
        return self._estimator.look(now, number, remaining, bandwidth)

    def _measured(self, now: float, sent: int) -> float:
        """The rate since the round began, for as long as the VMM has no figure of its own."""
        seconds = now - self._began[0]
        return (sent - self._began[1]) / seconds if seconds > 0 else 0.0

    def _end(self, now: float, sent: int, sample: Sample) -> Round:
        """What is dirty after the round was written during it: a rate, long before the VMM has one (a second)."""
        seconds, size = now - self._began[0], sent - self._began[1]
        if sample.remaining:
            self._dirty_rate = sample.remaining / seconds
        done = Round(self._number, seconds, size, size / seconds, sample.dirty_rate or self._dirty_rate, sample.remaining)
        self.finished.append(done)
        self._began = (now, sent)
        return done


AROUND_ROWS = 8  # lines of a terminal that a table's title and frame, the bar and the note below it take
COLUMNS = ("round", "time", "sent", "bandwidth", "guest dirties", "then left")


def cells(done: Round) -> tuple[str, ...]:
    """A finished round, column by column."""
    return (
        str(done.number),
        f"{done.seconds:.2f} s",
        size(done.sent),
        f"{done.bandwidth / MB:.0f} MB/s",
        f"{done.dirty_rate / MB:.0f} MB/s",
        size(done.remaining),
    )


def size(count: float) -> str:
    """A number of bytes for people."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / MB:.1f} MB"


class View:
    """Plain text, one line at a time; also the base of the others."""

    def __init__(self, out: TextIO | None = None) -> None:
        self._out = out or sys.stdout
        self._next_look = 0.0

    def say(self, text: str) -> None:
        """A line for the reader."""
        print(text, file=self._out, flush=True)

    def begin(self, title: str) -> None:
        """A migration begins."""
        self.say(title)
        self.say("  " + "".join(f"{name:>15}" for name in COLUMNS))
        self._next_look = time.monotonic() + 2

    def look(self, sample: Sample) -> None:
        """How it stands; plain text says so every two seconds only."""
        if time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + 2
            self.say(f"  round {sample.number}: {size(sample.remaining)} remain, {sample.left}")

    def row(self, done: Round) -> None:
        """A round has ended."""
        self.say("  " + "".join(f"{cell:>15}" for cell in cells(done)))

    def end(self) -> None:
        """The migration is over, one way or another."""


class SilentView(View):
    """For `--json`: nothing but the object at the end."""

    def say(self, text: str) -> None:
        pass


class LiveView(View):
    """A table that grows with every round, and a bar for the one that runs; needs `rich` and a terminal."""

    def __init__(self) -> None:
        super().__init__()
        from rich.console import Console

        self._console = Console()
        self._live: Any = None
        self._title = ""
        self._rows: list[Round] = []

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False)

    def begin(self, title: str) -> None:
        from rich.live import Live

        self._title, self._rows = title, []
        self._live = Live(self._table(), console=self._console, auto_refresh=False)
        self._live.start()

    def _table(self) -> Any:
        """The last rounds, as many as the terminal has room for."""
        from rich.table import Table

        table = Table(*COLUMNS, title=self._title, title_justify="left")
        for column in table.columns:
            column.justify = "right"
        for done in self._rows[-max(3, self._console.height - AROUND_ROWS) :]:
            table.add_row(*cells(done))
        return table

    def look(self, sample: Sample) -> None:
        from rich.console import Group
        from rich.progress_bar import ProgressBar

        bar = ProgressBar(total=sample.total, completed=sample.total - sample.remaining, width=40)
        note = (
            f"round {sample.number}: {size(sample.remaining)} remain, {sample.left}\n"
            f"the guest dirties {sample.dirty_rate / MB:.0f} MB/s, {sample.bandwidth / MB:.0f} MB/s are sent"
        )
        self._live.update(Group(self._table(), bar, note), refresh=True)

    def row(self, done: Round) -> None:
        self._rows.append(done)
        self._live.update(self._table(), refresh=True)

    def end(self) -> None:
        if self._live is not None:
            self._live.update(self._table(), refresh=True)
            self._live.stop()
            self._live = None


def view_for(json_wanted: bool) -> View:
    """The view that suits where standard output goes."""
    if json_wanted:
        return SilentView()
    return LiveView() if sys.stdout.isatty() else View()


def conclude(program: str, result: dict[str, Any], as_json: bool) -> None:
    """The last words of a command: *result* as one object, if that was asked for, and what went wrong, if anything did."""
    if as_json:
        print(json.dumps(result, indent=2))
    if "error" in result:
        print(f"{program}: {result['error']}", file=sys.stderr)
