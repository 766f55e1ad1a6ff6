"""The return path: what the destination says, and how its silence is to be read (stream.md §10, state-machine.md §5).

    SHUT 0                          the destination has it all and starts the guest
    SHUT 1, or a clean end          the destination has not started: the source may go on
    a reset, noise, any error       nobody can tell

A clean end is only as good as the way back: when this side has broken the connection, or a write that failed has taken the
news of a reset, the reader sees the same (`Verdict.LEFT`), and it says nothing.

Thread    `mig/src/return` reads; it is started and joined by the attempt that owns this object.
"""

from __future__ import annotations

import enum
import threading
from collections.abc import Callable
from typing import Any, Protocol

from .. import trace
from ..channels.channel import was_reset
from ..errors import ChannelError, MigrationCancelled, MigrationError, StreamError
from ..savevm import commands
from ..threads import start_thread
from ..wire.stream import InputStream

ITS_WORDS = "its own message says why"
"""What this side cannot know: a refusal travels without its reason (stream.md §10)."""


class Verdict(enum.Enum):
    """How the return path ended."""

    TAKEN = "the destination has taken the guest"
    REFUSED = "the destination has said that it has not started"
    LEFT = "the destination has closed the connection without a word"
    UNKNOWN = "the destination's state is unknown"


class Talk(Protocol):
    """What postcopy hears on a return path; called by its thread."""

    def read_requests(self, stream: InputStream) -> None:
        """Take page requests off *stream*, until another message waits there."""

    def take_pong(self, value: int) -> None: ...

    def bitmap_size(self, block: str) -> int:
        """Bytes that the bitmap of *block* has; KeyError when none is expected."""

    def take_bitmap(self, message: commands.ReceivedBitmap) -> None: ...

    def take_resume_ack(self) -> None: ...

    def take_end(self) -> None:
        """The return path has ended, whatever its verdict."""


class ReturnPath:
    """Reads the destination's messages until SHUT or the end.

    `verdict`, `approved` and the last PONG's value change under one condition, which wakes everybody who waits.  *on_end*
    is called in the thread, once it has ended.
    """

    def __init__(self, channel: Any, on_end: Callable[[], None] = lambda: None) -> None:
        self._stream = InputStream(channel, eager=False)  # what comes is an answer, or asked for by a page fault
        self._on_end = on_end
        self._changed = threading.Condition()
        self._ponged: set[int] = set()
        self.talk: Talk | None = None  # what postcopy has to say and to hear
        self.approved = False  # SWITCHOVER_ACK has come
        self.verdict: Verdict | None = None  # None while it is open
        self.error: MigrationError | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = start_thread("mig/src/return", self._read)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Until it has ended; False when *timeout_s* passes first."""
        with self._changed:
            return self._changed.wait_for(lambda: self.verdict is not None, timeout_s)

    @property
    def has_heard(self) -> bool:
        """Whether any ping was answered."""
        return bool(self._ponged)

    def wait_pong(self, value: int) -> bool:
        """Until the destination has answered the ping *value*; False when the path ended instead."""
        with self._changed:
            self._changed.wait_for(lambda: value in self._ponged or self.verdict is not None)
            return value in self._ponged and self.verdict is None

    def wait_approval(self, timeout_s: float) -> bool:
        """Until the destination agrees to the switchover; False when *timeout_s* passes, or the path ends, first."""
        with self._changed:
            self._changed.wait_for(lambda: self.approved or self.verdict is not None, timeout_s)
            return self.approved

    def join(self) -> None:
        """After the channel was shut down or its quit event set."""
        if self._thread is not None:
            self._thread.join()

    def _read(self) -> None:
        trace.source_return_path_thread_entry()
        try:
            while self.verdict is None:
                self._read_message()
        except MigrationCancelled:
            self._end(Verdict.UNKNOWN, None)
        except StreamError as error:
            self._end(Verdict.UNKNOWN, error)
        except ChannelError as error:
            text = f"the connection broke before the destination had said that it has the guest ({error}): {ITS_WORDS}"
            self._end(Verdict.UNKNOWN, ChannelError(text, channel=error.channel, errno=error.errno))

    def _end(self, verdict: Verdict, error: MigrationError | None) -> None:
        with self._changed:
            self.verdict, self.error = verdict, error
            self._changed.notify_all()
        self._on_end()
        if verdict is Verdict.TAKEN:
            trace.source_return_path_thread_end()
        else:
            trace.source_return_path_thread_bad_end(error or verdict.value)
        if self.talk is not None:
            self.talk.take_end()

    def _read_message(self) -> None:
        self._stream.peek(1)  # while this waits the switch to postcopy may come, and page requests with it
        if self.talk is not None:
            self.talk.read_requests(self._stream)
        if not self._stream.peek(1):
            if self.talk is not None and was_reset(self._stream.channel.read_fd):
                raise ChannelError("the return path was reset", channel=self._stream.channel.name)
            text = f"the destination closed the connection before it had loaded the stream: {ITS_WORDS}"
            self._end(Verdict.LEFT, StreamError(text))
            return
        message = commands.read_return_message(self._stream, self.talk.bitmap_size if self.talk is not None else None)
        if isinstance(message, commands.Shut):
            trace.source_return_path_thread_shut(message.value)
            self._take_shut(message.value)
        elif isinstance(message, commands.Pong):
            trace.source_return_path_thread_pong(message.value)
            with self._changed:
                self._ponged.add(message.value)
                self._changed.notify_all()
            if self.talk is not None:
                self.talk.take_pong(message.value)
        elif isinstance(message, commands.SwitchoverAck):
            with self._changed:
                self.approved = True
                self._changed.notify_all()
        elif isinstance(message, commands.ReceivedBitmap) and self.talk is not None:
            self.talk.take_bitmap(message)
        elif isinstance(message, commands.ResumeAck) and self.talk is not None:
            self.talk.take_resume_ack()
        elif isinstance(message, commands.ResumeAck):
            raise StreamError(f"return path: {message.type.name} outside of a postcopy recovery")
        # page requests merely queue pages, and those are all sent in precopy

    def _take_shut(self, status: int) -> None:
        if status == 0:
            self._end(Verdict.TAKEN, None)
        else:
            text = f"Sibling indicated error {status}: the destination has refused the guest, {ITS_WORDS}"
            self._end(Verdict.REFUSED, StreamError(text))
