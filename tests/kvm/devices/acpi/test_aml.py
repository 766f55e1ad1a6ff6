from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvm.devices.acpi import aml
from tests.kvm.devices.acpi.reader import Aml


@pytest.mark.parametrize(
    ("text", "bytes_"), [("COM1", b"COM1"), ("GED", b"GED_"), ("\\_SB_", b"\\_SB_"), ("\\", None), ("TOOLONG", None)]
)
def test_names_have_four_characters(text: str, bytes_: bytes | None) -> None:
    if bytes_ is None:
        with pytest.raises(ValueError, match="expected 1 to 4"):
            aml.path(text)
    else:
        assert aml.path(text) == bytes_


def test_an_eisa_id_is_packed_letters_and_digits() -> None:
    assert aml.eisa_id("PNP0501") == bytes.fromhex("0c 41d00501")
    assert aml.eisa_id("PNP0C0C") == bytes.fromhex("0c 41d00c0c")


@given(st.integers(0, (1 << 32) - 1))
def test_integers_are_read_back(value: int) -> None:
    assert Aml(aml.name("VAL_", aml.integer(value))).root.names == {"\\VAL_": value}


@pytest.mark.parametrize("length", [0, 50, 57, 58, 59, 60, 61, 62, 4000, 4080, 4095, 5000, 1 << 20])
def test_lengths_count_their_own_bytes(length: int) -> None:
    text = "x" * length
    found = Aml(aml.device("DEV_", aml.name("_HID", aml.string(text))) + aml.name("END_", aml.integer(7)))
    assert found.devices["\\DEV_"].names == {"_HID": text}
    assert found.root.names == {"\\END_": 7}


def test_an_object_that_no_length_can_say_is_refused() -> None:
    with pytest.raises(ValueError, match="too long, expected less than 0x10000000"):
        aml.device("DEV_", bytes(1 << 28))
