"""The connections of one incoming migration, told apart by their first bytes, in any order (channels.md §2.3).

    "QEVM"        the main channel
    0x11223344    an init packet: channel N of multifd
    else          somebody who has lost the way: costs its own connection

Where there is to be no channel of multifd, a source that has them all the same is not refused them at once: a QEMU 7.2
dies of that, at times, by SIGSEGV, and its guest with it.  It fails in good order when they are dropped.

A source opens all its channels before it writes the first byte of the main one, or shortly after (7.2).  So when that
byte is there and a channel is still missing after a while, it will not come: the other side has fewer.  That it has more
shows in a channel too many, which is looked out for until the load is complete: pages that went there would be missing.
A small guest may have been sent, and its source be gone, before a slow tunnel has opened all connections here: what lies
in those that have ended is read like any other.

Threads   `gather` in the loading thread; then `mig/dst/surplus` until `end_watch`.
"""

from __future__ import annotations

import select
import sys
import threading
import time
from collections.abc import Callable

from .. import trace
from ..channels.channel import Channel, QuitEvent, has_hung_up, has_unread
from ..channels.connect import Listener
from ..errors import ChannelError, MigrationCancelled, MigrationError, OptionError, StreamError
from ..options import MigrationOptions
from ..savevm import remedies
from ..threads import start_thread
from ..wire.format import MULTIFD_INIT_SIZE, MULTIFD_MAGIC, QEMU_VM_FILE_MAGIC
from ..wire.stream import InputStream
from .packet import decode_init

MAIN = QEMU_VM_FILE_MAGIC.to_bytes(4, "big")
MULTIFD = MULTIFD_MAGIC.to_bytes(4, "big")
NO_UUID = bytes(16)
MOST_SILENT = 32  # connections that have not said what they are; one more pushes the oldest out
LATE_S = 10.0  # how long a channel may be missing when the main one has spoken
GONE_S = 2.0  # and when the source has gone: by a tunnel, each of its connections takes its own time
EXTRA_S = 1.0  # how long a source that must not have any channels may still open them

EQUAL = "parameter 'multifd-channels' must be equal on both sides"


class Arrivals:
    """The channels that *listener* takes; *uuid* is this machine's.  `main` is the caller's to close."""

    def __init__(self, listener: Listener, options: MigrationOptions, uuid: bytes | None) -> None:
        self.main: Channel | None = None
        self.stream: InputStream | None = None  # of the main channel
        self.channels: dict[int, InputStream] = {}  # of multifd, by id
        self._listener = listener
        self._options = options
        self._uuid = uuid or NO_UUID
        self._silent: dict[Channel, bytearray] = {}  # and what they have said so far
        self._ended: set[int] = set()  # channels of multifd that have ended and left something to be read
        self._last_s = 0.0  # when somebody who belongs here came
        self._gone_s: float | None = None  # when the source was seen to have gone, the main channel being there
        self._unwanted = False  # the source has opened one of multifd, and there are to be none
        self._stop: QuitEvent | None = None
        self._thread: threading.Thread | None = None

    @property
    def expected(self) -> int:
        """How many channels of multifd there are to be."""
        if not self._options.capability("multifd") or self._options.capability("mapped-ram"):
            return 0
        count: int = self._options.parameter("multifd-channels")
        return count

    def gather(self) -> None:
        """Wait until everybody is there.

        Raises StreamError for a channel of another machine or version, or one too many, ChannelError when one does not
        come, OptionError when none can, MigrationCancelled when told to quit.
        """
        if self.expected and not self._listener.takes_more:
            raise OptionError("Migration requires multi-channel URIs (e.g. tcp)", name="multifd", value=True)
        self._listener.expect(self.expected + 1)
        while not self._is_complete():
            is_quiet = not self._step(self._patience_ms()) and not self._more_are_coming()
            if is_quiet and not self._is_complete():  # who has ended otherwise may have sent all that it had to
                self._let_go()

    def _more_are_coming(self) -> bool:
        """Whether some have connected who may belong here, for all that is known."""
        return bool(self._silent) or self._listener.receives

    def _is_complete(self) -> bool:
        return self.main is not None and len(self.channels) >= self.expected

    def _patience_ms(self) -> int | None:
        """How long to wait for the next one; StreamError or ChannelError when that was long enough."""
        if self.main is None:
            return None
        now = time.monotonic()
        if self._gone_s is not None:
            if (left := self._gone_s + GONE_S - now) <= 0:
                missing = self.expected - len(self.channels)
                raise StreamError(f"the source has gone while {missing} of {self.expected} multifd channels were missing")
        elif (left := self._last_s + LATE_S - now) <= 0:
            raise ChannelError(
                f"the source has opened {len(self.channels)} multifd channels, this side waits for {self.expected}: {EQUAL}"
            )
        return int(left * 1000) + 1

    def _present(self) -> list[Channel]:
        """Those who belong here and have come."""
        main = [self.main] if self.main is not None else []
        return main + [stream.channel for stream in self.channels.values()]

    def _who_may_leave(self) -> list[int]:
        """The descriptors of those who have not left yet."""
        ended = {self.channels[number].channel for number in self._ended}
        return [channel.read_fd for channel in self._present() if channel not in ended]

    def _let_go(self) -> None:
        """Forget the channels of a source that has left again; where the main one is here, note that it has gone.

        It may have sent all that it had: what is missing then is still on its way, even the main channel.
        """
        if self._gone_s is not None or not any(has_hung_up(channel.read_fd) for channel in self._present()):
            return
        if self.main is not None and self.expected:
            self._gone_s = time.monotonic()
            return
        for number, stream in list(self.channels.items()):
            if not has_hung_up(stream.channel.read_fd):
                continue
            if has_unread(stream.channel.read_fd):
                self._ended.add(number)
            else:
                self._forget(number)

    def _forget(self, number: int) -> None:
        """A channel of a source that has left again."""
        print(f"migration: multifd channel {number} has gone before there was a main one", file=sys.stderr)
        self.channels.pop(number).channel.close()
        self._ended.discard(number)

    def _step(self, timeout_ms: int | None = None) -> bool:
        """Wait for the next thing to happen; whether it was a connection."""
        events = {channel.read_fd: select.POLLIN for channel in self._silent}
        if self._stop is None and self.expected and self._gone_s is None and not self._more_are_coming():
            events |= dict.fromkeys(self._who_may_leave(), select.POLLRDHUP)
        if self._stop is not None:
            events[self._stop.fd] = select.POLLIN
        channel = self._listener.accept_among(events, timeout_ms)
        if channel is not None:
            self._admit(channel)
        for one in list(self._silent):
            self._hear(one)
        return channel is not None

    def _admit(self, channel: Channel) -> None:
        if not self.expected and self.main is None:
            self._take_main(channel, b"")  # there is only one, whatever it says
            return
        if len(self._silent) == MOST_SILENT:
            self._drop(next(iter(self._silent)), f"{MOST_SILENT} others have come since, and it has not said what it is")
        self._silent[channel] = bytearray()

    def _hear(self, channel: Channel) -> None:
        """Read what says who it is, as far as it is there."""
        said = self._silent[channel]
        while len(said) < (wanted := MULTIFD_INIT_SIZE if said.startswith(MULTIFD) else len(MAIN)):
            try:
                piece = channel.read_some(wanted - len(said))
            except OSError as error:
                self._drop(channel, str(error))
                return
            if piece is None:
                return
            if not piece:
                self._drop(channel, "it ended before it had said what it is")
                return
            said += piece
        self._settle(channel, bytes(said))

    def _settle(self, channel: Channel, said: bytes) -> None:
        if said.startswith(MULTIFD) and not self.expected:
            self._unwanted = self._unwanted or self._is_of_this_machine(said)
            self._drop(channel, "it is a channel of multifd, which is off here")
        elif said.startswith(MULTIFD):
            self._take_channel(channel, said)
        elif said != MAIN:
            self._drop(channel, f"it begins with {said.hex()}, neither a stream nor a channel of multifd")
        elif self.main is not None:
            self._drop(channel, "there is a main channel already")
        else:
            del self._silent[channel]
            self._take_main(channel, said)

    def _is_of_this_machine(self, init: bytes) -> bool:
        try:
            return decode_init(init)[0] == self._uuid
        except StreamError:
            return False

    def _take_main(self, channel: Channel, said: bytes) -> None:
        self.main, self.stream = channel, InputStream(channel)
        if said:
            self.stream.give_back(said)
        self._last_s = time.monotonic()

    def _take_channel(self, channel: Channel, init: bytes) -> None:
        uuid, channel_id = decode_init(init)
        if uuid != self._uuid:
            raise StreamError(
                f"multifd channel {channel_id} comes from a machine with UUID {uuid.hex()}, "
                f"this one has {self._uuid.hex()}: option '-uuid' must be equal on both sides"
            )
        if channel_id >= self.expected:
            raise StreamError(
                f"the source has a multifd channel {channel_id}, this side has {self.expected} of them: {EQUAL}"
            )
        if self._stop is None and channel_id in self.channels:
            self._make_room(channel_id)
        if channel_id in self.channels:
            raise StreamError(f"multifd channel {channel_id} has come twice")
        del self._silent[channel]
        self.channels[channel_id] = InputStream(channel)
        trace.multifd_recv_new_channel(channel_id)
        self._last_s = time.monotonic()

    def _make_room(self, channel_id: int) -> None:
        """A channel of a source that has left again gives way to its successor; with all that it left if it left pages."""
        fd = self.channels[channel_id].channel.read_fd
        if not has_hung_up(fd):
            return
        if not has_unread(fd):
            self._forget(channel_id)
        elif self.main is None:
            for number, stream in list(self.channels.items()):
                if has_hung_up(stream.channel.read_fd):
                    self._forget(number)

    def _drop(self, channel: Channel, reason: str) -> None:
        print(f"migration: a connection is dropped: {reason}", file=sys.stderr)
        del self._silent[channel]
        channel.close()

    # ---- while the guest is loaded ----

    def watch(self, on_surplus: Callable[[MigrationError], None]) -> None:
        """Look out for channels too many, in a thread; *on_surplus* is called there with what to say about one."""

        def look_out(stop: QuitEvent) -> None:
            while not stop.is_set():
                self._step()

        self._watch(look_out, on_surplus)

    def turn_away(self, on_mismatch: Callable[[], None]) -> None:
        """Drop, for EXTRA_S, what the source opens beside the main channel; then listen no more.

        In a thread; *on_mismatch* is called there if there was a channel of multifd and the load goes on all the same.
        """
        until_s = time.monotonic() + EXTRA_S

        def drop(stop: QuitEvent) -> None:
            while not stop.is_set() and (left := until_s - time.monotonic()) > 0:
                self._step(int(left * 1000) + 1)
            if not stop.is_set():
                self._listener.close()
                if self._unwanted:
                    on_mismatch()

        self._watch(drop, lambda error: None)  # of somebody else's connection

    def _watch(self, look_out: Callable[[QuitEvent], None], on_surplus: Callable[[MigrationError], None]) -> None:
        stop = self._stop = QuitEvent()

        def run() -> None:
            try:
                look_out(stop)
            except MigrationCancelled:
                return
            except MigrationError as error:
                on_surplus(error)

        self._thread = start_thread("mig/dst/surplus", run)

    @property
    def is_watched(self) -> bool:
        """Whether somebody looks out, or did for a while."""
        return self._thread is not None

    def check_surplus(self) -> None:
        """The load is complete: raise what there is to say about a channel too many that nobody has looked at yet."""
        self.end_watch()
        while self._step(0):
            pass
        if (mismatch := self.mismatch()) is not None:
            raise mismatch
        if self._silent and self._options.capability("postcopy-preempt"):  # which has come: one was taken for it
            raise StreamError(f"the source has opened a connection too many, of multifd perhaps: {EQUAL}")

    def mismatch(self) -> StreamError | None:
        """What there is to say of a source that has multifd on where it is off."""
        if not self._unwanted:
            return None
        return StreamError(
            "capability 'multifd' is on at the source and off here, expected the same",
            remedy=remedies.for_capability("multifd", on_here=False),
        )

    def end_watch(self) -> None:
        """Nobody looks out any more."""
        if self._stop is None or self._thread is None:
            return
        self._stop.set()
        self._thread.join()
        self._stop.close()
        self._stop = self._thread = None

    def close(self) -> None:
        """Give back all channels but the main one; nobody uses them any more."""
        self.end_watch()
        for channel in (*self._silent, *(stream.channel for stream in self.channels.values())):
            channel.close()
        self._silent.clear()
        self.channels.clear()
