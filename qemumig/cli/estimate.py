"""How long a migration still takes: a range, or that it does not end like this, and never more than can be known.

In    one look after the other at `query-migrate`: when, how much remains, which round, how fast bytes leave
Out   an Estimate

    round n     S(n) bytes to send ──────────▶ 0          at `speed`, meanwhile the guest makes S(n+1) dirty
    until       S(n) <= bandwidth × downtime-limit        then the guest is stopped and the rest is sent

What a round leaves behind, as a share of what it began with, is how the guest's writing compares with the link: the ratio
S(n+1) / S(n).  Ratios and speeds of the last rounds give the range; with a ratio of one there is no end.  Nothing else is
assumed of the guest: neither a constant rate nor how much memory it writes to.

Speed is counted in bytes that no longer remain, not in bytes on the wire: a page of zeroes costs hardly any of those.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

WINDOW_S = 0.4  # speeds are measured over this long at least
SPEEDS = 8  # so many of the last ones count
RATIOS = 3
NO_PROGRESS = 0.95  # a round that leaves more than this share of what it began with gains nothing
MARGIN = 0.05  # what was the same all the time may still change by this share
WAVES = 6  # rounds over which a guest that writes in waves must have come closer to the end
MOST_ROUNDS = 1000


@dataclass(frozen=True)
class Estimate:
    """Between *low* and *high* seconds from now; without *high* at least *low*; *converges* is False when it never ends."""

    low: float = 0.0
    high: float | None = None
    converges: bool = True

    def __str__(self) -> str:
        if not self.converges:
            return "does not converge at this rate"
        if self.high is None:
            return f"at least {span(self.low)} left"
        low, high = span(self.low), span(self.high)
        return f"{low} left" if low == high else f"{low} to {high} left"


def span(seconds: float) -> str:
    """A duration for people."""
    if seconds < 0.1:
        return "0.1 s"
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min"


class Estimator:
    """Looks at one migration; *downtime_limit_s* is how long its guest may stand still."""

    def __init__(self, downtime_limit_s: float) -> None:
        self._limit_s = downtime_limit_s
        self._number = 0
        self._begin = (0.0, 0)  # of the window in which speed is measured: time, bytes that remained
        self._speeds: deque[float] = deque(maxlen=SPEEDS)
        self._sizes: deque[float] = deque(maxlen=WAVES)  # what the last rounds began with, the current one last
        self._ratios: deque[float] = deque(maxlen=RATIOS)

    def look(self, now: float, number: int, remaining: int, bandwidth: float) -> Estimate:
        """*remaining* bytes in round *number* at the time *now*, with *bandwidth* bytes per second on the wire."""
        if number != self._number:
            self._next_round(number, remaining)
            self._begin = (now, remaining)
        elif remaining > self._sizes[-1]:  # the round began between two looks
            self._sizes[-1] = remaining
        self._measure(now, remaining)
        return self._estimate(remaining, bandwidth)

    def look_back(self, now: float, remaining: int) -> Estimate:
        """The same in postcopy: the rest only has to be sent."""
        self._measure(now, remaining)
        if not self._speeds:
            return Estimate()
        return Estimate(remaining / max(self._speeds), remaining / min(self._speeds))

    def _next_round(self, number: int, remaining: int) -> None:
        """Several rounds may have passed unseen; each has made its share of the difference."""
        if self._sizes and self._sizes[-1] > 0:
            self._ratios.append(max(remaining / self._sizes[-1], 1e-9) ** (1 / max(1, number - self._number)))
        self._sizes.append(remaining)
        self._number = number

    def _measure(self, now: float, remaining: int) -> None:
        began, before = self._begin
        if now - began < WINDOW_S and self._speeds:
            return
        if now > began and remaining < before:
            self._speeds.append((before - remaining) / (now - began))
            self._begin = (now, remaining)

    def _estimate(self, remaining: int, bandwidth: float) -> Estimate:
        if not self._speeds:
            return Estimate()
        slow, fast = min(self._speeds) * (1 - MARGIN), max(self._speeds) * (1 + MARGIN)
        enough = bandwidth * self._limit_s
        if self._gains_nothing(enough):
            return Estimate(converges=False)
        low = self._seconds(remaining, fast, min(self._ratios, default=0.0), enough)
        worst = max(self._ratios, default=1.0) * (1 + MARGIN)
        high = self._seconds(remaining, slow, worst, enough) if len(self._ratios) > 1 else None
        return Estimate(low or remaining / fast, high)

    def _gains_nothing(self, enough: float) -> bool:
        """Whether rounds leave as much as they began with, and that is too much to stop the guest for."""
        if not self._ratios or min(self._sizes) <= enough:
            return False
        if self._ratios[-1] >= NO_PROGRESS:
            return True
        half, sizes = WAVES // 2, list(self._sizes)
        return len(sizes) == WAVES and min(sizes[half:]) >= NO_PROGRESS * min(sizes[:half])

    def _seconds(self, remaining: int, speed: float, ratio: float, enough: float) -> float | None:
        """Until the guest is stopped and the rest is there; None when that is never."""
        seconds, size = remaining / speed, self._sizes[-1] * ratio
        for _ in range(MOST_ROUNDS):
            if size <= enough:
                return seconds + size / speed
            if ratio >= 1:
                return None
            seconds += size / speed
            size *= ratio
        return None
