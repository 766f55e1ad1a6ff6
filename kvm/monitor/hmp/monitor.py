"""A human monitor on a character device: prompt, line editor, one command at a time (hmp.md §1, §3).

    connected ─▶ banner, prompt ─▶ keys ─▶ LineEditor ─▶ line ─▶ execute_line ─▶ text, prompt ─▶ …

In    keys; while a command runs nothing is read, what was typed meanwhile is worked on afterwards
Out   the editor's echo, what commands print, the prompt; lines end with CR LF

A command whose client goes away runs on; what it prints is dropped.

Threads   the loop's, alone
Holds     (1) a command starts only when the client has read most of what was sent to it before
          (2) what is typed in advance is at most one read of the character device
          (3) the history outlives its client, as does the session's choice of CPU
"""

from __future__ import annotations

import asyncio

from ...chardev import CharBackend, FrontEnd, close_descriptors
from ..farewell import let_end
from ..readline import LineEditor
from ..session import EMULATED
from .shell import HumanSession, HumanShell, execute_line

PROMPT = b"(qemu) "
BANNER = "QEMU {major}.{minor}.{micro} monitor - type 'help' for more information\r\n".format(**EMULATED).encode()
WAIT_S = 1.0  # between two looks at a migration that somebody waits for
ECHO_PIECE = 1 << 16  # bytes of echo that are sent at a time: long lines are drawn anew with each key


class HumanMonitor:
    """One monitor on *backend*."""

    def __init__(self, backend: CharBackend, shell: HumanShell) -> None:
        # Set before the first client.
        self._backend = backend
        self._editor = LineEditor(PROMPT, shell.complete)
        self._session = HumanSession(shell, wait_seconds=WAIT_S, history=self._history)
        # Loop thread only.
        self._stopping = False
        self._client = 0  # counts them: who has gone must not get another's output
        self._tasks: set[asyncio.Task] = set()
        backend.attach(FrontEnd(self._received, self._connected, self._disconnected))

    def stop(self) -> None:
        """Begin no further command."""
        self._stopping = True

    async def close(self) -> None:
        """Let a running command end and what was written leave, within reason."""
        self.stop()
        await let_end(self._tasks, self._backend)

    def _history(self) -> list[str]:
        return [text_of(line) for line in self._editor.history]

    # ---- the connection ----

    def _connected(self) -> None:
        self._client += 1
        self._write(BANNER + self._editor.prompt())

    def _disconnected(self) -> None:
        self._client += 1

    def _received(self, data: bytes, descriptors: list[int]) -> None:
        close_descriptors(descriptors)
        self._backend.pause()
        task = asyncio.create_task(self._work_on(data, self._client))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _write(self, data: bytes) -> None:
        if self._backend.write(data) < len(data):  # it has not read for a long time
            self._backend.drop_client()

    # ---- keys ----

    async def _work_on(self, keys: bytes, client: int) -> None:
        """Feed *keys* to the editor, run the lines that come out, then let more be read."""
        echo = bytearray()
        for key in keys:
            if self._stopping or client != self._client:
                return
            drawn, line = self._editor.key(key)
            echo += drawn
            if line is not None or len(echo) >= ECHO_PIECE:
                await self._send(echo, client)
                echo.clear()
            if line is not None:
                await self._run(text_of(line), client)
        await self._send(echo, client)
        if client == self._client and not self._stopping:
            self._backend.resume()

    async def _run(self, line: str, client: int) -> None:
        text = await execute_line(self._session, line)
        if client != self._client:
            return
        prompt = b"" if self._stopping else self._editor.prompt()
        await self._send(text.replace("\n", "\r\n").encode(errors="surrogateescape") + prompt, client)

    async def _send(self, data: bytes | bytearray, client: int) -> None:
        """Send *data* to the client that typed, and wait until it has read most of it."""
        if client == self._client and data:
            self._write(bytes(data))
            await self._backend.output.drain()


def text_of(line: bytes) -> str:
    """A line as commands want it; what is no UTF-8 finds its way back out as it came."""
    return line.decode(errors="surrogateescape")
