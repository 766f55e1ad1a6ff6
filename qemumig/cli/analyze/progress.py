"""How far a long analysis is: a bar on a terminal, once it has lasted a second; nothing anywhere else."""

from __future__ import annotations

import sys
import time
from typing import Any

_PATIENCE_S = 1.0
_REFRESH_S = 0.1


class ProgressBar:
    """Drawn on standard error with `rich`; the object itself is what tells it (bytes done, bytes in all or None)."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._wanted = sys.stderr.isatty()
        self._next = time.monotonic() + _PATIENCE_S
        self._progress: Any = None
        self._task: Any = None

    def __call__(self, done: int, total: int | None) -> None:
        now = time.monotonic()
        if not self._wanted or now < self._next:
            return
        self._next = now + _REFRESH_S
        if self._progress is None:
            self._start()
        self._progress.update(self._task, completed=done, total=total, refresh=True)

    def _start(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True, auto_refresh=False)
        self._progress.start()
        self._task = self._progress.add_task(self._title)

    def close(self) -> None:
        """Take it off the screen."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
