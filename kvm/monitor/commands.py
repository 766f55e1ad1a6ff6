"""The commands any machine offers, whether it migrates or not (qmp.md §3, §14).

In    a client's requests, checked by their Commands
Out   calls of the machine; what may take long (stopping, reset, dumps) runs in a thread of its own kind, in order

Threads   handlers run on the loop's thread.  `vm` does stop, cont and reset one after the other; `vm-dump` writes
          memory to files, so that a slow disk or a pipe without a reader holds up neither.
"""

from __future__ import annotations

import asyncio
import errno
import os
import select
import stat
import threading
from collections.abc import Callable
from typing import Any, Protocol
from uuid import UUID

from qemumig.commands.command import STR, UINT64, Argument, Command, CommandError, Emit
from qemumig.qapi import RunState
from qemumig.threads import workers

from ..chardev import reason
from .qmp import version

DUMP_PIECE = 1 << 20  # bytes of guest memory that are copied at a time
POLL_MS = 50  # how soon a dump that waits for its reader notices the end of the program
NEEDS_RESET = frozenset({RunState.SHUTDOWN, RunState.INTERNAL_ERROR, RunState.GUEST_PANICKED})


class MonitoredMachine(Protocol):
    """What these commands ask of a machine."""

    @property
    def runstate(self) -> RunState: ...

    def stop(self, state: RunState) -> None: ...

    def start(self) -> None: ...

    def reset(self) -> None: ...

    def read_physical(self, address: int, size: int) -> bytes: ...

    def vcpu_thread_ids(self) -> list[int]: ...


class MachineCommands:
    """The general commands for one machine.

    *set_autostart* is told whether the guest shall run once it has come in; *quit* ends the program.
    """

    def __init__(
        self,
        machine: MonitoredMachine,
        emit: Emit,
        *,
        set_autostart: Callable[[bool], None],
        quit: Callable[[], None],
        name: str | None = None,
        uuid: bytes | None = None,
    ) -> None:
        self._machine = machine
        self._emit = emit
        self._set_autostart = set_autostart
        self._quit = quit
        self._name = name
        self._uuid = UUID(bytes=uuid or bytes(16))
        self._closing = threading.Event()
        self._control = workers(1)
        self._dumps = workers(1)

    def commands(self) -> list[Command]:
        """The commands, for a registry."""
        dump_arguments = (Argument("val", UINT64), Argument("size", UINT64), Argument("filename", STR))
        return [
            Command("query-status", self.query_status),
            Command("stop", self.stop),
            Command("cont", self.cont),
            Command("quit", self.quit),
            Command("system_reset", self.system_reset),
            Command("query-version", version),
            Command("query-name", lambda: {} if self._name is None else {"name": self._name}),
            Command("query-uuid", lambda: {"UUID": str(self._uuid)}),
            Command("query-kvm", lambda: {"enabled": True, "present": True}),
            Command("query-target", lambda: {"arch": "x86_64"}),
            Command("query-cpus-fast", self.query_cpus_fast),
            Command("pmemsave", self.pmemsave, dump_arguments),
        ]

    async def close(self) -> None:
        """Let what runs end, a dump without its rest, and join the threads."""
        self._closing.set()
        await asyncio.to_thread(self._control.shutdown)
        await asyncio.to_thread(self._dumps.shutdown, cancel_futures=True)

    async def _in_order(self, function: Callable[..., None], *arguments: Any) -> None:
        await asyncio.get_running_loop().run_in_executor(self._control, function, *arguments)

    # ---- run state ----

    def query_status(self) -> dict[str, Any]:
        state = self._machine.runstate
        return {"status": state.value, "running": state is RunState.RUNNING}

    async def stop(self) -> None:
        await self._in_order(self._stop)

    def _stop(self) -> None:
        if self._machine.runstate is RunState.INMIGRATE:
            self._set_autostart(False)
        elif self._machine.runstate is RunState.RUNNING:
            self._machine.stop(RunState.PAUSED)

    async def cont(self) -> None:
        await self._in_order(self._cont)

    def _cont(self) -> None:
        state = self._machine.runstate
        if state is RunState.FINISH_MIGRATE:
            raise CommandError("Migration is not finalized yet")
        if state in NEEDS_RESET:
            raise CommandError("Resetting the Virtual Machine is required")
        if state is RunState.INMIGRATE:
            self._set_autostart(True)
        elif state is not RunState.RUNNING:
            self._machine.start()

    async def system_reset(self) -> None:
        await self._in_order(self._machine.reset)
        self._emit("RESET", {"guest": False, "reason": "host-qmp-system-reset"})

    def quit(self) -> None:
        self._emit("SHUTDOWN", {"guest": False, "reason": "host-qmp-quit"})
        self._quit()

    # ---- the machine's parts ----

    def query_cpus_fast(self) -> list[dict[str, Any]]:
        return [
            {
                "cpu-index": index,
                "thread-id": thread_id,
                "qom-path": f"/machine/unattached/device[{index}]",
                "props": {"socket-id": 0, "core-id": index, "thread-id": 0},
                "target": "x86_64",
            }
            for index, thread_id in enumerate(self._machine.vcpu_thread_ids())
        ]

    async def pmemsave(self, val: int, size: int, filename: str) -> None:
        await asyncio.get_running_loop().run_in_executor(self._dumps, self._dump, val, size, filename)

    def _dump(self, address: int, size: int, path: str) -> None:
        descriptor = self._open_for_dump(path)
        try:
            end = address + size
            while address < end:
                piece = self._machine.read_physical(address, min(DUMP_PIECE, end - address))
                self._write_all(descriptor, piece)
                address += len(piece)
        except OSError as error:
            raise CommandError(f"writing memory to '{path}' failed: {reason(error)}") from error
        finally:
            os.close(descriptor)

    def _open_for_dump(self, path: str) -> int:
        """*path* created and emptied; for a FIFO this waits until somebody reads it."""
        while True:
            try:
                flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NONBLOCK | os.O_CLOEXEC
                return os.open(path, flags, 0o666)
            except (OSError, ValueError) as error:
                if not is_unread_fifo(path, error):
                    why = reason(error) if isinstance(error, OSError) else str(error)
                    raise CommandError(f"Could not open '{path}': {why}") from error
            if self._closing.wait(POLL_MS / 1000):
                raise CommandError(f"Could not open '{path}': the program ends")

    def _write_all(self, descriptor: int, data: bytes) -> None:
        poll = select.poll()
        poll.register(descriptor, select.POLLOUT)
        view = memoryview(data)
        while view:
            if self._closing.is_set():
                raise CommandError("the program ends before the dump is complete")
            if poll.poll(POLL_MS):
                view = view[os.write(descriptor, view) :]


def is_unread_fifo(path: str, error: Exception) -> bool:
    """True when *path* could not be opened only because it is a FIFO that nobody reads yet."""
    if not isinstance(error, OSError) or error.errno != errno.ENXIO:
        return False
    try:
        return stat.S_ISFIFO(os.stat(path).st_mode)
    except OSError:
        return False
