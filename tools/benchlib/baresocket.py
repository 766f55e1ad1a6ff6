"""The limit of the machine: pages with 8-byte headers from one process to another, and nothing else.

The sender gathers headers and pages out of memory of guest size, the receiver scatters them into a header buffer
and into fresh memory that is advised for huge pages; one TCP connection on loopback, no test for zero, no check.
"""

from __future__ import annotations

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


def measure(size: int) -> BareRun:
    """Send *size* bytes of memory; a multiple of a batch is sent."""
    size -= size % (BATCH * PAGE)
    context = get_context("fork")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours, theirs = context.Pipe(duplex=False)
        jobs = [
            context.Process(target=_receive, args=(listener, size, theirs), name="bare/receive", daemon=True),
            context.Process(target=_send, args=(listener.getsockname(), size, theirs), name="bare/send", daemon=True),
        ]
        for job in jobs:
            job.start()
        theirs.close()
        try:
            reports = dict(ours.recv() for _ in jobs)
        except EOFError:
            raise OSError(f"a process of the bare socket ended early: {[job.exitcode for job in jobs]}") from None
        finally:
            for job in jobs:
                job.join()
            ours.close()
    return BareRun(reports["send"][0], reports["send"][1] + reports["receive"][1])


def _send(address: tuple[str, int], size: int, report: Connection) -> None:
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
        cpu, began = _cpu(), time.monotonic()
        for base in range(0, size, BATCH * PAGE):
            offsets = range(base, base + BATCH * PAGE, PAGE)
            HEADER.pack_into(headers, 0, *(offset | 0x28 for offset in offsets))
            vector[1::2] = [pages[offset : offset + PAGE] for offset in offsets]
            sent = connection.sendmsg(vector)
            if sent < BATCH * (PAGE + 8):
                connection.sendall(b"".join(vector)[sent:])
        connection.recv(1)  # the receiver has everything
        report.send(("send", (time.monotonic() - began, _cpu() - cpu)))


def _receive(listener: socket.socket, size: int, report: Connection) -> None:
    connection, _ = listener.accept()  # the sender has filled its memory
    warm_memory(2 * size)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    pages, headers = memoryview(memory), bytearray(HEADER.size)
    vector: list[memoryview] = [memoryview(headers)[i // 2 * 8 : i // 2 * 8 + 8] for i in range(2 * BATCH)]
    with connection:
        connection.send(b"\0")
        cpu = _cpu()
        for base in range(0, size, BATCH * PAGE):
            vector[1::2] = [pages[offset : offset + PAGE] for offset in range(base, base + BATCH * PAGE, PAGE)]
            got = connection.recvmsg_into(vector, 0, socket.MSG_WAITALL)[0]
            if got != BATCH * (PAGE + 8):
                raise OSError(f"the bare receiver got {got} bytes of a batch, expected {BATCH * (PAGE + 8)}")
        connection.send(b"\0")
        report.send(("receive", (0.0, _cpu() - cpu)))


def _cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
