"""`port92`: a PC's system control port; version 1, instance 0.  Learnt from a real PC's stream."""

from __future__ import annotations

from dataclasses import dataclass

from ..fields import uint8
from ..vmstate import VMState

A20_ENABLED = 2


@dataclass
class Port92State:
    """The port as it reads."""

    outport: int = A20_ENABLED  # as firmware leaves it


PORT92 = VMState("port92", 1, (uint8("outport"),), record=Port92State)
