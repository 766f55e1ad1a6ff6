"""The source's channels: opened, watched, closed (multifd.md §1, §2).

They are opened one after the other, behind the main channel and before its first byte, and each says at once who it is.

Threads   the migration thread calls everything here; `mig/src/send_N` runs the Sender of channel N.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import partial

from .. import trace
from ..channels.channel import Channel
from ..errors import ChannelError, MigrationCancelled, MigrationError
from ..options import MigrationOptions
from ..threads import start_thread
from ..wire.stream import OutputStream
from .methods import method_of
from .packet import encode_init
from .send import Dispatch, Sender
from .splice import Splice
from .zerocopy import ZeroCopy

NO_UUID = bytes(16)


class Senders:
    """The channels that *options* ask for; *on_failure* wakes the migration thread wherever it waits."""

    def __init__(self, options: MigrationOptions, *, detects_zero: bool, on_failure: Callable[[], None]) -> None:
        self._count: int = options.parameter("multifd-channels")
        self._method = method_of(options)
        self._level: int = options.parameter(self._method.level) if self._method is not None else 0
        self._detects_zero = detects_zero
        self._zero_copy: bool = options.capability("zero-copy-send")
        self._announces_end = options.migration_property("multifd-clean-tls-termination")
        self._channels: list[Channel] = []
        self._senders: list[Sender] = []
        self._splices: list[Splice] = []
        self._threads: list[threading.Thread] = []
        self.dispatch = Dispatch(self._count, on_failure)

    def open(
        self, open_channel: Callable[[], Channel], uuid: bytes | None, *, is_busy: bool, all_will_be_loaded: bool
    ) -> None:
        """Open every channel with *open_channel*; ChannelError when one cannot be, MigrationCancelled when told to quit.

        *is_busy*: the guest runs, and keeps cores for itself.  *all_will_be_loaded*: the guest goes on nowhere before the
        destination has said that it has loaded all pages, or will never have them; so they may be read late.
        """
        shares_core = is_busy or self._outnumbers_cores()
        for number in range(self._count):
            channel = open_channel()
            channel.announces_end = self._announces_end
            self._channels.append(channel)
            out = OutputStream(channel)
            out.write(encode_init(uuid or NO_UUID, number))
            out.flush()
            trace.multifd_new_send_channel_async(number)
            sender = Sender(number, out, self.dispatch, detects_zero=self._detects_zero)
            self._equip(sender, channel, by_reference=all_will_be_loaded, shares_core=shares_core)
            self._senders.append(sender)
            self._threads.append(start_thread(f"mig/src/send_{number}", partial(self._run, number, sender)))

    def _equip(self, sender: Sender, channel: Channel, *, by_reference: bool, shares_core: bool) -> None:
        """Choose the way that pages leave by.

        To share a core only helps pages that are copied on both sides: whoever compresses is slow enough to let bytes pile
        up, and what goes by reference is in no cache.
        """
        if self._method is not None:
            sender.compress_with(self._method.flag, self._method.compressor(self._level))
        elif self._zero_copy:
            sender.send_uncopied_by(ZeroCopy(channel))
        elif by_reference and (splice := self._new_splice(sender.out, channel)) is not None:
            sender.send_references_by(splice)
        elif shares_core:
            channel.share_core()

    def _new_splice(self, out: OutputStream, channel: Channel) -> Splice | None:
        """A splice over *channel*, whose stream is *out*; None where there is none to be had: then pages are copied."""
        if not channel.takes_references:
            return None
        try:
            splice = Splice(out)
        except ChannelError as refusal:  # no descriptors left, say
            trace.multifd_send_copies(channel.name, str(refusal))
            return None
        self._splices.append(splice)
        return splice

    def _outnumbers_cores(self) -> bool:
        """Whether the threads of both ends, were these on one host, would have to take turns."""
        return 2 * self._count > len(os.sched_getaffinity(0))

    def _run(self, number: int, sender: Sender) -> None:
        trace.multifd_send_thread_start(number)
        sender.run()
        trace.multifd_send_thread_end(number, sender.normal_pages, sender.zero_pages)

    @property
    def error(self) -> MigrationError | None:
        """What a channel failed of; None when it was only told to quit."""
        error = self.dispatch.error
        return None if isinstance(error, MigrationCancelled) else error

    @property
    def sent_bytes(self) -> int:
        return sum(sender.out.offset for sender in self._senders)

    @property
    def normal_pages(self) -> int:
        return sum(sender.normal_pages for sender in self._senders)

    @property
    def zero_pages(self) -> int:
        return sum(sender.zero_pages for sender in self._senders)

    @property
    def missed_zero_copy(self) -> int:
        """Sync points of a channel before which the kernel had copied everything, although it was asked not to."""
        return sum(sender.missed_zero_copy for sender in self._senders)

    @property
    def waiting_pages(self) -> int:
        """Given to the channels and not yet sent."""
        return max(self.dispatch.queued_pages - self.normal_pages - self.zero_pages, 0)

    def break_connections(self) -> None:
        """Shut every channel, as if the network had broken; from any thread, and without waiting."""
        for channel in tuple(self._channels):
            channel.shutdown()

    def close(self) -> None:
        """Join the threads and close the channels; the quit event is set, or everything has left."""
        if self._threads:
            trace.multifd_send_terminate_threads()
        self.dispatch.close()
        for thread in self._threads:
            thread.join()
        for channel in self._channels:
            channel.close()
        for splice in self._splices:
            splice.close()
        self._splices.clear()
        self._threads.clear()
        self._channels.clear()
