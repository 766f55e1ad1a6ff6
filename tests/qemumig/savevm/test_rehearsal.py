"""A rehearsal of device state goes through for every section that a machine can have, and changes no machine."""

from __future__ import annotations

import copy

from qemumig.savevm.rehearsal import rehearse
from tests.support.fake_machine import FakeMachine


def test_nothing_of_a_machine_is_changed() -> None:
    machine = FakeMachine(cpus=2)
    before = copy.deepcopy(machine.records)
    rehearse(machine.sections())
    assert machine.records == before
