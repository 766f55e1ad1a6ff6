"""What all back ends have: output, a front end that is attached, one client's input on the loop."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .output import Output

READ_SIZE = 1 << 16


def _ignore(*_arguments: object) -> None:
    """The front end nobody attached."""


def close_descriptors(descriptors: Sequence[int]) -> None:
    """Close descriptors that came with a message and that nobody wants."""
    for descriptor in descriptors:
        os.close(descriptor)


@dataclass
class FrontEnd:
    """Who uses a back end; everything is called on the loop thread."""

    received: Callable[[bytes, list[int]], None] = _ignore  # owns the descriptors from then on
    connected: Callable[[], None] = _ignore
    disconnected: Callable[[], None] = _ignore
    lets_go: bool = True  # a client that has closed its end while input is paused may give way to the next one


class CharBackend:
    """A back end that swallows output and has no input (`null`); the others build on it."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.option = ""  # the words on the command line, for messages
        self.in_use = False  # a device or a monitor is attached
        self.report: Callable[[str], None] = _ignore  # says a line to the user
        self.front_end = FrontEnd()
        self.output = Output(self.drop_client)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._input = -1  # the descriptor the loop reads from
        self._paused = False

    @property
    def description(self) -> str:
        """How query-chardev calls it."""
        return "null"

    def attach(self, front_end: FrontEnd) -> None:
        """*front_end* gets the input from now on; before `start`."""
        self.front_end = front_end
        self.in_use = True

    def set_receiver(self, receive: Callable[[bytes], None]) -> None:
        """Attach a front end that only wants bytes; it may `pause`."""

        def received(data: bytes, descriptors: list[int]) -> None:
            close_descriptors(descriptors)
            receive(data)

        self.attach(FrontEnd(received, lets_go=False))

    def open(self) -> None:
        """Make files, listen or connect; UsageError says what failed."""

    async def start(self) -> None:
        """Let the running loop watch this back end."""
        self._loop = asyncio.get_running_loop()
        self.output.start(self._loop)
        self.front_end.connected()

    def write(self, data: bytes) -> int:
        """Send *data*; the number of bytes taken (all of them when nobody listens).  Any thread."""
        return self.output.write(data)

    def pause(self) -> None:
        """Take no more input until `resume`."""
        self._paused = True
        self._unwatch_input()

    def resume(self) -> None:
        """Take input again."""
        self._paused = False
        self._watch_input(self._input)

    def drop_client(self) -> None:
        """Close the connection, if this is one; a server then waits for the next."""

    def close(self) -> None:
        """Give everything back; nothing is sent or received afterwards."""
        self._unwatch_input()
        self._input = -1
        self.output.disconnect()

    def _watch_input(self, descriptor: int) -> None:
        self._input = descriptor
        if self._loop is None or self._paused or descriptor < 0:
            return
        try:
            self._loop.add_reader(descriptor, self._on_readable)
        except PermissionError:  # a regular file: epoll does not take it, it is always readable
            self._loop.call_soon(self._read_file)

    def _unwatch_input(self) -> None:
        if self._loop is not None and self._input >= 0:
            self._loop.remove_reader(self._input)

    def _read_file(self) -> None:
        if self._input >= 0 and not self._paused:
            descriptor = self._input
            self._on_readable()
            if self._input == descriptor and self._loop is not None:
                self._loop.call_soon(self._read_file)

    def _on_readable(self) -> None:
        try:
            data = os.read(self._input, READ_SIZE)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if data:
            self.front_end.received(data, [])
        else:
            self._end_of_input()

    def _end_of_input(self) -> None:
        self._unwatch_input()
        self._input = -1
        self.front_end.disconnected()


def reason(error: OSError) -> str:
    """The system's words for *error*."""
    return os.strerror(error.errno) if error.errno else str(error)
