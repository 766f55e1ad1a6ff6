"""The status tables, and the one function that moves along them."""

import threading

import pytest

from qemumig.errors import StateError
from qemumig.qapi import MigrationStatus as S
from qemumig.states import DESTINATION, IN_POSTCOPY, RUNNING, SOURCE, StatusMachine


@pytest.mark.parametrize("table", [SOURCE, DESTINATION], ids=["source", "destination"])
def test_every_state_can_be_reached_and_every_move_leads_to_a_state(table: dict) -> None:
    reached, todo = set(), [S.NONE]
    while todo:
        state = todo.pop()
        if state not in reached:
            reached.add(state)
            todo.extend(table[state])
    assert reached == set(table)


def test_a_move_from_elsewhere_does_not_happen_and_is_not_announced() -> None:
    announced: list[S] = []
    machine = StatusMachine(SOURCE, announced.append)
    assert not machine.advance(S.ACTIVE, S.DEVICE)
    assert machine.advance(S.NONE, S.SETUP)
    assert machine.status is S.SETUP and machine.is_running
    assert announced == [S.SETUP]


def test_a_path_that_is_not_in_the_table_is_an_error() -> None:
    machine = StatusMachine(SOURCE, lambda status: None)
    with pytest.raises(StateError, match="no path from 'none' to 'completed'"):
        machine.advance(S.NONE, S.COMPLETED)


def test_of_two_that_leave_one_state_exactly_one_wins() -> None:
    for _ in range(200):
        machine = StatusMachine(SOURCE, lambda status: None)
        machine.advance(S.NONE, S.SETUP)
        machine.advance(S.SETUP, S.ACTIVE)
        machine.advance(S.ACTIVE, S.DEVICE)
        won: list[S] = []
        barrier = threading.Barrier(2)

        def leave(new: S, machine: StatusMachine = machine, won: list = won, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            if machine.advance(S.DEVICE, new):
                won.append(new)

        threads = [threading.Thread(target=leave, args=(new,)) for new in (S.COMPLETED, S.CANCELLING)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert won == [machine.status]


def test_cancel_acts_on_running_states_only() -> None:
    for status in SOURCE:
        can_cancel = S.CANCELLING in SOURCE[status]
        assert can_cancel == (status in RUNNING - IN_POSTCOPY - {S.CANCELLING})
