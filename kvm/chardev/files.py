"""Back ends that need nobody at the other end: a file, a named pipe, the terminal."""

from __future__ import annotations

import contextlib
import os
import stat
import termios

from ..keyval import UsageError
from .backend import CharBackend, close_descriptors
from .output import descriptor_sender


def open_path(path: str, flags: int) -> int:
    """Open *path*; UsageError "Could not open …" with the system's reason."""
    try:
        return os.open(path, flags | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise UsageError(f"Could not open '{path}': {os.strerror(error.errno or 0)}") from error


class FileBackend(CharBackend):
    """Output to a file, byte by byte as it comes; the file is emptied first unless *append*."""

    def __init__(self, label: str, path: str, append: bool = False) -> None:
        super().__init__(label)
        self._path = path
        self._append = append
        self._descriptor = -1

    @property
    def description(self) -> str:
        return "file"

    def open(self) -> None:
        flags = os.O_WRONLY | os.O_CREAT | (os.O_APPEND if self._append else os.O_TRUNC)
        # A FIFO is opened for reading too: opening then waits for nobody, and a reader may come and go.
        with contextlib.suppress(OSError):
            if stat.S_ISFIFO(os.stat(self._path).st_mode):
                flags = os.O_RDWR
        self._descriptor = open_path(self._path, flags)
        self.output.connect(self._descriptor, descriptor_sender(self._descriptor))

    def close(self) -> None:
        super().close()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class PipeBackend(CharBackend):
    """Two FIFOs, PATH.in and PATH.out, or one file PATH for both directions."""

    def __init__(self, label: str, path: str) -> None:
        super().__init__(label)
        self._path = path
        self._descriptors: list[int] = []

    @property
    def description(self) -> str:
        return "pipe"

    def open(self) -> None:
        try:
            self._descriptors = [open_path(f"{self._path}.in", os.O_RDWR)]
            self._descriptors.append(open_path(f"{self._path}.out", os.O_RDWR))
        except UsageError:
            close_descriptors(self._descriptors)
            self._descriptors = [open_path(self._path, os.O_RDWR)]
        self.output.connect(self._descriptors[-1], descriptor_sender(self._descriptors[-1]))

    async def start(self) -> None:
        await super().start()
        self._watch_input(self._descriptors[0])

    def close(self) -> None:
        super().close()
        close_descriptors(self._descriptors)
        self._descriptors = []


class StdioBackend(CharBackend):
    """Standard input and output; a terminal gives each key at once, unechoed, and is put right again at the end."""

    def __init__(self, label: str, signals: bool = True) -> None:
        super().__init__(label)
        self._signals = signals
        self._saved: list | None = None

    @property
    def description(self) -> str:
        return "stdio"

    def open(self) -> None:
        self.output.connect(1, descriptor_sender(1))

    async def start(self) -> None:
        self._enter_raw_mode()
        await super().start()
        self._watch_input(0)

    def close(self) -> None:
        super().close()
        if self._saved is not None:
            termios.tcsetattr(0, termios.TCSANOW, self._saved)
            self._saved = None

    def _enter_raw_mode(self) -> None:
        try:
            self._saved = termios.tcgetattr(0)
        except termios.error:  # no terminal
            return
        mode = termios.tcgetattr(0)
        mode[0] &= ~(termios.BRKINT | termios.ICRNL | termios.INLCR | termios.ISTRIP | termios.IXON)
        mode[3] &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.IEXTEN)
        if not self._signals:
            mode[3] &= ~termios.ISIG
        termios.tcsetattr(0, termios.TCSANOW, mode)
