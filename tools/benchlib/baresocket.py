"""The limit of the machine: pages with their headers from one process to another, and nothing else.

One connection carries what a RAM section has, 8 bytes before each page; several carry what multifd has, packets of one
header and 128 pages in a piece, with a thread at both ends for each of them.  The sender gathers, the receiver scatters
into a header buffer and into fresh memory that is advised for huge pages; TCP on loopback, no test for zero, no check.
A call moves half a MiB or a whole one without the GIL: what Python adds to it is some microseconds.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import resource
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection

from .process import warm_memory

PAGE = 4096
PATTERN = 1 << 20


@dataclass(frozen=True)
class Layout:
    """What one call moves: *pages* behind *headers* headers of *header* bytes, evenly."""

    pages: int
    headers: int
    header: int

    @property
    def size(self) -> int:
        """Bytes of pages."""
        return self.pages * PAGE

    def vector(self, heads: memoryview, memory: memoryview, base: int) -> list[memoryview]:
        """The pieces of the call whose pages begin at *base* of *memory*."""
        piece = self.size // self.headers
        pieces: list[memoryview] = []
        for k in range(self.headers):
            pieces.append(heads[k * self.header : (k + 1) * self.header])
            pieces.append(memory[base + k * piece : base + (k + 1) * piece])
        return pieces


SECTION = Layout(pages=256, headers=256, header=8)
PACKET = Layout(pages=128, headers=1, header=1344)


@dataclass(frozen=True)
class BareRun:
    """Times in seconds; *cpu* is that of both processes."""

    seconds: float
    cpu: float


def measure(size: int, sockets: int = 1) -> BareRun:
    """Send *size* bytes of memory, evenly over *sockets* connections at once; multiples of a call's size are sent."""
    layout = SECTION if sockets == 1 else PACKET
    size -= size % (layout.size * sockets)
    context = get_context("fork")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        _do_without_pacing(listener)
        ours, theirs = context.Pipe(duplex=False)
        there = (listener.getsockname(), layout, size, sockets, theirs)
        here = (listener, layout, size, sockets, theirs)
        jobs = [context.Process(target=_send, args=there, name="bare/send", daemon=True)]
        jobs.append(context.Process(target=_receive, args=here, name="bare/receive", daemon=True))
        for job in jobs:
            job.start()
        theirs.close()
        try:
            reports = [ours.recv() for _ in jobs]
        except EOFError:
            raise OSError(f"a process of the bare socket ended early: {[job.exitcode for job in jobs]}") from None
        finally:
            for job in jobs:
                job.join()
            ours.close()
    began = min(began for began, _, _ in reports)
    return BareRun(max(ended for _, ended, _ in reports) - began, sum(cpu for _, _, cpu in reports))


def _send(address: tuple[str, int], layout: Layout, size: int, sockets: int, report: Connection) -> None:
    with filled_memory(size) as memory:
        connections = [_connect(address) for _ in range(sockets)]
        for connection in connections:
            connection.recv(1)  # the receiver is ready
        cpu, began = cpu_of_this_process(), time.monotonic()
        _in_threads(_send_part, connections, layout, memory)
        report.send((began, time.monotonic(), cpu_of_this_process() - cpu))


def _connect(address: tuple[str, int]) -> socket.socket:
    connection = socket.socket()
    _do_without_pacing(connection)
    connection.connect(address)
    return connection


def _do_without_pacing(sock: socket.socket) -> None:
    """Where the host's control of congestion hands bytes out by a timer (bbr), the limit is what goes without."""
    with contextlib.suppress(OSError):  # it may be forbidden to choose
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")


def _send_part(connection: socket.socket, layout: Layout, part: memoryview) -> None:
    heads = memoryview(bytes(layout.headers * layout.header))
    with connection:
        for base in range(0, len(part), layout.size):
            vector = layout.vector(heads, part, base)
            sent, whole = connection.sendmsg(vector), sum(map(len, vector))
            if sent < whole:
                connection.sendall(b"".join(vector)[sent:])
        connection.recv(1)  # the receiver has everything


def _receive(listener: socket.socket, layout: Layout, size: int, sockets: int, report: Connection) -> None:
    connections = [listener.accept()[0] for _ in range(sockets)]  # the sender has filled its memory
    warm_memory(2 * size)
    with fresh_memory(size) as memory:
        for connection in connections:
            connection.send(b"\0")
        cpu = cpu_of_this_process()
        _in_threads(_receive_part, connections, layout, memory)
        report.send((math.inf, 0.0, cpu_of_this_process() - cpu))  # the sender tells when it began and ended


def _receive_part(connection: socket.socket, layout: Layout, part: memoryview) -> None:
    heads = memoryview(bytearray(layout.headers * layout.header))
    with connection:
        for base in range(0, len(part), layout.size):
            vector = layout.vector(heads, part, base)
            got, whole = connection.recvmsg_into(vector, 0, socket.MSG_WAITALL)[0], sum(map(len, vector))
            if got != whole:
                raise OSError(f"the bare receiver got {got} bytes of a call, expected {whole}")
        connection.send(b"\0")


def filled_memory(size: int) -> mmap.mmap:
    """Memory full of noise, for who sends."""
    memory = fresh_memory(size)
    pattern = os.urandom(PATTERN)
    for offset in range(0, size, PATTERN):
        memory[offset : offset + PATTERN] = pattern[: size - offset]
    return memory


def fresh_memory(size: int) -> mmap.mmap:
    """Memory that nobody has touched, for who receives."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _in_threads(
    move: Callable[[socket.socket, Layout, memoryview], None],
    connections: list[socket.socket],
    layout: Layout,
    memory: mmap.mmap,
) -> None:
    """*move* an equal part of *memory* over each of the connections, at once."""
    share = len(memory) // len(connections)
    with memoryview(memory) as whole, ThreadPoolExecutor(len(connections)) as threads:
        parts = [whole[k * share : (k + 1) * share] for k in range(len(connections))]
        for _ in threads.map(move, connections, [layout] * len(parts), parts):
            pass


def cpu_of_this_process() -> float:
    """Seconds so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
