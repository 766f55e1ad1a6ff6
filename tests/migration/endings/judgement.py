"""What must be true when a migration has ended, whatever ended it (state-machine.md §5).

    source        destination          the guest
    completed     completed            runs at the destination, or is stopped there when it could not be told so
    cancelled     setup or failed      runs at the source
    failed        setup or failed      runs at the source
    failed, names 'cont'               nowhere, or at the destination; `cont` on the side that has it lets it go on

Without a return path a source that has written everything says `completed`; the guest waits there, stopped, until somebody
has looked at the destination.
"""

from __future__ import annotations

import contextlib
from random import Random

from qemumig.channels.address import InetAddress
from qemumig.errors import StateError
from qemumig.qapi import MigrationStatus, RunState
from tests.support.fake_machine import FakeMachine
from tests.support.pair import Pair, wait_for

STATIC = 2 << 20  # memory from here on is not written by the guest

SETUP, FAILED, COMPLETED = MigrationStatus.SETUP, MigrationStatus.FAILED, MigrationStatus.COMPLETED


class Judge:
    """Knows what the guest's memory was, and finds out what became of it."""

    def __init__(self, pair: Pair, *, has_return_path: bool = True) -> None:
        self._pair = pair
        self._has_return_path = has_return_path
        self._memory = static_memory(pair.source)

    def settle(self, chance: Random) -> None:
        """Wait for the end of both sides; a pause before the switchover is ended now and then."""
        pair = self._pair
        self._wait_for_source(chance)
        if not self._may_be_taken():
            pair.link.stop()  # a source that leaves at once may still stand in the queue of those who want to connect
        if pair.link.is_used:
            wait_for(self._destination_has_ended, "the destination to end")

    def _wait_for_source(self, chance: Random) -> None:
        pair = self._pair

        def has_ended() -> bool:
            if pair.migration.status is MigrationStatus.PRE_SWITCHOVER and chance.random() < 0.2:
                with contextlib.suppress(StateError):  # it was cancelled meanwhile
                    pair.migration.proceed(MigrationStatus.PRE_SWITCHOVER)
            return not pair.migration.is_running

        wait_for(has_ended, "the source to end")

    def _destination_has_ended(self) -> bool:
        """With TLS, a peer that leaves before it has said anything is none, and the next one is waited for."""
        status = self._pair.incoming.status
        return status in (FAILED, COMPLETED) or (status is SETUP and self._pair.is_enciphered and not self._may_be_taken())

    def _may_be_taken(self) -> bool:
        """Whether the destination may have the guest, for all that the source knows."""
        return self._pair.migration.status is COMPLETED or "use 'cont'" in self._reason()

    def _reason(self) -> str:
        return str(self._pair.migration.query().get("error-desc", ""))

    def outcome(self) -> str:
        """Judge, and say in a few words which of the ends it was."""
        pair = self._pair
        source, destination = pair.migration.status, pair.incoming.status
        reason = self._reason()
        if "use 'cont'" in reason:
            assert source is FAILED and pair.source.runstate is RunState.POSTMIGRATE
            return "unknown, " + self._ask_by_hand()
        if source is COMPLETED and destination is not COMPLETED:
            assert not self._has_return_path, "the source says that a destination has the guest which has not"
            return "nobody listened, " + self._ask_by_hand()
        if source is COMPLETED:
            self._assert_guest(pair.destination, "destination")
            return "completed"
        assert destination is not COMPLETED, f"{source.value} here, {destination.value} there"
        assert reason or source is MigrationStatus.CANCELLED
        self._assert_guest(pair.source, "source")
        return source.value

    def _ask_by_hand(self) -> str:
        """What a person does: `cont` on the side that has the guest."""
        pair = self._pair
        assert "source" not in pair.running
        if pair.incoming.status is COMPLETED:
            if pair.destination.runstate is not RunState.RUNNING:
                assert "use 'cont'" in str(pair.incoming.query().get("error-desc", ""))
                pair.destination.start()
            self._assert_guest(pair.destination, "destination")
            return "at the destination"
        pair.source.start()
        self._assert_guest(pair.source, "source")
        return "at the source"

    def _assert_guest(self, machine: FakeMachine, side: str) -> None:
        self._pair.assert_guest_at(side)
        assert static_memory(machine) == self._memory, f"memory at the {side} is not what it was"

    def again(self) -> None:
        """A guest that stayed moves after all: both ends begin anew."""
        pair = self._pair
        while pair.migration.status is not COMPLETED:
            if pair.incoming.status is FAILED:
                pair.incoming.listen(InetAddress("127.0.0.1", "0"), exit_on_error=False)
            (where,) = pair.incoming.query()["socket-address"]
            pair.migration.start(InetAddress("127.0.0.1", where["port"]))
            self._wait_for_source(Random(0))
            # A destination with TLS may have been about to take the first source for one, and has failed since.
            assert pair.migration.status is COMPLETED or pair.is_enciphered, pair.migration.query()
        wait_for(lambda: pair.incoming.status in (FAILED, COMPLETED), "the destination to end")
        assert pair.incoming.status is COMPLETED
        self._assert_guest(pair.destination, "destination")


def static_memory(machine: FakeMachine) -> bytes:
    return machine.read(machine.ram, STATIC, machine.ram.used_length - STATIC)
