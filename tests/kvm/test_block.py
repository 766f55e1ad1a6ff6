"""A raw image: its bytes, its size, who may have it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from kvm.block import BlockError, RawImage


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(range(256)) * 64)
    return path


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize(("offset", "length"), [(0, 512), (512, 4096), (4096, 8192), (100, 1), (15872, 512), (0, 0)])
def test_what_is_written_is_read_back_and_nothing_else_changes(path: Path, direct: bool, offset: int, length: int) -> None:
    before = path.read_bytes()
    with RawImage(str(path), direct=direct) as image:
        image.write(offset, b"\xa5" * length)
        assert image.read(offset, length) == b"\xa5" * length
        image.flush()
    assert path.read_bytes() == before[:offset] + b"\xa5" * length + before[offset + length :]


@pytest.mark.parametrize("direct", [False, True])
def test_transfers_longer_than_a_piece_come_whole(path: Path, direct: bool) -> None:
    os.truncate(path, 4 << 20)
    data = os.urandom(3 << 20)
    with RawImage(str(path), direct=direct) as image:
        image.write(512 * 3, data)
        assert image.read(512 * 3, len(data)) == data


@pytest.mark.parametrize("direct", [False, True])
def test_the_size_is_rounded_up_to_sectors_and_the_rest_reads_as_zeroes(path: Path, direct: bool) -> None:
    path.write_bytes(b"x" * 1000)
    with RawImage(str(path), direct=direct) as image:
        assert image.size == 1024
        assert image.read(512, 512) == b"x" * 488 + bytes(24)
        image.write(512, b"y" * 512)
        assert image.read(0, 1024) == b"x" * 512 + b"y" * 512
    assert path.stat().st_size == 1024


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (16384, 1), (0, 16385), (1 << 63, 512)])
def test_nothing_outside_the_image_is_touched(path: Path, offset: int, length: int) -> None:
    with RawImage(str(path)) as image:
        for call in (image.read, image.discard, image.write_zeroes):
            with pytest.raises(ValueError, match="of an image of 0x4000 bytes"):
                call(offset, length)
        if length < 1 << 20:
            with pytest.raises(ValueError, match="of an image of 0x4000 bytes"):
                image.write(offset, bytes(length))
        assert image.size == path.stat().st_size == 16384


@pytest.mark.parametrize("unmaps", [False, True])
@pytest.mark.parametrize("may_unmap", [False, True])
def test_zeroes_are_zeroes_however_they_are_made(path: Path, unmaps: bool, may_unmap: bool) -> None:
    with RawImage(str(path), unmaps=unmaps) as image:
        image.write_zeroes(512, 8192, may_unmap=may_unmap)
        assert image.read(512, 8192) == bytes(8192)
        assert image.read(0, 512) == bytes(range(256)) * 2


def test_a_discard_gives_room_back_only_when_asked_to(path: Path) -> None:
    with RawImage(str(path)) as image:
        image.discard(0, 8192)
        assert image.read(0, 256) == bytes(range(256))
    with RawImage(str(path), unmaps=True) as image:
        image.discard(0, 8192)
        assert image.read(0, 8192) == bytes(8192)


def test_a_read_only_image_refuses_what_changes_it(path: Path) -> None:
    with RawImage(str(path), read_only=True) as image:
        assert image.read(0, 3) == b"\0\1\2"
        for call in (lambda: image.write(0, b"x"), lambda: image.write_zeroes(0, 512)):
            with pytest.raises(OSError) as caught:
                call()
            assert caught.value.errno == errno.EPERM


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "Could not open '{}': No such file or directory"),
        (".", "Could not open '{}': Is a directory"),
        ("fifo", "'file' driver requires '{}' to be a regular file"),
        ("a\0b", "Could not open '{}': embedded null byte"),
    ],
)
def test_what_is_no_image_is_refused_by_name(tmp_path: Path, name: str, message: str) -> None:
    os.mkfifo(tmp_path / "fifo")
    path = f"{tmp_path}/{name}"
    with pytest.raises(BlockError) as caught:
        RawImage(path)
    assert str(caught.value) == message.format(path)


# -- who uses it


def test_one_writer_at_a_time(path: Path) -> None:
    with RawImage(str(path)) as first, RawImage(str(path)) as second:
        first.lock()
        first.lock()
        with pytest.raises(BlockError, match='Failed to get "write" lock') as caught:
            second.lock()
        assert caught.value.hints == (f"Is another process using the image [{path}]?",)
        first.unlock()
        second.lock()


def test_readers_share_but_not_with_a_writer(path: Path) -> None:
    with (
        RawImage(str(path), read_only=True) as one,
        RawImage(str(path), read_only=True) as two,
        RawImage(str(path)) as writer,
    ):
        one.lock()
        two.lock()
        with pytest.raises(BlockError, match='Failed to get "write" lock'):
            writer.lock()
        one.unlock()
        two.unlock()
        writer.lock()
        with pytest.raises(BlockError, match='Failed to get shared "write" lock'):
            one.lock()


def test_without_locking_nobody_is_kept_off(path: Path) -> None:
    with RawImage(str(path), locks=False) as first, RawImage(str(path)) as second:
        first.lock()
        second.lock()


def test_a_refused_lock_leaves_no_claim_behind(path: Path) -> None:
    with RawImage(str(path)) as first, RawImage(str(path)) as second, RawImage(str(path)) as third:
        first.lock()
        with pytest.raises(BlockError):
            second.lock()
        first.unlock()
        third.lock()
