"""A section of device state and the device behind it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qemumig.machine import DeviceSection


@dataclass(frozen=True)
class BoardSection:
    """A section, and who saves and loads it."""

    section: DeviceSection
    save: Callable[[], Any]
    load: Callable[[Any], None]


def board_section(idstr: str, vmstate: Any, device: Any, instance: int = 0) -> BoardSection:
    """The section of *device*."""
    return BoardSection(DeviceSection(idstr, instance, vmstate), device.save, device.load)
