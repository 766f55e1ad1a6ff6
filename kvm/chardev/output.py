"""Bytes on their way out: sent at once where that does not block, kept and sent later where it would.

Threads   `write` may be called from any; the loop sends what was kept.
"""

from __future__ import annotations

import asyncio
import os
import select
import stat
import threading
from collections.abc import Callable

OUTPUT_LIMIT = 1 << 20  # bytes; a reader that leaves so many waiting gets no more
LOW_WATER = 1 << 16  # `drain` comes back when at most this many bytes are left
PIPE_PIECE = 4096  # a pipe that polls as writable takes this much without blocking (PIPE_BUF)

Send = Callable[[bytes], int]  # takes some bytes, returns how many, raises BlockingIOError for none


class Output:
    """Bytes on their way out, to one descriptor at a time."""

    def __init__(self, broken: Callable[[], None], limit: int = OUTPUT_LIMIT) -> None:
        # Set before start.
        self._broken = broken
        self._limit = limit
        self._loop: asyncio.AbstractEventLoop | None = None
        self._progress = asyncio.Event()
        # Under lock.
        self._lock = threading.Lock()
        self._descriptor = -1
        self._send: Send = len
        self._pending = bytearray()

    @property
    def pending(self) -> int:
        """How many bytes the reader has not taken yet."""
        return len(self._pending)

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """From now on *loop* sends what was kept."""
        with self._lock:
            self._loop = loop
            if self._pending:
                self._ask_for_flush()

    def connect(self, descriptor: int, send: Send) -> None:
        """Bytes go to *descriptor* through *send* from now on."""
        with self._lock:
            self._descriptor, self._send = descriptor, send
            self._pending.clear()

    def disconnect(self) -> None:
        """Nobody listens any more; what was kept is dropped.  Loop thread."""
        with self._lock:
            if self._loop is not None and self._pending and self._descriptor >= 0:
                self._loop.remove_writer(self._descriptor)
            self._descriptor, self._send = -1, len
            self._pending.clear()
        self._progress.set()

    def write(self, data: bytes) -> int:
        """Send or keep *data*; how many bytes were taken: all, or none when too many wait already."""
        with self._lock:
            if self._descriptor < 0:
                return len(data)
            if len(self._pending) >= self._limit:
                return 0
            sent = 0 if self._pending else self._send_some(data)
            if sent < len(data):
                if not self._pending:
                    self._ask_for_flush()
                self._pending += data[sent:]
            return len(data)

    async def drain(self, enough: int = LOW_WATER) -> None:
        """Wait until the reader has taken all but *enough* bytes, or has gone."""
        while len(self._pending) > enough:
            self._progress.clear()
            await self._progress.wait()

    def _send_some(self, data: bytes | bytearray) -> int:
        sent = 0
        view = memoryview(data)
        try:
            while sent < len(data):
                sent += self._send(view[sent:])  # type: ignore[arg-type]
        except (BlockingIOError, InterruptedError):
            pass
        except OSError:  # the reader went away, or the disk is full: the rest is dropped
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._broken)
            sent = len(data)
        finally:
            view.release()
        return sent

    def _ask_for_flush(self) -> None:
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._watch)

    def _watch(self) -> None:
        with self._lock:
            if self._loop is not None and self._pending and self._descriptor >= 0:
                self._loop.add_writer(self._descriptor, self._flush)

    def _flush(self) -> None:
        with self._lock:
            del self._pending[: self._send_some(self._pending)]
            if not self._pending and self._loop is not None and self._descriptor >= 0:
                self._loop.remove_writer(self._descriptor)
        self._progress.set()


def descriptor_sender(descriptor: int) -> Send:
    """A `Send` for a file, pipe or terminal that leaves its blocking mode as it is: others may share it."""
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return lambda data: os.write(descriptor, data)
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)

    def send(data: bytes) -> int:
        if not poll.poll(0):
            raise BlockingIOError
        return os.write(descriptor, data[:PIPE_PIECE])

    return send
