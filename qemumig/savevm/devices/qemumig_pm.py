"""`qemumig-pm`: the ACPI power management block of the minimal PC, a section of our own; version 1, instance 0.

A PC of QEMU's has these registers in the sections of its chipsets, with much else that the minimal PC has not.  The
fields have the names and the sizes that they have there.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..fields import boolean, uint16
from ..vmstate import VMState

SCI_ENABLED = 1


@dataclass
class PmState:
    """The registers of PM1; *asleep*: the guest has suspended itself, and nobody has woken it yet."""

    sts: int = 0
    en: int = 0
    cnt: int = SCI_ENABLED  # as firmware leaves it
    asleep: bool = False


QEMUMIG_PM = VMState("qemumig-pm", 1, (uint16("sts"), uint16("en"), uint16("cnt"), boolean("asleep")), record=PmState)
