"""Streams over a channel: order, bounds, ends."""

from __future__ import annotations

import os
import random
import threading

import pytest

from qemumig.errors import ChannelError, MigrationCancelled, StreamError
from qemumig.wire.stream import InputStream, OutputStream
from tests.support.memory import channel_pair


def test_what_is_written_is_read_across_every_buffer_boundary() -> None:
    source = random.Random(1)
    pieces = [source.randbytes(source.choice([0, 1, 7, 8, 4096, 70000, 700000])) for _ in range(60)]
    with channel_pair() as (left, right):

        def write() -> None:
            out = OutputStream(left)
            for piece in pieces:
                out.write(piece)
            out.flush()
            assert out.offset == sum(map(len, pieces))
            assert out.pending_bytes() == 0

        thread = threading.Thread(target=write)
        thread.start()
        stream = InputStream(right)
        offset = 0
        for piece in pieces:
            assert stream.offset == offset
            assert stream.peek(min(len(piece), 4096)) == piece[:4096]
            assert stream.read(len(piece)) == piece
            offset += len(piece)
        thread.join()
        assert stream.offset == offset


def test_integers_are_big_endian() -> None:
    with channel_pair() as (left, right):
        out = OutputStream(left)
        out.write_u8(1)
        out.write_be16(0x0203)
        out.write_be32(0x04050607)
        out.write_be64(0x08090A0B0C0D0E0F)
        out.flush()
        assert os.read(right.read_fd, 100) == bytes(range(1, 16))
        out.write(bytes(range(1, 16)))
        out.flush()
        stream = InputStream(right)
        assert (stream.read_u8(), stream.read_be16()) == (1, 0x0203)
        assert (stream.read_be32(), stream.read_be64()) == (0x04050607, 0x08090A0B0C0D0E0F)


def test_nothing_leaves_before_the_flush() -> None:
    with channel_pair() as (left, right):
        out = OutputStream(left)
        out.write(b"held back")
        assert out.pending_bytes() == 9
        with pytest.raises(BlockingIOError):
            os.read(right.read_fd, 1)
        out.flush()
        assert os.read(right.read_fd, 100) == b"held back"


def test_the_end_of_a_stream_is_named_with_its_place() -> None:
    with channel_pair() as (left, right):
        out = OutputStream(left)
        out.write(b"12345")
        out.flush()
        left.finish()
        stream = InputStream(right)
        assert stream.read(2) == b"12"
        assert stream.peek(10) == b"345"
        with pytest.raises(StreamError, match="stream ends inside the footer at offset 0x5") as caught:
            stream.read(4, "the footer")
        assert caught.value.offset == 5
        assert stream.read(3) == b"345"
        assert stream.peek(1) == b""


def test_a_broken_channel_names_its_kind_and_the_reason() -> None:
    with channel_pair() as (left, right):
        out = OutputStream(left)
        right.shutdown()
        out.write(b"x")
        with pytest.raises(ChannelError, match="Unable to write to socket: Broken pipe") as caught:
            out.flush()
        assert caught.value.channel == "left"
        assert out.pending_bytes() == 1
        with pytest.raises(ChannelError):
            out.flush()  # the first error stays


@pytest.mark.parametrize("direction", ["read", "write"])
def test_the_quit_event_wakes_whoever_waits(direction: str) -> None:
    with channel_pair() as (left, _right):
        timer = threading.Timer(0.05, lambda: os.eventfd_write(left.quit_fd, 1))
        timer.start()
        with pytest.raises(MigrationCancelled):
            if direction == "read":
                InputStream(left).read(1)
            else:
                out = OutputStream(left)
                while True:
                    out.write(bytes(65536))
        timer.join()


def test_peeking_is_bounded() -> None:
    with channel_pair() as (left, _right), pytest.raises(ValueError, match="cannot peek 4097 bytes"):
        InputStream(left).peek(4097)
