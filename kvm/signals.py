"""The signals that end the program, read like input: the loop learns who sent them (cli.md §7).

The signals are blocked in every thread, so they interrupt nothing; the descriptor that `signalfd` gives becomes
readable instead.  A child process inherits the blocked mask: whoever starts one may unblock them in its own thread
meanwhile.  A signal in just that moment ends the program as well, only without the sender's name.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import struct
from collections.abc import Callable

ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
RECORD_SIZE = 128  # of struct signalfd_siginfo
RECORD_START = struct.Struct("=IiiI")  # ssi_signo, ssi_errno, ssi_code, ssi_pid
SET_WORDS = 1024 // 64  # of sigset_t

_libc = ctypes.CDLL(None, use_errno=True)


class SignalWatcher:
    """Calls *ended* with the number of the signal and the sender's process id (0: the kernel)."""

    def __init__(self, ended: Callable[[int, int], None]) -> None:
        self._ended = ended
        self._previous = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
        self._descriptor = _signalfd(ENDING)

    def start(self) -> None:
        """Watch on the running loop."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self._descriptor, self._on_readable)
        for number in ENDING:
            loop.add_signal_handler(number, self._ended, number, 0)

    def close(self) -> None:
        """Watch no more; a further signal acts as if none of this had been."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._descriptor)
        for number in ENDING:
            loop.remove_signal_handler(number)
        os.close(self._descriptor)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._previous)

    def _on_readable(self) -> None:
        try:
            record = os.read(self._descriptor, RECORD_SIZE)
        except BlockingIOError:
            return
        number, _, _, sender = RECORD_START.unpack_from(record)
        self._ended(number, sender)


def _signalfd(signals: tuple[signal.Signals, ...]) -> int:
    mask = (ctypes.c_uint64 * SET_WORDS)()
    for number in signals:
        mask[0] |= 1 << (number - 1)
    descriptor = _libc.signalfd(-1, ctypes.byref(mask), os.O_NONBLOCK | os.O_CLOEXEC)
    if descriptor < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"signalfd: {os.strerror(error)}")
    return descriptor


def describe(number: int, sender: int) -> str:
    """The sentence about a signal that ends the program."""
    text = f"terminating on signal {number}"
    if not sender:
        return text
    try:
        with open(f"/proc/{sender}/cmdline", "rb") as file:
            name = os.fsdecode(file.read().partition(b"\0")[0])
    except OSError:
        name = "<unknown process>"
    return f"{text} from pid {sender} ({name or '<unknown process>'})"
