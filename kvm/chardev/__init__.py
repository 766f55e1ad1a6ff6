"""Character devices: where the bytes of a serial port or a monitor come from and go to (cli.md §5).

In    bytes of a device (any thread) or of a monitor (loop thread), through `write`
Out   bytes and descriptors from outside, handed to the attached front end on the loop thread

                     write ─▶ Output ─▶ descriptor            file, stdio, pipe, connected socket
      received(data, fds)  ◀─ loop    ◀─ descriptor

Life      made (nothing happens) → `open` (files made, sockets listen; UsageError) → `start` (the loop watches; a
          socket with wait=on comes back once it has a client) → `close` (our socket files are removed)
Threads   `write` may be called from any thread and does not wait for a reader: what a full pipe or socket does not
          take is kept and sent later by the loop, until `OUTPUT_LIMIT` bytes wait.  All else belongs to the loop thread.
Holds     (1) bytes leave in the order of the calls to `write`, each once
          (2) one client at a time; the next is greeted when the first has gone
          (3) without a client output is dropped, as QEMU does
"""

from .backend import CharBackend, FrontEnd, close_descriptors, reason
from .files import FileBackend, PipeBackend, StdioBackend
from .output import LOW_WATER
from .sockets import DescriptorBackend, SocketBackend, TcpBackend, UnixBackend

__all__ = [
    "LOW_WATER",
    "CharBackend",
    "DescriptorBackend",
    "FileBackend",
    "FrontEnd",
    "PipeBackend",
    "SocketBackend",
    "StdioBackend",
    "TcpBackend",
    "UnixBackend",
    "close_descriptors",
    "reason",
]
