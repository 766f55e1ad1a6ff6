"""CoroutineChannel: a channel for coroutines, which may live on any event loop (channels.md §10).

    reader on loop A ─▶ wait(READ)  ─▶ [slot READ ] ─▶ watcher on a loop ─▶ resumes the reader on A
    writer on loop B ─▶ wait(WRITE) ─▶ [slot WRITE] ─▶ watcher on a loop ─▶ resumes the writer on B

A channel belongs to no loop.  Each wait installs a watcher for its one direction and takes it away again, on

    the loop of the coroutine that waits, whichever that is at the moment     follow_coroutine (opt-in)
    the loop that serves the process's I/O handlers                           otherwise

so a coroutine that moves to another loop in mid-stream has nothing to attach or detach, and one that reads knows nothing of
one that writes.

Threads   each loop has its own; the two slots are what they share, under one lock that is never held while waiting.
Holds     (1) at most one waiter a direction; a second one is a mistake of the program and is told so
          (2) whoever takes a waiter out of its slot resumes it, and nobody else can: ready, woken and cancelled exclude
              each other
          (3) after a wait its slot is empty and its watcher gone
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import os
import select
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from ..errors import ChannelError, StreamError
from .channel import Channel

if TYPE_CHECKING:
    from .tls import TlsClient, TlsServer


class Direction(enum.Enum):
    """What a waiter waits for."""

    READ = "read"
    WRITE = "write"


READ, WRITE = Direction.READ, Direction.WRITE


class _Waiter:
    """A coroutine that waits on *home*, while *watching* has the watcher."""

    def __init__(self, home: asyncio.AbstractEventLoop, watching: asyncio.AbstractEventLoop) -> None:
        self.home = home
        self.watching = watching
        self.resumed = home.create_future()

    def resume(self) -> None:
        """Let it go on, from any thread; it may have been cancelled meanwhile."""
        with contextlib.suppress(RuntimeError):  # its loop is closed: nobody is left to go on
            self.home.call_soon_threadsafe(self._set)

    def _set(self) -> None:
        if not self.resumed.done():
            self.resumed.set_result(None)


class Readiness:
    """The two wait slots of one channel.

    *io_loop* serves the I/O handlers; *follow_coroutine* may change between waits.
    """

    def __init__(
        self, read_fd: int, write_fd: int, io_loop: asyncio.AbstractEventLoop, *, follow_coroutine: bool = False
    ) -> None:
        self.io_loop = io_loop
        self.follow_coroutine = follow_coroutine
        self._fds = {READ: read_fd, WRITE: write_fd}
        self._lock = threading.Lock()
        self._slots: dict[Direction, _Waiter | None] = {READ: None, WRITE: None}
        self._watchers: dict[tuple[Direction, asyncio.AbstractEventLoop], _Waiter] = {}  # each touched by its loop only

    async def wait(self, direction: Direction) -> None:
        """Until the channel can be read or written, or somebody wakes this waiter.

        Raises RuntimeError when another coroutine waits in that direction already.
        """
        home = asyncio.get_running_loop()
        waiter = _Waiter(home, home if self.follow_coroutine else self.io_loop)
        with self._lock:
            if self._slots[direction] is not None:
                raise RuntimeError(f"two coroutines wait to {direction.value} descriptor {self._fds[direction]}")
            self._slots[direction] = waiter
        _call(waiter, lambda: self._watch(direction, waiter))
        try:
            await waiter.resumed
        finally:
            if self._take(direction, waiter):  # cancelled: its watcher is still there
                _call(waiter, lambda: self._unwatch(direction, waiter))

    def wake(self, direction: Direction) -> bool:
        """Resume the waiter of *direction*, if there is one, from any thread."""
        with self._lock:
            waiter, self._slots[direction] = self._slots[direction], None
        if waiter is None:
            return False
        _call(waiter, lambda: self._unwatch(direction, waiter))
        waiter.resume()
        return True

    def is_waiting(self, direction: Direction) -> bool:
        return self._slots[direction] is not None

    def check_idle(self) -> None:
        """RuntimeError while somebody waits: what is waited for must not go away."""
        for direction in Direction:
            if self.is_waiting(direction):
                raise RuntimeError(f"a coroutine waits to {direction.value} the channel that is to be closed")

    def _take(self, direction: Direction, waiter: _Waiter) -> bool:
        """Empty the slot, if *waiter* is in it."""
        with self._lock:
            if self._slots[direction] is not waiter:
                return False
            self._slots[direction] = None
            return True

    # ---- on the loop that watches ----

    def _watch(self, direction: Direction, waiter: _Waiter) -> None:
        if self._slots[direction] is not waiter:
            return  # it was over before the watcher came
        self._watchers[direction, waiter.watching] = waiter
        add = waiter.watching.add_reader if direction is READ else waiter.watching.add_writer
        try:
            add(self._fds[direction], self._on_ready, direction, waiter)
        except PermissionError:  # a file: always ready, so the kernel does not watch it
            self._on_ready(direction, waiter)

    def _on_ready(self, direction: Direction, waiter: _Waiter) -> None:
        self._unwatch(direction, waiter)
        if self._take(direction, waiter):
            waiter.resume()

    def _unwatch(self, direction: Direction, waiter: _Waiter) -> None:
        if self._watchers.get((direction, waiter.watching)) is not waiter:
            return  # the next waiter's watcher has taken its place already
        del self._watchers[direction, waiter.watching]
        remove = waiter.watching.remove_reader if direction is READ else waiter.watching.remove_writer
        remove(self._fds[direction])


def _call(waiter: _Waiter, action: Callable[[], None]) -> None:
    """Do *action* on the loop that watches for *waiter*: at once where that is this one, else in its turn."""
    try:
        running = asyncio.get_running_loop()
    except RuntimeError:
        running = None
    if running is waiter.watching:
        action()
    else:
        waiter.watching.call_soon_threadsafe(action)


class _Session(Protocol):
    def try_read(self, target: memoryview) -> int: ...
    def try_write(self, source: memoryview) -> int: ...


class CoroutineChannel:
    """*channel*, which belongs to it, for coroutines: one that reads and one that writes at a time.

    With TLS below, the waits are those of the descriptors underneath.
    """

    def __init__(self, channel: Channel, io_loop: asyncio.AbstractEventLoop, *, follow_coroutine: bool = False) -> None:
        self.channel = channel
        self.readiness = Readiness(channel.read_fd, channel.write_fd, io_loop, follow_coroutine=follow_coroutine)

    @property
    def follow_coroutine(self) -> bool:
        return self.readiness.follow_coroutine

    @follow_coroutine.setter
    def follow_coroutine(self, value: bool) -> None:
        self.readiness.follow_coroutine = value

    async def read_some(self, target: memoryview | bytearray) -> int:
        """Read what is there into *target*, after waiting for it; 0 at the end.  ChannelError when it breaks."""
        view = memoryview(target)
        while (count := self._attempt(READ, view)) < 0:
            await self._wait(-count)
        return count

    async def read(self, length: int, *, may_end: bool = False) -> bytes:
        """Exactly *length* bytes; b"" at an end before the first of them, if it *may_end* there.

        Raises StreamError when it ends anywhere else, ChannelError when it breaks.
        """
        data = bytearray(length)
        view = memoryview(data)
        got = 0
        while got < length:
            count = await self.read_some(view[got:])
            if count == 0:
                if got == 0 and may_end:
                    return b""
                raise StreamError(f"{self.channel.kind} '{self.channel.name}' ends after {got} of {length} bytes")
            got += count
        return bytes(data)

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        """Write all of *data*, waiting as often as needed; ChannelError when the channel breaks."""
        left = memoryview(data)
        while left:
            count = self._attempt(WRITE, left)
            if count < 0:
                await self._wait(-count)
            else:
                left = left[count:]

    def wake_reader(self) -> bool:
        """Resume a coroutine that waits to read, though nothing may be there; it tries again and waits again."""
        return self.readiness.wake(READ)

    async def start_tls(self, side: TlsClient | TlsServer) -> CoroutineChannel:
        """The same channel, enciphered, after the handshake; it takes this one's place and its way of waiting.

        Raises ChannelError when the handshake fails; the channel is closed then.
        """
        handshake = side.begin(self.channel)
        try:
            while (enciphered := handshake.step()) is None:
                await self._wait(handshake.events)
        except BaseException:
            handshake.close()
            raise
        return CoroutineChannel(enciphered, self.readiness.io_loop, follow_coroutine=self.follow_coroutine)

    def close(self) -> None:
        """Close the channel; RuntimeError while a coroutine waits for it."""
        self.readiness.check_idle()
        self.channel.close()

    async def _wait(self, events: int) -> None:
        await self.readiness.wait(READ if events == select.POLLIN else WRITE)

    def _attempt(self, direction: Direction, view: memoryview) -> int:
        """Read or write what goes without waiting: how many bytes, or −POLLIN or −POLLOUT."""
        session: _Session | None = getattr(self.channel, "carrier", None)
        try:
            if session is not None:
                return session.try_read(view) if direction is READ else session.try_write(view)
            if direction is READ:
                return os.readv(self.channel.read_fd, [view])
            return os.write(self.channel.write_fd, view)
        except BlockingIOError:
            return -select.POLLIN if direction is READ else -select.POLLOUT
        except OSError as error:
            verb = "read from" if direction is READ else "write to"
            reason = os.strerror(error.errno) if error.errno else str(error)
            text = f"Unable to {verb} {self.channel.kind}: {reason}"
            raise ChannelError(text, channel=self.channel.name, errno=error.errno) from error
