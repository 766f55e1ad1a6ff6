"""The guest image as the tools patch and read it."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from qemumig.cli import guest
from qemumig.cli.guest import GuestParameters, failures_in, parse_status

GUESTS = Path(__file__).parents[2] / "guests"


def test_installed_image_has_the_bytes_of_the_tests() -> None:
    installed = Path(guest.__file__).with_name("tinyguest.bin").read_bytes()
    assert installed == (GUESTS / "tinyguest.bin").read_bytes()


def test_defaults_leave_the_image_as_it_is() -> None:
    assert GuestParameters().image() == (GUESTS / "tinyguest.bin").read_bytes()


def test_each_parameter_lands_in_its_field() -> None:
    image = GuestParameters(
        dirty_base=0x11, dirty_pages=0x22, print_every=0x33, spin=0x44, fill_base=0x55, fill_pages=0x66,
        fill_mode=3, flags=15, cpus=2, map_gib=8, xcr0_mask=7, apic_count=0x77,
    ).image()  # fmt: skip
    values = struct.unpack_from("<6Q4IQI", image, 8)
    assert values == (0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 3, 15, 2, 8, 7, 0x77)


def test_parameter_too_big_for_its_field_is_refused() -> None:
    with pytest.raises(ValueError, match=r"guest parameter flags: 4294967296 does not fit"):
        GuestParameters(flags=1 << 32).image()


def test_status_blocks_say_how_each_cpu_fares() -> None:
    data = struct.pack("<8Q", 7, 1, 0, 0, 0, 5, 6, 3) + struct.pack("<8Q", 9, 1, ord("#"), 0x4000, 12, 5, 6, 4)
    well, ill = parse_status(data, 2)
    assert (well.passes, well.error, well.complaint) == (7, "", "")
    assert ill.complaint == "'#' after 9 passes: a page has wrong contents (address 0x4000, 0xc)"


def test_status_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(ValueError, match="63 bytes, expected 64 for 1 vCPUs"):
        parse_status(bytes(63), 1)


def test_failures_are_found_among_letters() -> None:
    assert failures_in(b"ABtBtCB") == []
    assert failures_in(b"AB#B#<") == ["#", "<"]
