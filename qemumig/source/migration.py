"""Migration: the source side as a monitor drives it, over any number of attempts.

    start ─▶ Attempt (a thread of its own) ─▶ completed, failed or cancelled ─▶ start again …

Threads   the control loop's thread calls everything here; an attempt announces its changes from its own thread.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

from .. import trace
from ..channels.address import Address
from ..channels.channel import Channel, QuitEvent
from ..channels.connect import no_object, outgoing, tls_of_source
from ..channels.file import OpenPath, no_path
from ..errors import MigrationError, OptionError, StateError
from ..machine import HoldEvents, Machine
from ..options import MigrationOptions
from ..qapi import MigrationStatus, RunState
from ..states import IN_POSTCOPY, SOURCE, StatusMachine
from .attempt import Attempt
from .postcopy import PostcopyAttempt
from .snapshot import SnapshotAttempt
from .statistics import describe

if TYPE_CHECKING:  # most migrations have no TLS: its library is loaded by those that do
    from ..channels.objects import FindObject

Emit = Callable[[str, dict[str, Any] | None], None]


class Migration:
    """Outgoing migrations of *machine*.

    *emit* sends an event (MIGRATION and MIGRATION_PASS, only with capability `events`); *take_fd* hands out a
    descriptor by the name it was given, *open_path* one for a path that means a set of them; *find_object* gives the
    objects that parameters name.  Inside *hold_events* the guest stands still, and events may wait a little.
    """

    def __init__(
        self,
        machine: Machine,
        options: MigrationOptions,
        *,
        emit: Emit,
        take_fd: Callable[[str], int],
        find_object: FindObject = no_object,
        open_path: OpenPath = no_path,
        hold_events: HoldEvents = nullcontext,
    ) -> None:
        self._machine = machine
        self._options = options
        self._emit = emit
        self._take_fd = take_fd
        self._find_object = find_object
        self._open_path = open_path
        self._hold_events = hold_events
        self._states = StatusMachine(SOURCE, self._announce)
        self._attempt: Attempt | None = None
        self._quit: QuitEvent | None = None  # of the attempt
        self._error: MigrationError | None = None  # of a start that did not get as far as an attempt

    @property
    def status(self) -> MigrationStatus:
        return self._states.status

    @property
    def is_running(self) -> bool:
        return self._states.is_running

    def start(self, address: Address) -> None:
        """Begin to migrate to *address*; returns as soon as connecting has begun.

        Raises StateError when the machine or an earlier migration is in the way, OptionError when the address cannot
        carry what the options ask for, ChannelError when the channel cannot even be opened; then the status is `failed`.
        """
        self._check_state()
        self._wait_for_thread()
        status = self._states.status
        if not self._states.advance(status, MigrationStatus.SETUP):
            raise StateError("There's a migration process in progress", state=self._states.status)
        self._error = self._attempt = None
        quit_event = QuitEvent()
        try:
            open_channel = self._opener(address, quit_event.fd)
        except MigrationError as error:
            quit_event.close()
            self._error = error
            self._states.advance(MigrationStatus.SETUP, MigrationStatus.FAILED)
            raise
        self._quit = quit_event
        what = (
            self._machine,
            self._options,
            self._states,
            open_channel,
            quit_event,
            self._announce_pass,
            self._hold_events,
        )
        if self._options.capability("postcopy-ram"):
            self._attempt = PostcopyAttempt(*what, open_another=lambda: self._opener(address, quit_event.fd)())
        elif self._options.capability("background-snapshot"):
            self._attempt = SnapshotAttempt(*what)
        else:
            self._attempt = Attempt(*what)
        self._attempt.start()

    def _opener(self, address: Address, quit_fd: int) -> Callable[[], Channel]:
        tls = partial(tls_of_source, self._options, self._find_object, address)
        return outgoing(address, quit_fd, self._take_fd, tls=tls, open_path=self._open_path)

    def resume(self, address: Address) -> None:
        """Go on with a postcopy that is paused, over a connection to *address*."""
        attempt = self._attempt
        if not isinstance(attempt, PostcopyAttempt) or self._states.status is not MigrationStatus.POSTCOPY_PAUSED:
            raise StateError("Cannot resume if there is no paused migration", state=self._states.status)
        if self._options.capability("release-ram"):
            text = "Postcopy recovery cannot work when release-ram capability is set"
            raise OptionError(text, name="release-ram", value=True)
        assert self._quit is not None
        quit_fd = self._quit.fd
        attempt.resume(self._opener(address, quit_fd), lambda: self._opener(address, quit_fd)())

    def start_postcopy(self) -> None:
        """Let the guest move before its memory has."""
        if isinstance(self._attempt, PostcopyAttempt):
            self._attempt.start_postcopy()

    def pause(self) -> None:
        """What `migrate-pause` does on this side."""
        if isinstance(self._attempt, PostcopyAttempt):
            self._attempt.pause()
            return
        raise StateError(
            "migrate-pause is currently only supported during postcopy-active or postcopy-recover state",
            state=self._states.status,
        )

    def cancel(self) -> None:
        """Ask a running migration to end; without effect when none runs."""
        trace.migration_cancel()
        if isinstance(self._attempt, PostcopyAttempt) and self._attempt.cancel_postcopy():
            return
        if self._attempt is not None and self._states.advance_from_any(MigrationStatus.CANCELLING):
            self._attempt.cancel()

    def break_connection(self) -> None:
        """Break the connection of a migration that runs, as if the network had (state-machine.md §6)."""
        if self._attempt is not None:
            self._attempt.break_connection()

    def proceed(self, state: MigrationStatus) -> None:
        """Go on from *state*, which must be the current one; only the pause before the switchover waits for this."""
        current = self._states.status
        if current is not state:
            text = f"Migration not in expected state: {current.value}"
            raise StateError(text, state=current, required=state)
        if self._attempt is not None and state is MigrationStatus.PRE_SWITCHOVER:
            self._attempt.proceed()

    def query(self) -> dict[str, Any]:
        """What query-migrate shows of this side; empty when there never was a migration."""
        status = self._states.status
        if status is MigrationStatus.NONE:
            return {}
        info: dict[str, Any] = {"status": status.value}
        if self._attempt is not None:
            info |= describe(self._attempt, status, self._options.parameter("downtime-limit"))
        elif self._error is not None:
            info["error-desc"] = str(self._error)
        return info

    def close(self) -> None:
        """End whatever runs and join its thread; the process is about to exit."""
        if self._states.status not in IN_POSTCOPY:
            self.cancel()
        if self._attempt is not None:
            self._attempt.abandon()
        self._wait_for_thread()

    def _check_state(self) -> None:
        if self._states.is_running:
            raise StateError("There's a migration process in progress", state=self._states.status)
        runstate = self._machine.runstate
        if runstate is RunState.INMIGRATE:
            raise StateError("Guest is waiting for an incoming migration", state=runstate)
        if runstate is RunState.POSTMIGRATE:
            raise StateError("Can't migrate the vm that was paused due to previous migration", state=runstate)
        if blockers := self._machine.migration_blockers:
            raise StateError(blockers[0], state=runstate)

    def _wait_for_thread(self) -> None:
        """The status is final a moment before the thread has ended."""
        if self._attempt is not None:
            self._attempt.join()

    def _announce(self, status: MigrationStatus) -> None:
        if self._options.capability("events"):
            self._emit("MIGRATION", {"status": status.value})

    def _announce_pass(self, number: int) -> None:
        if self._options.capability("events"):
            self._emit("MIGRATION_PASS", {"pass": number})
