"""`yank` for a migration: every connection that it has is shut down, both ways (state-machine.md §6).

Its threads find that out as they would a broken network: the source fails and the guest runs on there, the destination
fails.  A source that still connects or shakes hands gives that up; a destination that waits for its source waits on.

Threads   any; `Channel.shutdown` never waits.
"""

from __future__ import annotations

from ..destination.incoming import IncomingMigration
from ..source.migration import Migration


def shut_channels(source: Migration, destination: IncomingMigration) -> None:
    """Shut down the channels of both sides, as far as they have any."""
    source.break_connection()
    destination.break_connection()
