"""Pages that go by reference: every byte arrives behind its header, and whoever stalls or leaves holds nobody up."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import random
import socket
import threading

import pytest

from qemumig.errors import ChannelError, MigrationCancelled
from qemumig.multifd.splice import Splice
from qemumig.wire.stream import OutputStream

from .connection import connection

PAGE = 4096
MIB = 1 << 20


def read_to_end(far: socket.socket, got: bytearray) -> None:
    while data := far.recv(MIB):
        got += data


def pipes() -> set[int]:
    """The pipes that this process has open."""
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the one of the listing
            if os.readlink(f"/proc/self/fd/{fd}").startswith("pipe:"):
                found.add(int(fd))
    return found


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_UNIX])
@pytest.mark.parametrize("pipe_size", [None, PAGE, 3 * PAGE])
def test_headers_and_pages_arrive_in_order(family: socket.AddressFamily, pipe_size: int | None) -> None:
    chance = random.Random(pipe_size)
    memory = mmap.mmap(-1, 8 * MIB)
    memory[:] = chance.randbytes(len(memory))
    expected, got = bytearray(), bytearray()
    with connection(family) as (channel, far, _), memoryview(memory) as view:
        before = pipes()
        assert channel.takes_references
        out = OutputStream(channel)
        splice = Splice(out)
        ends = pipes() - before
        assert len(ends) == 2
        if pipe_size:  # as where pipes are many and the kernel gives less
            fcntl.fcntl(ends.pop(), fcntl.F_SETPIPE_SZ, pipe_size)
        reader = threading.Thread(target=read_to_end, args=(far, got))
        reader.start()
        for _ in range(60):
            header = chance.randbytes(chance.randint(1, PAGE))
            first = chance.randrange(len(memory) // PAGE)
            pages = view[first * PAGE : (first + chance.randint(1, 128)) * PAGE]
            splice.send_pages(header, pages)
            expected += header + pages
            pages.release()
        channel.finish()
        reader.join()
        assert out.offset == len(expected)
        splice.close()
        assert pipes() == before
    assert got == expected
    memory.close()


def test_a_page_that_changes_under_way_is_sent_by_reference() -> None:
    """What tells this from a copy, and why only some sources may use it."""
    memory = mmap.mmap(-1, PAGE)
    memory[:] = b"a" * PAGE
    with connection() as (channel, far, _):
        splice = Splice(OutputStream(channel))
        with memoryview(memory) as view:
            splice.send_pages(b"head", view)
        memory[:] = b"b" * PAGE
        channel.finish()
        got = bytearray()
        read_to_end(far, got)
        splice.close()
    assert got == b"head" + b"b" * PAGE
    memory.close()


def test_a_stalled_reader_is_waited_for_until_told_to_quit() -> None:
    with connection() as (channel, _, alarm):
        splice = Splice(OutputStream(channel))
        timer = threading.Timer(0.05, alarm.set)
        timer.start()
        with pytest.raises(MigrationCancelled):
            for _ in range(1000):
                splice.send_pages(b"head", bytearray(MIB // 2))
        timer.join()
        splice.close()


@pytest.mark.parametrize("how", ["reset", "shutdown"])
def test_a_connection_that_breaks_ends_the_wait(how: str) -> None:
    with connection() as (channel, far, _):
        splice = Splice(OutputStream(channel))
        far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        timer = threading.Timer(0.05, far.close if how == "reset" else channel.shutdown)
        timer.start()
        with pytest.raises(ChannelError, match=r"Unable to write to socket: (Broken pipe|Connection reset by peer)"):
            for _ in range(1000):
                splice.send_pages(b"head", bytearray(MIB // 2))
        timer.join()
        splice.close()


@pytest.mark.parametrize(("header", "memory"), [(b"", b"x"), (bytes(PAGE + 1), b"x"), (b"head", b"")])
def test_what_is_no_packet_is_refused(header: bytes, memory: bytes) -> None:
    with (
        connection() as (channel, _, _),
        pytest.raises(ValueError, match=f"a header of {len(header)} bytes before {len(memory)}"),
    ):
        Splice(OutputStream(channel)).send_pages(header, bytearray(memory))


def test_one_that_was_never_made_closes_nothing() -> None:
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(TypeError):
        Splice(None)  # type: ignore[arg-type]
    assert set(os.listdir("/proc/self/fd")) == before
