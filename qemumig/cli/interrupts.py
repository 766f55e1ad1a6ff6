"""Signals that end a program in order: an exception, but never while something is being taken.

The first SIGINT, SIGTERM or SIGHUP raises `Interrupted` in the main thread.  Inside `held()` it waits until the
block is done, so that what was just started is also noted for the clean-up.  Later signals are swallowed: the
clean-up that the first one began is not cut short.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(BaseException):
    """Somebody wants the program to end; *signum* is the signal that said so."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class Interrupts:
    """While entered, the signals above are turned into one `Interrupted`."""

    def __init__(self) -> None:
        self._holds = 0
        self._pending: int | None = None
        self._raised = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        self._previous = {number: signal.signal(number, self._arrived) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def hold(self) -> None:
        """From now on nothing is raised any more."""
        self._holds += 1

    @contextmanager
    def held(self) -> Iterator[None]:
        """Signals wait until the block is left."""
        self._holds += 1
        try:
            yield
        finally:
            self._holds -= 1
        self._raise_pending()

    def _arrived(self, number: int, frame: FrameType | None) -> None:
        if self._pending is None:
            self._pending = number
        self._raise_pending()

    def _raise_pending(self) -> None:
        if self._pending is not None and not self._holds and not self._raised:
            self._raised = True
            raise Interrupted(self._pending)
