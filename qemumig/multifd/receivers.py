"""The destination's channels: their threads, and the sync points of the main channel (multifd.md §6).

Whether a source syncs once a round or after every section shows in the body of its START: there is a MULTIFD_FLUSH in
it, or there is none.  So nothing has to be configured on this side, and a mismatch cannot happen.

Threads   the loading thread calls everything here; `mig/dst/recv_N` runs the Receiver of channel N.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from .. import trace
from ..errors import MigrationError, StreamError
from ..options import MigrationOptions
from ..ram.landing import Landing
from ..threads import start_thread
from ..wire.stream import InputStream
from .methods import method_of
from .recv import Meeting, Receiver


class Receivers:
    """Loads the packets of *channels* (id: stream) to *landing*; *on_failure* wakes the loading thread wherever it is."""

    def __init__(
        self,
        channels: Mapping[int, InputStream],
        landing: Landing,
        options: MigrationOptions,
        quit_fd: int,
        on_failure: Callable[[], None],
    ) -> None:
        landing.share()
        self._quit_fd = quit_fd
        self._meeting = Meeting(len(channels), on_failure)
        self._receivers = [Receiver(number, stream, self._meeting, landing) for number, stream in sorted(channels.items())]
        method = method_of(options)
        if method is not None:
            for receiver in self._receivers:
                receiver.decompress_with(method.flag, method.decompressor())
        self._per_section: bool | None = None  # None: START has not ended yet
        self._flushes = 0
        self._threads = [
            start_thread(f"mig/dst/recv_{each.channel_id}", partial(self._run, each)) for each in self._receivers
        ]

    @staticmethod
    def _run(receiver: Receiver) -> None:
        trace.multifd_recv_thread_start(receiver.channel_id)
        receiver.run()
        trace.multifd_recv_thread_end(receiver.channel_id, receiver.normal_pages)

    @property
    def normal_pages(self) -> int:
        return sum(receiver.normal_pages for receiver in self._receivers)

    @property
    def error(self) -> MigrationError | None:
        """What a channel failed of, if one did."""
        return self._meeting.error

    def fail(self, error: MigrationError) -> None:
        """End the load because of *error*; from any thread."""
        self._meeting.fail(error)

    def flush(self) -> None:
        """The main channel has a MULTIFD_FLUSH."""
        if self._per_section:
            raise StreamError(
                "MULTIFD_FLUSH in a stream whose first section has none, and which therefore syncs after every section"
            )
        self._flushes += 1
        self._sync()

    def end_section(self) -> None:
        """The body of a section 'ram' is over."""
        if self._per_section is None:
            self._per_section = self._flushes == 0
        if self._per_section:
            self._sync()

    def _sync(self) -> None:
        self._meeting.sync(self._quit_fd)
        trace.multifd_recv_sync_main(self.normal_pages)

    def complete(self) -> None:
        """The stream is over: nothing is loaded any more; raises what a channel failed of, or left unsynced."""
        self._meeting.close(is_complete=True)

    def stop(self) -> None:
        """Join the threads; the quit event is set."""
        trace.multifd_recv_terminate_threads(int(self.error is not None))
        self._meeting.close(is_complete=False)
        for thread in self._threads:
            thread.join()
        self._meeting.release()
