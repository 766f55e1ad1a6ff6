"""How a monitor ends when the program does: what runs may still answer, but not for long."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Collection

from ..chardev import CharBackend

CLOSING_GRACE_S = 1.0  # how long a running command, and then what it printed, may take


async def let_end(tasks: Collection[asyncio.Task], backend: CharBackend) -> None:
    """Wait for *tasks*, then for what was written to *backend*, each within reason; what is left then is cancelled."""
    tasks = list(tasks)
    if tasks:
        await asyncio.wait(tasks, timeout=CLOSING_GRACE_S)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(backend.output.drain(0), CLOSING_GRACE_S)
