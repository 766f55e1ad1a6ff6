"""The limit of the machine: pages with 8-byte headers from one process to another, and nothing else.

The sender gathers headers and pages out of memory of guest size, the receiver scatters them into a header buffer
and into fresh memory that is advised for huge pages; TCP on loopback, no test for zero, no check.  Several connections
have a process at each end, and equal parts of the memory.
"""

from __future__ import annotations

import math
import mmap
import os
import resource
import socket
import struct
import time
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection

from .process import warm_memory

PAGE = 4096
BATCH = 256  # pages per call
HEADER = struct.Struct(f">{BATCH}Q")
PATTERN = 1 << 20


@dataclass(frozen=True)
class BareRun:
    """Times in seconds; *cpu* is that of both processes."""

    seconds: float
    cpu: float


def measure(size: int, sockets: int = 1) -> BareRun:
    """Send *size* bytes of memory, evenly over *sockets* connections at once; multiples of a batch are sent."""
    size //= sockets
    size -= size % (BATCH * PAGE)
    context = get_context("fork")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours, theirs = context.Pipe(duplex=False)
        gate, opener = os.pipe()
        jobs = []
        for _ in range(sockets):
            there, here = (listener.getsockname(), size, theirs, gate), (listener, size, theirs)
            jobs.append(context.Process(target=_receive, args=here, name="bare/receive", daemon=True))
            jobs.append(context.Process(target=_send, args=there, name="bare/send", daemon=True))
        for job in jobs:
            job.start()
        theirs.close()
        try:
            for _ in range(sockets):
                ours.recv()  # a sender is ready
            os.write(opener, bytes(sockets))
            reports = [ours.recv() for _ in jobs]
        except EOFError:
            raise OSError(f"a process of the bare socket ended early: {[job.exitcode for job in jobs]}") from None
        finally:
            for job in jobs:
                job.join()
            ours.close()
            os.close(gate)
            os.close(opener)
    began = min(began for began, _, _ in reports)
    return BareRun(max(ended for _, ended, _ in reports) - began, sum(cpu for _, _, cpu in reports))


def _send(address: tuple[str, int], size: int, report: Connection, gate: int) -> None:
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    pattern = os.urandom(PATTERN)
    for offset in range(0, size, PATTERN):
        end = min(offset + PATTERN, size)
        memory[offset:end] = pattern[: end - offset]
    pages, headers = memoryview(memory), bytearray(HEADER.size)
    vector: list[memoryview] = [memoryview(headers)[i // 2 * 8 : i // 2 * 8 + 8] for i in range(2 * BATCH)]
    with socket.create_connection(address) as connection:
        connection.recv(1)  # the receiver is ready
        report.send(None)
        os.read(gate, 1)  # all senders are ready
        cpu, began = _cpu(), time.monotonic()
        for base in range(0, size, BATCH * PAGE):
            offsets = range(base, base + BATCH * PAGE, PAGE)
            HEADER.pack_into(headers, 0, *(offset | 0x28 for offset in offsets))
            vector[1::2] = [pages[offset : offset + PAGE] for offset in offsets]
            sent = connection.sendmsg(vector)
            if sent < BATCH * (PAGE + 8):
                connection.sendall(b"".join(vector)[sent:])
        connection.recv(1)  # the receiver has everything
        report.send((began, time.monotonic(), _cpu() - cpu))


def _receive(listener: socket.socket, size: int, report: Connection) -> None:
    connection, _ = listener.accept()  # the sender has filled its memory
    warm_memory(2 * size)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    pages, headers = memoryview(memory), bytearray(HEADER.size)
    vector: list[memoryview] = [memoryview(headers)[i // 2 * 8 : i // 2 * 8 + 8] for i in range(2 * BATCH)]
    with connection:
        connection.send(b"\0")
        cpu, began = _cpu(), math.inf  # the senders tell when it began
        for base in range(0, size, BATCH * PAGE):
            vector[1::2] = [pages[offset : offset + PAGE] for offset in range(base, base + BATCH * PAGE, PAGE)]
            got = connection.recvmsg_into(vector, 0, socket.MSG_WAITALL)[0]
            if got != BATCH * (PAGE + 8):
                raise OSError(f"the bare receiver got {got} bytes of a batch, expected {BATCH * (PAGE + 8)}")
        connection.send(b"\0")
        report.send((began, 0.0, _cpu() - cpu))


def _cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
