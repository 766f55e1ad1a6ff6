"""Where each run state may lead; the picture is in machine.py."""

from __future__ import annotations

from qemumig.errors import StateError
from qemumig.qapi import RunState

_STOPPED = frozenset(RunState) - {RunState.RUNNING, RunState.INMIGRATE, RunState.PRECONFIG}
IN_TRANSIT = frozenset({RunState.INMIGRATE, RunState.FINISH_MIGRATE, RunState.SAVE_VM, RunState.RESTORE_VM})
_DEAD = frozenset({RunState.INTERNAL_ERROR, RunState.SHUTDOWN, RunState.GUEST_PANICKED})

# Where each run state may lead; the same state again is always allowed.
NEXT: dict[RunState, frozenset[RunState]] = {
    RunState.RUNNING: _STOPPED - {RunState.PRELAUNCH, RunState.POSTMIGRATE},
    RunState.INMIGRATE: frozenset(RunState) - {RunState.PRECONFIG},
    **{state: _STOPPED | {RunState.RUNNING} for state in _STOPPED - _DEAD},
    # Only a reset leads back into life.
    **{state: frozenset({RunState.PRELAUNCH, RunState.FINISH_MIGRATE, RunState.POSTMIGRATE}) for state in _DEAD},
}


def require_next(current: RunState, state: RunState) -> None:
    """StateError when a machine that is *current* cannot become *state*."""
    if state is not current and state not in NEXT.get(current, ()):
        raise StateError(f"the machine is {current.value} and cannot become {state.value}", state=current, required=state)


def require_rename(current: RunState, state: RunState) -> None:
    """StateError unless a machine that is stopped shall be called by the name of another stopped state."""
    if RunState.RUNNING in (current, state):
        raise StateError(
            f"the machine is {current.value}, only a stopped one can be called {state.value}", state=current, required=state
        )
