"""What query-migrate shows of the source (ram.md §12, qmp.md §5)."""

from __future__ import annotations

import time
from typing import Any

from ..qapi import MigrationStatus
from ..ram.cache import PageCache
from ..states import IN_POSTCOPY
from ..wire.format import TARGET_PAGE_SIZE
from .attempt import Attempt

WITH_FIGURES = frozenset(
    {
        MigrationStatus.ACTIVE,
        MigrationStatus.CANCELLING,
        MigrationStatus.PRE_SWITCHOVER,
        MigrationStatus.DEVICE,
        MigrationStatus.COMPLETED,
        *IN_POSTCOPY,
    }
)


def describe(attempt: Attempt, status: MigrationStatus, downtime_limit_ms: int) -> dict[str, Any]:
    """The members of query-migrate besides `status`; times in ms, sizes in bytes."""
    info: dict[str, Any] = {}
    if status in WITH_FIGURES and attempt.ram is not None:
        total_s = attempt.total_s if attempt.total_s is not None else time.monotonic() - attempt.start_s
        info["total-time"] = round(total_s * 1000)
        info["setup-time"] = round((attempt.setup_s or 0) * 1000)
        if (status is MigrationStatus.COMPLETED or status in IN_POSTCOPY) and attempt.downtime_s is not None:
            info["downtime"] = round(attempt.downtime_s * 1000)
        else:
            info["expected-downtime"] = _expected_downtime_ms(attempt, downtime_limit_ms)
        info["ram"] = _ram(attempt, status, total_s)
        if attempt.converge.percentage:
            info["cpu-throttle-percentage"] = attempt.converge.percentage
        if attempt.ram.cache is not None:
            info["xbzrle-cache"] = _cache(attempt.ram.cache)
    if attempt.error is not None:
        info["error-desc"] = str(attempt.error)
    return info


def _expected_downtime_ms(attempt: Attempt, downtime_limit_ms: int) -> int:
    assert attempt.ram is not None
    bandwidth = attempt.options.parameter("avail-switchover-bandwidth") or attempt.pacer.bandwidth
    if not bandwidth or not attempt.dirty_rate.pages_per_second:
        return downtime_limit_ms
    return round(attempt.ram.dirty.synced_pages * TARGET_PAGE_SIZE / bandwidth * 1000)


def _ram(attempt: Attempt, status: MigrationStatus, total_s: float) -> dict[str, Any]:
    ram = attempt.ram
    assert ram is not None
    zero_pages, normal_pages = attempt.pages
    completed = status is MigrationStatus.COMPLETED
    transferred = attempt.transferred
    mbps = attempt.pacer.mbps
    if completed:
        moving_s = total_s - (attempt.setup_s or 0)
        mbps = transferred * 8 / moving_s / 1e6 if moving_s > 0 else 0.0
    return {
        "total": ram.total,
        "remaining": 0 if completed else ram.remaining,
        "transferred": transferred,
        "duplicate": zero_pages,
        "normal": normal_pages,
        "normal-bytes": normal_pages * TARGET_PAGE_SIZE,
        "page-size": TARGET_PAGE_SIZE,
        "mbps": mbps,
        "pages-per-second": round(attempt.pacer.pages_per_second),
        "dirty-sync-count": ram.dirty.sync_count,
        "dirty-pages-rate": 0 if completed else attempt.dirty_rate.pages_per_second,
        "precopy-bytes": attempt.precopy_bytes,
        "downtime-bytes": _downtime_bytes(attempt),
        "postcopy-bytes": attempt.postcopy_bytes,
        "postcopy-requests": attempt.postcopy_requests,
        "multifd-bytes": ram.multifd_bytes,
        "dirty-sync-missed-zero-copy": ram.missed_zero_copy,
    }


def _downtime_bytes(attempt: Attempt) -> int:
    assert attempt.ram is not None
    if not attempt.switching:
        return 0
    return attempt.transferred - attempt.ram.multifd_bytes - attempt.precopy_bytes - attempt.postcopy_bytes


def _cache(cache: PageCache) -> dict[str, Any]:
    """XBZRLE (xbzrle.md §6)."""
    return {
        "cache-size": cache.size,
        "bytes": cache.sent_bytes,
        "pages": cache.hits,
        "cache-miss": cache.misses,
        "cache-miss-rate": cache.miss_rate,
        "encoding-rate": cache.encoding_rate,
        "overflow": cache.overflows,
    }
