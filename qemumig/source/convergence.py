"""Windows of 100 ms: how fast bytes leave, how many may still leave now, and when to stop the guest (ram.md §7).

    bandwidth        = bytes of the window / its length                         what is told (mbps, expected-downtime)
    guest bandwidth  = bytes of guest memory that they brought / its length     never less than bandwidth
    threshold        = (avail-switchover-bandwidth or guest bandwidth) × downtime-limit

Where pages leave smaller than they are (multifd with compression, deltas), more of the guest goes through the link than
bytes do.  What is left is counted in bytes of the guest, so it is compared with the guest bandwidth: otherwise the rounds
of a busy guest that could have moved long since would go on, with strong compression for ever.  Pages of zeroes count on
neither side; what is left when the guest is stopped is what it writes.

The guest is stopped when what is left can be sent within the downtime limit *and* another round would not make it
notably less: a round that halves the rest costs milliseconds while the guest runs and saves as many while it stands.

Threads   the migration thread; the figures may be read by anyone.
"""

from __future__ import annotations

import select
import time
from collections.abc import Callable
from dataclasses import dataclass

from .. import trace
from ..errors import MigrationCancelled
from ..options import MigrationOptions
from ..wire.format import TARGET_PAGE_SIZE

WINDOW_S = 0.1
NOT_WORTH_A_ROUND_S = 0.004  # a rest that is sent within this time is not reduced any further
WORTH_A_ROUND = 0.7  # a round is worth it when it left less than this share of the rest before
BAD_PERIODS = 2  # after so many the vCPUs are held back, or more than before
HIGHEST_PERCENTAGE = 99
EXTRA_ROUNDS = 6  # and no more of them than this: the guest may dirty memory in waves


class Pacer:
    """The rate limit and the bandwidth of one attempt; bytes are counted by the caller."""

    def __init__(self, options: MigrationOptions, quit_fd: int) -> None:
        self._options = options
        self._poll = select.poll()
        self._poll.register(quit_fd, select.POLLIN)
        self._start_s = time.monotonic()
        self._start_bytes = 0
        self._start_pages = 0
        self._start_data_pages = 0
        self.bandwidth = 0.0  # bytes per second in the last whole window
        self.guest_bandwidth = 0.0
        self.mbps = 0.0
        self.pages_per_second = 0.0

    def restart(self, sent_bytes: int, sent_pages: int, data_pages: int = 0) -> None:
        """Begin a window now; *data_pages*: of *sent_pages*, those that were not zero."""
        self._start_s = time.monotonic()
        self._start_bytes = sent_bytes
        self._start_pages = sent_pages
        self._start_data_pages = data_pages

    def allowance(self, sent_bytes: int, limit_name: str = "max-bandwidth") -> int:
        """How many bytes may still leave in this window; the rate limit 0 means as many as will."""
        limit = self._options.parameter(limit_name)
        if limit == 0:
            return 1 << 62
        return max(int(limit * WINDOW_S) - (sent_bytes - self._start_bytes), 0)

    def update(self, sent_bytes: int, sent_pages: int, data_pages: int = 0) -> bool:
        """Close the window if it is over, and take its figures; True if it was."""
        elapsed = time.monotonic() - self._start_s
        if elapsed < WINDOW_S:
            return False
        window_bytes = sent_bytes - self._start_bytes
        self.bandwidth = window_bytes / elapsed
        self.guest_bandwidth = self._guest_bytes(sent_bytes, data_pages) / elapsed
        self.mbps = self.bandwidth * 8 / 1e6
        self.pages_per_second = (sent_pages - self._start_pages) / elapsed
        self.restart(sent_bytes, sent_pages, data_pages)
        return True

    def _guest_bytes(self, sent_bytes: int, data_pages: int) -> int:
        """Bytes of guest memory that have left in this window, in whatever form."""
        return max(sent_bytes - self._start_bytes, (data_pages - self._start_data_pages) * TARGET_PAGE_SIZE)

    def rest_ms(self) -> float:
        """What is left of this window."""
        return max(self._start_s + WINDOW_S - time.monotonic(), 0) * 1000

    def wait(self) -> None:
        """Sleep until the window is over; MigrationCancelled when told to quit."""
        rest = self._start_s + WINDOW_S - time.monotonic()
        if rest > 0 and self._poll.poll(rest * 1000):
            raise MigrationCancelled("the migration was cancelled")

    def current_bandwidth(self, sent_bytes: int, data_pages: int = 0) -> float:
        """Bytes of the guest per second: of the last whole window, or of the first one as far as it goes."""
        if self.guest_bandwidth:
            return self.guest_bandwidth
        elapsed = time.monotonic() - self._start_s
        return self._guest_bytes(sent_bytes, data_pages) / elapsed if elapsed > 0 else 0.0

    def threshold(self, bandwidth: float) -> float:
        """Bytes of the guest that can be sent while it stands still, by the downtime limit, at *bandwidth*."""
        return (self._options.parameter("avail-switchover-bandwidth") or bandwidth) * (
            self._options.parameter("downtime-limit") / 1000
        )


class SwitchoverRule:
    """Decides when to look at the hypervisor's log, and then whether to stop the guest; bandwidth in bytes per second.

    A round is sent to its end first, or until hardly anything of it is left: the guest runs meanwhile.
    """

    def __init__(self) -> None:
        self._previous: float | None = None
        self._extra_rounds = 0

    def may_sync(self, pending: int, threshold: float, bandwidth: float) -> bool:
        """True when the round at hand, of which *pending* bytes are left, is over or as good as over."""
        return pending == 0 or pending <= min(threshold, bandwidth * NOT_WORTH_A_ROUND_S)

    def is_time(self, pending: int, threshold: float, bandwidth: float) -> bool:
        """After a sync: *pending* bytes are dirty now."""
        previous, self._previous = self._previous, pending
        if pending == 0:
            return True
        if pending > threshold:
            return False
        if pending <= bandwidth * NOT_WORTH_A_ROUND_S or self._extra_rounds >= EXTRA_ROUNDS:
            return True
        if previous is not None and pending > previous * WORTH_A_ROUND:
            return True
        self._extra_rounds += 1
        return False


class DirtyRate:
    """Pages that the guest dirties per second, over periods of a second or more (ram.md §8)."""

    def __init__(self) -> None:
        self._start_s = time.monotonic()
        self._start_pages = 0
        self._start_bytes = 0
        self.pages_per_second = 0

    def update(self, new_pages: int, sent_bytes: int) -> Period | None:
        """*new_pages*: found dirty by all syncs so far; the period that is over with this one, if it is."""
        elapsed = time.monotonic() - self._start_s
        if elapsed <= 1:
            return None
        period = Period((new_pages - self._start_pages) * TARGET_PAGE_SIZE, sent_bytes - self._start_bytes)
        self.pages_per_second = int((new_pages - self._start_pages) / elapsed)
        self._start_s += elapsed
        self._start_pages = new_pages
        self._start_bytes = sent_bytes
        return period


@dataclass(frozen=True)
class Period:
    """What the guest dirtied in a period, and what was sent; bytes."""

    dirtied: int
    sent: int


class AutoConverge:
    """Takes time from the vCPUs of a guest that dirties memory faster than it is sent (convergence.md §1, §2).

    Every second period that is bad takes more of it; the two need not follow each other.
    """

    def __init__(self, options: MigrationOptions, throttle: Callable[[int], None]) -> None:
        self._options = options
        self._throttle = throttle
        self._hits = 0
        self.percentage = 0

    def judge(self, period: Period) -> None:
        """A period is over."""
        if not self._options.capability("auto-converge"):
            return
        limit = period.sent * self._options.parameter("throttle-trigger-threshold") / 100
        if period.dirtied <= limit:
            return
        self._hits += 1
        if self._hits == BAD_PERIODS:
            self._hits = 0
            trace.migration_throttle()
            self._set(self._next(limit, period.dirtied))

    def _next(self, limit: float, dirtied: int) -> int:
        """The percentage that comes after the one there is."""
        if not self.percentage:
            wanted: int = self._options.parameter("cpu-throttle-initial")
            return wanted
        step = self._options.parameter("cpu-throttle-increment")
        if self._options.parameter("cpu-throttle-tailslow"):
            now = 100 - self.percentage
            step = min(now - int(now * limit / dirtied), step)
        return int(min(self.percentage + step, self._options.parameter("max-cpu-throttle"), HIGHEST_PERCENTAGE))

    def end(self) -> None:
        """The migration is over, whatever came of it: the vCPUs have all of their time again."""
        if self.percentage:
            self._set(0)

    def _set(self, percentage: int) -> None:
        trace.cpu_throttle_set(percentage)
        self.percentage = percentage
        self._throttle(percentage)
