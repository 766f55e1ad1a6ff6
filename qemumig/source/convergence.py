"""Windows of 100 ms: how fast bytes leave, how many may still leave now, and when to stop the guest (ram.md §7).

    bandwidth  = bytes of the window / its length
    threshold  = (avail-switchover-bandwidth or bandwidth) × downtime-limit

The guest is stopped when what is left can be sent within the downtime limit *and* another round would not make it
notably less: a round that halves the rest costs milliseconds while the guest runs and saves as many while it stands.

Threads   the migration thread; the figures may be read by anyone.
"""

from __future__ import annotations

import select
import time

from ..errors import MigrationCancelled
from ..options import MigrationOptions

WINDOW_S = 0.1
NOT_WORTH_A_ROUND_S = 0.004  # a rest that is sent within this time is not reduced any further
WORTH_A_ROUND = 0.7  # a round is worth it when it left less than this share of the rest before
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
        self.bandwidth = 0.0  # bytes per second in the last whole window
        self.mbps = 0.0
        self.pages_per_second = 0.0

    def restart(self, sent_bytes: int, sent_pages: int) -> None:
        """Begin a window now."""
        self._start_s = time.monotonic()
        self._start_bytes = sent_bytes
        self._start_pages = sent_pages

    def allowance(self, sent_bytes: int) -> int:
        """How many bytes may still leave in this window; the rate limit 0 means as many as will."""
        limit = self._options.parameter("max-bandwidth")
        if limit == 0:
            return 1 << 62
        return max(int(limit * WINDOW_S) - (sent_bytes - self._start_bytes), 0)

    def update(self, sent_bytes: int, sent_pages: int) -> bool:
        """Close the window if it is over, and take its figures; True if it was."""
        elapsed = time.monotonic() - self._start_s
        if elapsed < WINDOW_S:
            return False
        window_bytes = sent_bytes - self._start_bytes
        self.bandwidth = window_bytes / elapsed
        self.mbps = self.bandwidth * 8 / 1e6
        self.pages_per_second = (sent_pages - self._start_pages) / elapsed
        self.restart(sent_bytes, sent_pages)
        return True

    def wait(self) -> None:
        """Sleep until the window is over; MigrationCancelled when told to quit."""
        rest = self._start_s + WINDOW_S - time.monotonic()
        if rest > 0 and self._poll.poll(rest * 1000):
            raise MigrationCancelled("the migration was cancelled")

    def current_bandwidth(self, sent_bytes: int) -> float:
        """Bytes per second: of the last whole window, or of the first one as far as it goes."""
        if self.bandwidth:
            return self.bandwidth
        elapsed = time.monotonic() - self._start_s
        return (sent_bytes - self._start_bytes) / elapsed if elapsed > 0 else 0.0

    def threshold(self, sent_bytes: int) -> float:
        """Bytes that can be sent while the guest stands still, by the downtime limit."""
        bandwidth = self._options.parameter("avail-switchover-bandwidth") or self.current_bandwidth(sent_bytes)
        return bandwidth * self._options.parameter("downtime-limit") / 1000


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
        self.pages_per_second = 0

    def update(self, new_pages: int) -> bool:
        """*new_pages*: found dirty by all syncs so far; True when a period is over."""
        elapsed = time.monotonic() - self._start_s
        if elapsed <= 1:
            return False
        self.pages_per_second = int((new_pages - self._start_pages) / elapsed)
        self._start_s += elapsed
        self._start_pages = new_pages
        return True
