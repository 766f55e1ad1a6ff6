"""The return path: what the destination says, and how its silence is to be read (stream.md §10, state-machine.md §5).

    SHUT 0                          the destination has it all and starts the guest
    SHUT 1, or a clean end          the destination has not started: the source may go on
    a reset, noise, any error       nobody can tell

Thread    `mig/src/return` reads; it is started and joined by the attempt that owns this object.
"""

from __future__ import annotations

import enum
import threading
from collections.abc import Callable
from typing import Any

from ..errors import ChannelError, MigrationCancelled, MigrationError, StreamError
from ..savevm import commands
from ..threads import start_thread
from ..wire.stream import InputStream


class Verdict(enum.Enum):
    """How the return path ended."""

    TAKEN = "the destination has taken the guest"
    REFUSED = "the destination has not started"
    UNKNOWN = "the destination's state is unknown"


class ReturnPath:
    """Reads the destination's messages until SHUT or the end.

    *on_pong* is called with the value of each PONG, in the reading thread.
    """

    def __init__(self, channel: Any, on_pong: Callable[[int], None] = lambda value: None) -> None:
        self._stream = InputStream(channel)
        self._on_pong = on_pong
        self._ended = threading.Event()
        self.verdict: Verdict | None = None  # None while it is open
        self.error: MigrationError | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = start_thread("mig/src/return", self._read)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Until it has ended; False when *timeout_s* passes first."""
        return self._ended.wait(timeout_s)

    def join(self) -> None:
        """After the channel was shut down or its quit event set."""
        if self._thread is not None:
            self._thread.join()

    def _read(self) -> None:
        try:
            while self.verdict is None:
                self._read_message()
        except MigrationCancelled:
            self.verdict = Verdict.UNKNOWN
        except (StreamError, ChannelError) as error:
            self.verdict = Verdict.UNKNOWN
            self.error = error
        finally:
            self._ended.set()

    def _read_message(self) -> None:
        if not self._stream.peek(1):
            self.verdict = Verdict.REFUSED
            self.error = StreamError("the destination closed the connection before it had loaded the stream")
            return
        message = commands.read_return_message(self._stream)
        if isinstance(message, commands.Shut):
            self._take_shut(message.value)
        elif isinstance(message, commands.Pong):
            self._on_pong(message.value)
        elif isinstance(message, commands.ResumeAck):
            raise StreamError(f"return path: {message.type.name} outside of a postcopy recovery")
        # page requests merely queue pages, and those are all sent in precopy; an early approval changes nothing

    def _take_shut(self, status: int) -> None:
        if status == 0:
            self.verdict = Verdict.TAKEN
        else:
            self.verdict = Verdict.REFUSED
            self.error = StreamError(f"Sibling indicated error {status}")
