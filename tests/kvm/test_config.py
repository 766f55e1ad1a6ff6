from __future__ import annotations

import pytest

from kvm.config import Chipset


@pytest.mark.parametrize(
    ("chipset", "slots", "first_gsi"),
    [
        (Chipset(), 8, 5),
        (Chipset(pit=True, pic=True, rtc=True), 8, 5),
        (Chipset(acpi=True), 8, 16),
        (Chipset(acpi=True, ioapic2=True), 24, 24),
    ],
)
def test_virtio_slots_follow_from_acpi_and_the_second_ioapic(chipset: Chipset, slots: int, first_gsi: int) -> None:
    assert (chipset.virtio_slots, chipset.first_virtio_gsi) == (slots, first_gsi)
