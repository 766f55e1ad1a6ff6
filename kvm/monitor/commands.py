"""The life of a machine: run, stop, reset, end; and its name (qmp.md §3, §14).

In    a client's requests, checked by their Commands
Out   calls of the machine; what may take long runs in a thread, one call after the other

Threads   handlers run on the loop's thread, stop, cont and reset in one of their own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Protocol
from uuid import UUID

from qemumig.commands.command import BOOL, STR, Argument, Command, CommandError, Emit, Enum, Struct
from qemumig.qapi import RunState
from qemumig.threads import workers

from .session import version
from .types import ARCHITECTURE, STATUS, VERSION

NEEDS_RESET = frozenset({RunState.SHUTDOWN, RunState.INTERNAL_ERROR, RunState.GUEST_PANICKED})
ACTIONS = {  # event in the guest → what may follow on it
    "reboot": ("reset", "shutdown"),
    "shutdown": ("poweroff", "pause"),
    "panic": ("pause", "shutdown", "exit-failure", "none"),
    "watchdog": ("reset", "shutdown", "poweroff", "pause", "debug", "none", "inject-nmi"),
}


class MonitoredMachine(Protocol):
    """What these commands ask of a machine.  *reboots*: a reset resets it, and does not end it."""

    reboots: bool

    @property
    def runstate(self) -> RunState: ...

    def stop(self, state: RunState) -> RunState: ...

    def start(self) -> None: ...

    def reset(self) -> None: ...

    def request_shutdown(self, guest: bool, reason: str) -> None: ...

    def press_power_button(self) -> bool: ...

    def wake(self) -> None: ...


class MachineCommands:
    """The commands for one machine.

    *set_autostart* is told whether the guest shall run once it has come in; *quit* ends the program;
    *end_with_guest* is told whether the end of the guest shall be the end of the program.  *suspends*: a guest of this
    machine can suspend itself.  *uses_kvm*: its guests run, and so they do with KVM.
    """

    def __init__(
        self,
        machine: MonitoredMachine,
        emit: Emit,
        *,
        set_autostart: Callable[[bool], None],
        quit: Callable[[], None],
        end_with_guest: Callable[[bool], None],
        name: str | None = None,
        uuid: bytes | None = None,
        suspends: bool = False,
        uses_kvm: bool = True,
    ) -> None:
        self._machine = machine
        self._emit = emit
        self._set_autostart = set_autostart
        self._quit = quit
        self._end_with_guest = end_with_guest
        self._name = name
        self._suspends = suspends
        self._uses_kvm = uses_kvm
        self._uuid = UUID(bytes=uuid or bytes(16))
        self._control = workers(1)

    def commands(self) -> list[Command]:
        """The commands, for a registry."""
        actions = tuple(Argument(name, Enum(words), optional=True) for name, words in ACTIONS.items())
        kvm = Struct(Argument("enabled", BOOL), Argument("present", BOOL))
        return [
            Command("query-status", self.query_status, returns=STATUS),
            Command("stop", self.stop),
            Command("cont", self.cont),
            Command("quit", self.quit),
            Command("system_reset", self.system_reset),
            Command("system_powerdown", self.system_powerdown),
            Command("system_wakeup", self.system_wakeup),
            Command("set-action", self.set_action, actions),
            Command("query-version", version, returns=VERSION),
            Command("query-name", self.query_name, returns=Struct(Argument("name", STR, optional=True))),
            Command("query-uuid", lambda: {"UUID": str(self._uuid)}, returns=Struct(Argument("UUID", STR))),
            Command("query-kvm", lambda: {"enabled": self._uses_kvm, "present": True}, returns=kvm),
            Command("query-target", lambda: {"arch": "x86_64"}, returns=Struct(Argument("arch", ARCHITECTURE))),
        ]

    async def close(self) -> None:
        """Let what runs end, and join the thread."""
        await asyncio.to_thread(self._control.shutdown)

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
        elif self._machine.runstate in (RunState.RUNNING, RunState.SUSPENDED):
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
        elif state not in (RunState.RUNNING, RunState.SUSPENDED):
            self._machine.start()

    async def system_reset(self) -> None:
        await self._in_order(self._reset)

    def _reset(self) -> None:
        if not self._machine.reboots:
            self._machine.request_shutdown(False, "host-qmp-system-reset")
            return
        self._machine.reset()
        self._emit("RESET", {"guest": False, "reason": "host-qmp-system-reset"})

    async def system_powerdown(self) -> None:
        """Press the power button; whether the guest has one, and minds it, is its own affair."""
        await self._in_order(self._power_down)

    def _power_down(self) -> None:
        self._emit("POWERDOWN")
        self._machine.press_power_button()

    async def system_wakeup(self) -> None:
        """Wake a guest that has suspended itself."""
        if not self._suspends:
            raise CommandError("wake-up from suspend is not supported by this guest")
        await self._in_order(self._machine.wake)

    def set_action(
        self,
        reboot: str | None = None,
        shutdown: str | None = None,
        panic: str | None = None,
        watchdog: str | None = None,
    ) -> None:
        """What follows on events in the guest.  There is no watchdog, and no device through which a guest can panic."""
        if reboot is not None:
            self._machine.reboots = reboot == "reset"
        if shutdown is not None:
            self._end_with_guest(shutdown == "poweroff")

    def quit(self) -> None:
        self._emit("SHUTDOWN", {"guest": False, "reason": "host-qmp-quit"})
        self._quit()

    # ---- what it is called ----

    def query_name(self) -> dict[str, Any]:
        return {} if self._name is None else {"name": self._name}
