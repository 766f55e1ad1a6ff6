"""A temporary snapshot of an image: what is written is there until the end, and the file never changes."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvm.block import BlockError, RawImage
from kvm.block_snapshot import CLUSTER_SIZE, TemporarySnapshot

SIZE = 5 * CLUSTER_SIZE + 512


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An image; whatever happens to its snapshot, it stays as it is, and nothing is left in the folder."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    path = tmp_path / "disk.img"
    contents = random.Random(1).randbytes(SIZE)
    path.write_bytes(contents)
    yield path
    assert path.read_bytes() == contents
    assert os.listdir(tmp_path) == ["disk.img"]


@pytest.mark.parametrize("direct", [False, True])
def test_it_reads_as_a_disk_that_was_written_to(path: Path, direct: bool) -> None:
    """A thousand accesses by chance, against a plain piece of memory."""
    chance = random.Random(2)
    expected = bytearray(path.read_bytes())
    with TemporarySnapshot(str(path), direct=direct) as image:
        for _ in range(1000):
            offset = chance.randrange(SIZE)
            length = chance.choice((0, 1, 512, 4096, CLUSTER_SIZE, chance.randrange(SIZE)))
            length = min(length, SIZE - offset)
            what = chance.randrange(8)
            if what == 0:
                image.write(offset, data := chance.randbytes(length))
                expected[offset : offset + length] = data
            elif what == 1:
                image.write_zeroes(offset, length, may_unmap=True)
                expected[offset : offset + length] = bytes(length)
            elif what == 2:
                image.discard(offset, length)
                image.flush()
            assert image.read(offset, length) == expected[offset : offset + length]
        assert image.read(0, SIZE) == expected


def test_it_begins_anew_every_time(path: Path) -> None:
    for _ in range(2):
        with TemporarySnapshot(str(path)) as image:
            assert image.read(0, 512) == path.read_bytes()[:512]
            image.write(0, bytes(512))
            assert image.forgets


def test_only_writing_is_private(path: Path) -> None:
    """Two may have snapshots of one image, but nobody may write to it meanwhile."""
    with TemporarySnapshot(str(path)) as one, TemporarySnapshot(str(path)) as other, RawImage(str(path)) as writer:
        one.lock()
        other.lock()
        with pytest.raises(BlockError, match="Failed to get"):
            writer.lock()


def test_a_snapshot_that_is_only_read_refuses_writes(path: Path) -> None:
    with TemporarySnapshot(str(path), read_only=True) as image:
        assert not image.forgets
        with pytest.raises(PermissionError):
            image.write(0, b"x")


def test_nothing_outside_is_touched(path: Path) -> None:
    with TemporarySnapshot(str(path)) as image:
        for call in (image.read, image.discard, image.write_zeroes):
            with pytest.raises(ValueError, match="of an image of"):
                call(SIZE, 1)
        with pytest.raises(ValueError, match="of an image of"):
            image.write(SIZE - 1, b"xy")


def test_a_folder_that_is_not_there_is_named(path: Path, monkeypatch: pytest.MonkeyPatch, no_leaks: None) -> None:
    monkeypatch.setenv("TMPDIR", "/nosuch")
    with pytest.raises(BlockError, match="Could not open a temporary file in '/nosuch': No such file"):
        TemporarySnapshot(str(path))
