"""`fw_cfg`: what the guest is reading from the firmware configuration (machine.md §4); version 2, instance 0."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..fields import uint16, uint32, uint64
from ..vmstate import Subsection, VMState


@dataclass
class AcpiBlobs:
    """Sizes in bytes of the ACPI blobs among the RAM blocks."""

    table_mr_size: int = 0
    linker_mr_size: int = 0
    rsdp_mr_size: int = 0


@dataclass
class FwCfgState:
    """The selected key and the position in its data; *dma_addr* is None when the device has no DMA."""

    cur_entry: int = 0
    cur_offset: int = 0
    dma_addr: int | None = 0
    acpi_mr: AcpiBlobs | None = None


def _is_version_1(record: Any, version_id: int) -> bool:
    """The position had 16 bits in version 1; that field still shares its name with the one that replaced it."""
    return version_id == 1


_DMA = VMState("fw_cfg/dma", 0, (uint64("dma_addr", "value"),))

_ACPI_MR = VMState(
    "fw_cfg/acpi_mr",
    1,
    (uint64("table_mr_size"), uint64("linker_mr_size"), uint64("rsdp_mr_size")),
    record=AcpiBlobs,
)

FW_CFG = VMState(
    "fw_cfg",
    2,
    (uint16("cur_entry"), uint16("cur_offset", exists=_is_version_1), uint32("cur_offset", version=2)),
    minimum_version_id=1,
    subsections=(Subsection("dma_addr", _DMA), Subsection("acpi_mr", _ACPI_MR)),
    record=FwCfgState,
)
