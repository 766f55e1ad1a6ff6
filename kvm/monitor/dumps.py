"""Guest memory into files: pmemsave by physical address, memsave by a vCPU's virtual one (qmp.md §14).

Threads   one of its own writes the files one after the other, so that a slow disk or a pipe without a reader holds up
          nothing but dumps.
"""

from __future__ import annotations

import asyncio
import errno
import os
import select
import stat
import threading
from collections.abc import Iterator
from typing import Protocol

from qemumig.commands.command import INT, STR, UINT64, Argument, Command, CommandError
from qemumig.threads import workers

from ..chardev import reason

PIECE = 1 << 20  # bytes of guest memory that are copied at a time
POLL_MS = 50  # how soon a dump that waits for its reader notices that nobody wants it any more


class GuestMemoryView(Protocol):
    """What is asked of guest memory; any thread."""

    def read(self, address: int, size: int) -> bytes: ...

    def read_virtual(self, cpu: int, address: int, size: int) -> bytes | None: ...


class Dumps:
    """The commands that write guest memory, of a machine with *cpus* vCPUs, to files."""

    def __init__(self, view: GuestMemoryView, cpus: int) -> None:
        self._view = view
        self._cpus = cpus
        self._closing = threading.Event()
        self._thread = workers(1)

    def commands(self) -> list[Command]:
        """Both commands, for a registry."""
        arguments = (Argument("val", UINT64), Argument("size", UINT64), Argument("filename", STR))
        cpu = Argument("cpu-index", INT, optional=True)
        return [
            Command("pmemsave", self.pmemsave, arguments, leaves_with_client=True),
            Command("memsave", self.memsave, (*arguments, cpu), leaves_with_client=True),
        ]

    async def close(self) -> None:
        """Let the dump that runs end without its rest, and join the thread."""
        self._closing.set()
        await asyncio.to_thread(self._thread.shutdown, cancel_futures=True)

    async def pmemsave(self, val: int, size: int, filename: str) -> None:
        await self._dump(self._physical(val, size), filename)

    async def memsave(self, val: int, size: int, filename: str, cpu_index: int = 0) -> None:
        if not 0 <= cpu_index < self._cpus:
            raise CommandError("Parameter 'cpu-index' expects a CPU number")
        await self._dump(self._virtual(val, size, cpu_index), filename)

    def _physical(self, address: int, size: int) -> Iterator[bytes]:
        for done in range(0, size, PIECE):
            yield self._view.read(address + done, min(PIECE, size - done))

    def _virtual(self, address: int, size: int, cpu: int) -> Iterator[bytes]:
        for done in range(0, size, PIECE):
            piece = self._view.read_virtual(cpu, address + done, min(PIECE, size - done))
            if piece is None:
                raise CommandError(f"Invalid addr 0x{address:016x}/size {size} specified")
            yield piece

    async def _dump(self, pieces: Iterator[bytes], path: str) -> None:
        wanted = threading.Event()
        wanted.set()
        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, _Dump(path, wanted, self._closing).run, pieces)
        except asyncio.CancelledError:
            wanted.clear()
            raise


class _Dump:
    """One file being written, as long as it is *wanted* and the program is not *closing*."""

    def __init__(self, path: str, wanted: threading.Event, closing: threading.Event) -> None:
        self._path = path
        self._wanted = wanted
        self._closing = closing

    def run(self, pieces: Iterator[bytes]) -> None:
        """Write *pieces*; CommandError says why not."""
        descriptor = self._open()
        try:
            for piece in pieces:
                self._write_all(descriptor, piece)
        except OSError as error:
            raise CommandError(f"writing memory to '{self._path}' failed: {reason(error)}") from error
        finally:
            os.close(descriptor)

    def _open(self) -> int:
        """The file, created and emptied; for a FIFO this waits until somebody reads it."""
        while True:
            try:
                flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NONBLOCK | os.O_CLOEXEC
                return os.open(self._path, flags, 0o666)
            except (OSError, ValueError) as error:
                if not is_unread_fifo(self._path, error):
                    why = reason(error) if isinstance(error, OSError) else str(error)
                    raise CommandError(f"Could not open '{self._path}': {why}") from error
            self._check_wanted()
            self._closing.wait(POLL_MS / 1000)

    def _write_all(self, descriptor: int, data: bytes) -> None:
        poll = select.poll()
        poll.register(descriptor, select.POLLOUT)
        view = memoryview(data)
        while view:
            self._check_wanted()
            if poll.poll(POLL_MS):
                view = view[os.write(descriptor, view) :]

    def _check_wanted(self) -> None:
        if self._closing.is_set():
            raise CommandError(f"'{self._path}' is not complete: the program ends")
        if not self._wanted.is_set():
            raise CommandError(f"'{self._path}' is not complete: the client has gone")


def is_unread_fifo(path: str, error: Exception) -> bool:
    """True when *path* could not be opened only because it is a FIFO that nobody reads yet."""
    if not isinstance(error, OSError) or error.errno != errno.ENXIO:
        return False
    try:
        return stat.S_ISFIFO(os.stat(path).st_mode)
    except OSError:
        return False
