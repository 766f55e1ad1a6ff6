"""A rehearsal of device state: what is done for the first time takes twice as long, while a guest stands still.

Every section is written and read, with the values that its record begins with, while there is time: before the source has
connected, and once more, for the caches, in the last moments before a guest is stopped.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..machine import DeviceSection, Machine
from .reader import BytesReader

TIMES = 2  # from the second time on the interpreter knows its way


def rehearse_arrival(machine: Machine) -> None:
    """Go through all that is done with the state that a source sends to *machine*, which is still to come."""
    rehearse(machine.sections())
    for _ in range(TIMES):
        machine.rehearse_load()


def rehearse(sections: Iterable[DeviceSection], times: int = TIMES) -> None:
    """Encode and decode all of *sections*; nothing of the machine is read or changed."""
    for section in list(sections) * times:
        data, _ = section.vmstate.save(section.vmstate.record())
        section.vmstate.load(BytesReader(data), section.vmstate.version_id)
