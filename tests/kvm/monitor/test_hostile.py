"""A hostile client of one monitor, seen from another: it costs nothing but its own connection.

A guest runs meanwhile.  After each attack the other monitor answers, the guest prints on, the attacked monitor takes an
ordinary client, and the process holds no more descriptors or memory than before.
"""

from __future__ import annotations

import contextlib
import json
import random
import select
import socket
import struct
from pathlib import Path

import pytest

from tests.kvm.program import PATIENCE_S, system
from tests.support.vmm import open_files, wait_until

pytestmark = pytest.mark.needs("kvm")

MIB = 1 << 20
MEMORY_ALLOWED = 48 * MIB  # what one attack may leave behind in the allocator
SEED = 20
NEGOTIATE = b'{"execute": "qmp_capabilities"}'


def attack(path: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", PATIENCE_S, 0))
    connection.connect(path)  # blocking: a full backlog is waited for, not refused
    connection.settimeout(PATIENCE_S)
    return connection


def send_without_reading(path: str, data: bytes, repeat: int = 1) -> None:
    """Send as much as is taken, read nothing, leave."""
    with attack(path) as connection:
        connection.setblocking(False)
        with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
            for _ in range(repeat):
                connection.sendall(data)


def send_and_read(path: str, data: bytes) -> None:
    """Send all of it, reading whatever comes back."""
    with attack(path) as connection:
        connection.setblocking(False)
        rest = memoryview(data)
        while rest:
            readable, writable, _ = select.select([connection], [connection], [], PATIENCE_S)
            assert readable or writable, "the monitor neither reads nor writes"
            if readable and not connection.recv(MIB):
                return
            if writable:
                with contextlib.suppress(BlockingIOError):
                    rest = rest[connection.send(rest) :]


def garbage(path: str) -> None:
    send_and_read(path, NEGOTIATE + random.Random(SEED).randbytes(MIB // 4))


def deep_nesting(path: str) -> None:
    send_and_read(path, NEGOTIATE + b'{"execute": "query-name", "id": ' + b"[" * (MIB // 4))


def an_endless_string(path: str) -> None:
    send_and_read(path, NEGOTIATE + b'{"execute": "' + b"x" * (24 * MIB))


def an_endless_number(path: str) -> None:
    send_and_read(path, NEGOTIATE + b'{"id": ' + b"9" * (4 * MIB))


def endless_members(path: str) -> None:
    send_and_read(path, NEGOTIATE + b'{"execute": "stop", "arguments": {' + b'"a": 1, ' * 100000)


def half_messages(path: str) -> None:
    for length in range(1, len(NEGOTIATE)):
        send_without_reading(path, NEGOTIATE[:length])


def a_thousand_connections(path: str) -> None:
    """One after the other, each leaving at once; then as many at a time as the system lets stand in line."""
    for number in range(1000):
        send_without_reading(path, b"}" if number % 2 else NEGOTIATE)
    crowd = []
    with contextlib.suppress(BlockingIOError):
        for _ in range(1000):
            crowd.append(socket.socket(socket.AF_UNIX))
            crowd[-1].setblocking(False)
            crowd[-1].connect(path)
    for connection in crowd:
        connection.close()


def a_reader_that_never_reads(path: str) -> None:
    """Ask for the longest answer there is, again and again."""
    send_without_reading(path, NEGOTIATE + b'{"execute": "query-qmp-schema"}' * 1000, repeat=20)


def unread_answers_out_of_band(path: str) -> None:
    enable = b'{"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}}'
    send_without_reading(path, enable + b'{"exec-oob": "query-yank"}' * 5000, repeat=20)


def descriptors_without_end(path: str) -> None:
    """Sixteen with each message, which nobody asked for."""
    with attack(path) as connection, open("/dev/null") as null:
        connection.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            for _ in range(200):
                socket.send_fds(connection, [b'{"execute": "query-name"}'], [null.fileno()] * 16)


ATTACKS = (
    garbage,
    deep_nesting,
    an_endless_string,
    an_endless_number,
    endless_members,
    half_messages,
    a_thousand_connections,
    a_reader_that_never_reads,
    unread_answers_out_of_band,
    descriptors_without_end,
)


def resident(pid: int) -> int:
    """Bytes of memory that the process has."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


def served(path: str) -> bool:
    """An ordinary client is greeted and answered."""
    with attack(path) as connection, connection.makefile("rb") as lines:
        connection.sendall(NEGOTIATE + b'{"execute": "query-status", "id": 1}')
        answers = [json.loads(lines.readline()) for _ in range(3)]
    return "QMP" in answers[0] and answers[2] == {"return": {"status": "running", "running": True}, "id": 1}


@pytest.mark.parametrize("assault", ATTACKS, ids=lambda assault: assault.__name__.replace("_", " "))
def test_an_attack_costs_nothing_but_its_own_connection(directory, assault):
    path = f"{directory}/attacked"
    with system(directory, "vm", "-qmp", f"unix:{path},server=on,wait=off") as vm:
        pid = vm.process.pid
        files = len(open_files(pid))
        assert served(path)
        memory = resident(pid)
        printed = len(vm.printed())

        assault(path)

        assert vm.result("query-status") == {"status": "running", "running": True}
        assert served(path)
        vm.until_printed(printed + 2)
        wait_until(lambda: len(open_files(pid)) == files, "descriptors were left behind", PATIENCE_S)
        assert resident(pid) - memory < MEMORY_ALLOWED
        vm.result("quit")
        assert vm.end() == (0, "")
