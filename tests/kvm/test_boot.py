from __future__ import annotations

from pathlib import Path

import pytest

from kvm.boot import FIRMWARE_LIMIT, FirmwareError, load_firmware


@pytest.mark.parametrize("size", [64 << 10, 192 << 10, FIRMWARE_LIMIT])
def test_an_image_of_whole_granules_is_loaded(tmp_path: Path, size: int) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"\x90" * size)
    assert load_firmware(str(path)) == b"\x90" * size


@pytest.mark.parametrize("size", [0, 1, 65535, 65537, FIRMWARE_LIMIT + (64 << 10)])
def test_other_sizes_are_refused_with_the_real_diagnostic(tmp_path: Path, size: int) -> None:
    path = tmp_path / "image"
    path.write_bytes(bytes(size))
    with pytest.raises(FirmwareError) as caught:
        load_firmware(str(path))
    assert str(caught.value) == f"qemu: could not load PC BIOS '{path}'"


def test_a_missing_file_and_a_directory_are_refused_alike(tmp_path: Path) -> None:
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(FirmwareError, match=f"could not load PC BIOS '{path}'"):
            load_firmware(str(path))
