"""A rehearsal of device state: what is done for the first time takes twice as long, while a guest stands still.

Every section is written and read once or twice, with the values that its record begins with, while there is time: before
the source has connected.  Nothing of the machine is read or changed.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..machine import DeviceSection
from .reader import BytesReader

TIMES = 2  # from the second time on the interpreter knows its way


def rehearse(sections: Iterable[DeviceSection]) -> None:
    """Encode and decode all of *sections*."""
    for section in list(sections) * TIMES:
        data, _ = section.vmstate.save(section.vmstate.record())
        section.vmstate.load(BytesReader(data), section.vmstate.version_id)
