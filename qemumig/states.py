"""The status of a migration, one table a side, and the one function that moves it (state-machine.md §1–§3).

Source

    none ─▶ setup ─▶ active ─▶ [pre-switchover] ─▶ device ─▶ completed
              │        │              │              │
              ├────────┴──────────────┴──────────────┼─▶ cancelling ─▶ cancelled
              └──────────────────────────────────────┼─▶ failed
                                                     └─▶ postcopy-device ─▶ postcopy-active ─▶ completed

    postcopy-active ─▶ postcopy-paused ─▶ postcopy-recover-setup ─▶ postcopy-recover ─▶ postcopy-active

    none        no migration yet
    setup       connecting, header, START sections.  The guest runs here and only here
    active      rounds over dirty memory.  The guest runs here; nothing is lost by giving up
    pre-switchover  the guest is stopped, and here only; the migration waits for `migrate-continue`
    device      the guest is stopped; its last pages and its devices are being sent.  It still lives here only, until the
                last byte is out
    postcopy-…  of the guest's memory, what was not sent is here only
      device        the destination puts device state into effect.  If it refuses, the guest goes on here
      active        the guest runs at the destination, and asks for pages
      paused        the connection is lost.  Nothing else is: a `migrate` with `resume` goes on
      recover-setup connecting anew
      recover       being told what the destination has
    completed   the guest lives at the destination.  Here it stays stopped
    failed      the migration ended by an error: the guest runs here again, unless `error-desc` says that the outcome is
                unknown
    cancelling  somebody asked to stop; the threads wind down
    cancelled   the guest runs here again

Destination

    none ─▶ setup ─▶ active ─▶ completed
              └────────┼─────▶ failed ─▶ setup
                       └─▶ postcopy-device ─▶ postcopy-active ─▶ completed
                                                ▲   └─▶ postcopy-paused ─▶ postcopy-recover
                                                └────────────────────────────────┘

    setup       waiting for the main channel
    active      the stream is being loaded; no vCPU runs, and none will before the stream is whole
    postcopy-…  the guest is here, its memory only in parts
      device        nothing runs yet, and a failure is a refusal, until device state is in effect
      active        the guest runs, and waits for what it touches and is not here
      paused        the connection is lost; the guest runs on until it needs what is missing
      recover       the source is here again, and is told what has arrived
    completed   the guest is here
    failed      the stream was refused or ended early; memory is discarded, a new migrate-incoming may follow

Every change is a compare-and-swap *expected → new*; when another thread was first it does not happen, and that alone
settles the races between cancel, failure and completion.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

from . import trace
from .errors import StateError
from .qapi import MigrationStatus as S

SOURCE: Mapping[S, frozenset[S]] = {
    S.NONE: frozenset({S.SETUP}),
    S.SETUP: frozenset({S.ACTIVE, S.FAILED, S.CANCELLING}),
    S.ACTIVE: frozenset({S.PRE_SWITCHOVER, S.DEVICE, S.COMPLETED, S.FAILED, S.CANCELLING}),
    S.PRE_SWITCHOVER: frozenset({S.DEVICE, S.FAILED, S.CANCELLING}),
    S.DEVICE: frozenset({S.COMPLETED, S.FAILED, S.CANCELLING, S.POSTCOPY_DEVICE}),
    S.POSTCOPY_DEVICE: frozenset({S.POSTCOPY_ACTIVE, S.POSTCOPY_PAUSED, S.FAILED}),
    S.POSTCOPY_ACTIVE: frozenset({S.COMPLETED, S.POSTCOPY_PAUSED, S.FAILED}),
    S.POSTCOPY_PAUSED: frozenset({S.POSTCOPY_RECOVER_SETUP, S.FAILED}),
    S.POSTCOPY_RECOVER_SETUP: frozenset({S.POSTCOPY_RECOVER, S.POSTCOPY_PAUSED}),
    S.POSTCOPY_RECOVER: frozenset({S.POSTCOPY_ACTIVE, S.POSTCOPY_PAUSED}),
    S.CANCELLING: frozenset({S.CANCELLED, S.COMPLETED, S.FAILED}),
    S.CANCELLED: frozenset({S.SETUP}),
    S.COMPLETED: frozenset({S.SETUP}),
    S.FAILED: frozenset({S.SETUP}),
}

DESTINATION: Mapping[S, frozenset[S]] = {
    S.NONE: frozenset({S.SETUP}),
    S.SETUP: frozenset({S.ACTIVE, S.FAILED}),
    S.ACTIVE: frozenset({S.COMPLETED, S.FAILED, S.POSTCOPY_DEVICE}),
    S.POSTCOPY_DEVICE: frozenset({S.POSTCOPY_ACTIVE, S.FAILED}),
    S.POSTCOPY_ACTIVE: frozenset({S.COMPLETED, S.POSTCOPY_PAUSED}),
    S.POSTCOPY_PAUSED: frozenset({S.POSTCOPY_RECOVER}),
    S.POSTCOPY_RECOVER: frozenset({S.POSTCOPY_ACTIVE, S.POSTCOPY_PAUSED}),
    S.COMPLETED: frozenset(),
    S.FAILED: frozenset({S.SETUP}),
}

IN_POSTCOPY = frozenset(
    {S.POSTCOPY_DEVICE, S.POSTCOPY_ACTIVE, S.POSTCOPY_PAUSED, S.POSTCOPY_RECOVER_SETUP, S.POSTCOPY_RECOVER}
)
"""The guest belongs to the destination, or may: it cannot be had back by a cancel."""

RUNNING = frozenset({S.SETUP, S.ACTIVE, S.PRE_SWITCHOVER, S.DEVICE, S.CANCELLING}) | IN_POSTCOPY
"""A migration is under way: a second one is refused, capabilities are locked, a cancel acts."""


class StatusMachine:
    """The status of one side.  *announce* is told of every change, outside the lock, in the changing thread."""

    def __init__(self, table: Mapping[S, frozenset[S]], announce: Callable[[S], None]) -> None:
        self._table = table
        self._announce = announce
        self._lock = threading.Lock()
        self._status = S.NONE

    @property
    def status(self) -> S:
        return self._status

    @property
    def is_running(self) -> bool:
        return self._status in RUNNING

    def advance(self, expected: S, new: S) -> bool:
        """Move from *expected* to *new*; False when another thread (a cancel, say) was first."""
        with self._lock:
            if self._status is not expected:
                return False
            if new not in self._table[expected]:
                raise StateError(f"no path from '{expected.value}' to '{new.value}'", state=expected, required=new)
            self._status = new
        trace.migrate_set_state(new.value)
        self._announce(new)
        return True

    def advance_from_any(self, new: S) -> bool:
        """Move to *new* from wherever a path leads there; False when none does."""
        while True:
            status = self._status
            if new not in self._table[status]:
                return False
            if self.advance(status, new):
                return True
