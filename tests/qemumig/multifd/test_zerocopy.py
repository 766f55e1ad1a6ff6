"""Pages that the network takes from where they lie: all completions are told, and what cannot be is said."""

from __future__ import annotations

import ctypes
import os
import resource
import socket
import subprocess
import sys
import threading

import pytest

from qemumig.channels.channel import Channel, QuitEvent, SocketChannel
from qemumig.errors import ChannelError, MigrationCancelled
from qemumig.multifd.zerocopy import ZeroCopy

from .connection import connection

MIB = 1 << 20


def drain(far: socket.socket, length: int) -> bytes:
    got = bytearray()
    while len(got) < length and (data := far.recv(MIB)):
        got += data
    return bytes(got)


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_memory_arrives_and_every_call_is_answered(family: socket.AddressFamily) -> None:
    if family == socket.AF_INET6 and not has_ipv6():
        pytest.skip("this host has no ::1")
    memory = bytearray(os.urandom(9 * MIB))  # more than the socket has room for
    with connection(family) as (channel, far, _):
        sent, zero_copy = bytes(memory), ZeroCopy(channel)
        got: list[bytes] = []
        reader = threading.Thread(target=lambda: got.append(drain(far, len(memory))))
        reader.start()
        zero_copy.send_pages(memory)
        zero_copy.wait_sent()
        memory[:] = bytes(len(memory))  # nobody reads it any more
        reader.join()
        assert got == [sent]
        assert zero_copy.missed == 1  # over the loopback device everything is copied
        zero_copy.wait_sent()
        assert zero_copy.missed == 1  # there was nothing to miss


def test_a_flush_waits_for_a_reader_and_ends_with_the_quit_event() -> None:
    with connection() as (channel, far, alarm):
        far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        zero_copy = ZeroCopy(channel)
        timer = threading.Timer(0.05, alarm.set)
        timer.start()
        with pytest.raises(MigrationCancelled):
            zero_copy.send_pages(bytearray(16 * MIB))
            zero_copy.wait_sent()
        timer.join()


@pytest.mark.parametrize("how", ["reset", "shutdown"])
def test_a_connection_that_breaks_ends_the_wait(how: str) -> None:
    with connection() as (channel, far, _):
        zero_copy = ZeroCopy(channel)
        far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        end = far.close if how == "reset" else channel.shutdown
        timer = threading.Timer(0.05, end)
        timer.start()
        with pytest.raises(ChannelError, match=r"Unable to write to socket: (Broken pipe|Connection reset by peer)"):
            for _ in range(10):
                zero_copy.send_pages(bytearray(16 * MIB))
        timer.join()


def test_what_is_no_such_socket_is_refused_in_words() -> None:
    alarm = QuitEvent()
    ends = socket.socketpair()
    read_fd, write_fd = os.pipe()
    pipe = Channel("command", "cat", read_fd, write_fd, alarm.fd, can_return=False)
    for channel, kind in ((SocketChannel("unix", ends[0], alarm.fd), "socket 'unix'"), (pipe, "command 'cat'")):
        with pytest.raises(ChannelError, match=f"Zero copy send feature not detected in host kernel for {kind}"):
            ZeroCopy(channel)
        channel.close()
    ends[1].close()
    alarm.close()


WITHOUT_ROOM = """
import sys
from tests.qemumig.multifd.test_zerocopy import without_room
without_room()
"""
PR_CAPBSET_DROP, CAP_IPC_LOCK = 24, 14


def without_room() -> None:
    """In a process that may lock 64 KiB: say what becomes of 512 KiB."""
    with connection() as (channel, _, _):
        try:
            ZeroCopy(channel).send_pages(bytearray(512 * 1024))
        except ChannelError as error:
            print(error)


def test_memory_that_cannot_be_locked_is_told_as_qemu_tells_it() -> None:
    libc = ctypes.CDLL(None, use_errno=True)

    def give_up_locking() -> None:
        libc.prctl(PR_CAPBSET_DROP, CAP_IPC_LOCK, 0, 0, 0)
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))

    told = subprocess.run(
        [sys.executable, "-c", WITHOUT_ROOM], capture_output=True, text=True, check=True, preexec_fn=give_up_locking
    )
    assert told.stdout == "Process can't lock enough memory for using MSG_ZEROCOPY: No buffer space available\n"
