"""The qtest protocol: a test harness reads and writes the machine from outside, guest running or not (qtest.md §2).

    client ─▶ lines ─▶ `qtest` thread ─▶ machine: physical memory, devices, ports
    client ◀─ OK … · FAIL … · ERR …
    client ◀─ IRQ raise N · IRQ lower N     from whatever thread moves an intercepted line

In    words separated by single blanks, a line feed behind each request; numbers as C writes them
Out   one line a request, in order.  A request that cannot be understood gets a FAIL with a sentence.

Requests may be sent without waiting for answers.  While answers are not read, no further request is begun.

Threads   `qtest` does the requests, one after the other: an access may have to wait, for a device or for a page that is
          still with a migration's source.  It starts with the first client; `close` ends and joins it.
Holds     (1) an answer never reaches another client than the one that asked
          (2) memory of an unfinished request stays below MAX_LINE bytes
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import queue
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, Future
from typing import IO, Protocol

from qemumig.threads import named_thread

from ..chardev import LOW_WATER, CharBackend, FrontEnd, close_descriptors
from .c_number import DIGITS, LIMIT, magnitude

MAX_SIZE = 16 << 20  # bytes of one read or write
MAX_LINE = 2 * MAX_SIZE + 4096
MAX_MEMSET = 1 << 30
MEMSET_PIECE = 1 << 20
MAX_WAITING = 1 << 20  # bytes of requests that wait for the thread; then nothing is read
PORT_MASK = 0xFFFF
UNNAMED_INPUTS = "unnamed-gpio-in"

_WIDTHS = {"b": 1, "w": 2, "l": 4, "q": 8}  # bytes


class RequestError(Exception):
    """A request cannot be done; the text is the whole answer."""


class HarnessedMachine(Protocol):
    """What a harness gets hold of; addresses are guest-physical, any thread."""

    def read(self, address: int, size: int) -> bytes: ...

    def write(self, address: int, data: bytes) -> None: ...

    def read_port(self, port: int, size: int) -> int: ...

    def write_port(self, port: int, size: int, value: int) -> None: ...


class HarnessedTime(Protocol):
    """Virtual time that nobody else moves; nanoseconds."""

    def now(self) -> int: ...

    def next(self) -> int | None:
        """When something is to happen next; None for never."""

    def step(self, until: int) -> bool:
        """Move on to *until*; False when that is no later time."""


class InputPins(Protocol):
    """The input pins of an interrupt controller."""

    @property
    def count(self) -> int: ...

    def set_level(self, pin: int, level: int) -> None:
        """Drive *pin*, as a device would."""

    def observe(self, observer: Callable[[int, int], None] | None) -> None:
        """Tell *observer*, alone, of every change: pin and level; called in the thread that makes it."""


class QtestLog:
    """What goes over the connection, line by line, with seconds since it was opened."""

    def __init__(self, output: IO[str]) -> None:
        self._output = output
        self._opened = 0.0

    def opened(self) -> None:
        self._opened = time.monotonic()
        self._say("[I 0.000000] OPENED")

    def closed(self) -> None:
        self._say(f"[I +{self._elapsed:.6f}] CLOSED")

    def received(self, line: str) -> None:
        self._say(f"[R +{self._elapsed:.6f}] {line}")

    def sent(self, line: str) -> None:
        self._say(f"[S +{self._elapsed:.6f}] {line}")

    @property
    def _elapsed(self) -> float:
        return time.monotonic() - self._opened

    def _say(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # a log that cannot be written is no reason to fail
            self._output.write(f"{text}\n")
            self._output.flush()

    def close(self) -> None:
        """Close the file, if it is one of ours."""
        if self._output is not sys.stderr:
            with contextlib.suppress(OSError):
                self._output.close()


def open_log(path: str | None) -> QtestLog | None:
    """The log that `-qtest-log` asks for: None is standard error, "none" no log; neither is one that cannot be opened."""
    if path is None:
        return QtestLog(sys.stderr)
    if path == "none":
        return None
    try:
        return QtestLog(open(path, "w", errors="backslashreplace"))  # QtestLog closes it
    except (OSError, ValueError):
        return None


class QtestServer:
    """The protocol on *backend*; *pins* are the interrupt controllers, by the last part of their QOM path.

    *time* is there with accelerator `qtest` alone.
    """

    def __init__(
        self,
        backend: CharBackend,
        machine: HarnessedMachine,
        pins: Mapping[str, InputPins],
        log: QtestLog | None = None,
        time: HarnessedTime | None = None,
    ) -> None:
        # Set before the first client.
        self._backend = backend
        self._log = log
        self._requests = Requests(machine, pins, self._report_level, time)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._inbox: queue.SimpleQueue[tuple[int, bytes] | None] = queue.SimpleQueue()
        self._thread = named_thread("qtest", self._work)
        # Under lock.
        self._lock = threading.Lock()
        self._client = 0  # counts them; even: there is none
        self._waiting = 0  # bytes in the inbox
        self._paused = False
        self._drain: Future[None] | None = None
        self._closing = False
        backend.attach(FrontEnd(self._received, self._connected, self._disconnected))

    async def close(self) -> None:
        """End the thread, when it is through with its request."""
        with self._lock:
            self._closing = True
            if self._drain is not None:
                self._drain.cancel()
        if self._thread.ident is not None:
            self._inbox.put(None)
            await asyncio.to_thread(self._thread.join)
        self._requests.reset()
        if self._log is not None:
            self._log.close()

    # ---- the loop's thread ----

    def _connected(self) -> None:
        self._change_client()
        if self._log is not None:
            self._log.opened()
        if self._thread.ident is None and not self._closing:
            self._loop = asyncio.get_running_loop()
            self._thread.start()

    def _disconnected(self) -> None:
        self._change_client()
        if self._log is not None:
            self._log.closed()

    def _change_client(self) -> None:
        with self._lock:
            self._client += 1
            self._paused = False
        self._inbox.put((self._client, b""))

    def _received(self, data: bytes, descriptors: list[int]) -> None:
        close_descriptors(descriptors)
        with self._lock:
            self._waiting += len(data)
            self._paused = self._waiting > MAX_WAITING
            if self._paused:
                self._backend.pause()
        self._inbox.put((self._client, data))

    def _resume(self) -> None:
        with self._lock:
            if self._paused and self._waiting <= MAX_WAITING:
                self._paused = False
                self._backend.resume()

    def _drop(self, client: int) -> None:
        if client == self._client:
            self._backend.drop_client()

    # ---- `qtest` ----

    def _work(self) -> None:
        client, lines = 0, LineBuffer()
        while (item := self._inbox.get()) is not None:
            if item[0] != client:
                client, lines = item[0], LineBuffer()
                self._requests.reset()
            for line in lines.feed(item[1]):
                if self._is_over(client):
                    break
                self._answer(line, client)
            if lines.too_long:
                self._call_in_loop(self._drop, client)
            self._took(len(item[1]))

    def _is_over(self, client: int) -> bool:
        return self._closing or client != self._client

    def _took(self, size: int) -> None:
        with self._lock:
            self._waiting -= size
            resume = self._paused and self._waiting <= MAX_WAITING
        if resume:
            self._call_in_loop(self._resume)

    def _answer(self, line: bytes, client: int) -> None:
        request = line.decode(errors="backslashreplace")
        if self._log is not None:
            self._log.received(request)
        answer = self._requests.answer(request)
        if answer:
            self._send(answer, client)
            self._wait_for_reader()

    def _send(self, line: str, client: int) -> None:
        """Send *line* to that client, if it is still there."""
        with self._lock:
            if client != self._client:
                return
            if self._log is not None:
                self._log.sent(line)
            data = f"{line}\n".encode()
            if self._backend.write(data) < len(data):  # interrupts that it has not read for a long time
                self._call_in_loop(self._drop, client)

    def _wait_for_reader(self) -> None:
        if self._backend.output.pending <= LOW_WATER or self._loop is None:
            return
        with self._lock:
            if self._closing:
                return
            self._drain = asyncio.run_coroutine_threadsafe(self._backend.output.drain(), self._loop)
        with contextlib.suppress(CancelledError):
            self._drain.result()

    def _call_in_loop(self, function: Callable[..., None], *arguments: int) -> None:
        if self._loop is not None and not self._closing:
            self._loop.call_soon_threadsafe(function, *arguments)

    # ---- whatever thread moves an interrupt line ----

    def _report_level(self, pin: int, level: int) -> None:
        self._send(f"IRQ {'raise' if level else 'lower'} {pin}", self._client)


class LineBuffer:
    """Cuts a stream of bytes into lines."""

    def __init__(self) -> None:
        self.too_long = False
        self._rest = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The lines that *data* completes, without their ends; none any more once one was too long."""
        if self.too_long:
            return []
        *lines, rest = data.split(b"\n")
        if lines:
            lines[0] = bytes(self._rest + lines[0])
            self._rest.clear()
        self._rest += rest
        if len(self._rest) > MAX_LINE:
            self.too_long = True
            self._rest.clear()
        return lines


class Requests:
    """What each request does; *report* is told of intercepted lines: pin and level."""

    def __init__(
        self,
        machine: HarnessedMachine,
        pins: Mapping[str, InputPins],
        report: Callable[[int, int], None],
        time: HarnessedTime | None = None,
    ) -> None:
        self._machine = machine
        self._pins = pins
        self._report = report
        # `qtest` only, but for the levels, which belong to whoever moves the line.
        self._intercepted: InputPins | None = None
        self._levels: dict[int, int] = {}
        self._handlers: dict[str, Callable[[list[str]], str]] = {
            "endianness": lambda words: "OK little",
            "read": self._read,
            "write": self._write,
            "memset": self._memset,
            "b64read": self._b64read,
            "b64write": self._b64write,
            "irq_intercept_in": self._intercept_inputs,
            "irq_intercept_out": self._intercept_outputs,
            "set_irq_in": self._set_input,
            "module_load": lambda words: "FAIL",  # nothing here is a module
        }
        for letter, width in _WIDTHS.items():
            self._add_accesses(letter, width)
        if time is not None:
            self._handlers["clock_step"] = lambda words: step(time, words)
            self._handlers["clock_set"] = lambda words: set_clock(time, words)

    def _add_accesses(self, letter: str, width: int) -> None:
        self._handlers[f"read{letter}"] = lambda words: self._read_value(words, width)
        self._handlers[f"write{letter}"] = lambda words: self._write_value(words, width)
        if width <= 4:
            self._handlers[f"in{letter}"] = lambda words: self._in(words, width)
            self._handlers[f"out{letter}"] = lambda words: self._out(words, width)

    def reset(self) -> None:
        """The client has gone: nothing is intercepted any more."""
        if self._intercepted is not None:
            self._intercepted.observe(None)
            self._intercepted = None

    def answer(self, request: str) -> str:
        """The line for *request*, "" for an empty one."""
        if not request:
            return ""
        name, *words = request.split(" ")
        handler = self._handlers.get(name)
        if handler is None:
            return f"FAIL Unknown command '{name}'"
        try:
            return handler(words)
        except RequestError as error:
            return str(error)
        except Exception as error:  # a device's fault costs one request, not the harness
            return f"FAIL {name}: {type(error).__name__}: {error}".replace("\n", " ")

    # ---- ports ----

    def _in(self, words: list[str], width: int) -> str:
        value = self._machine.read_port(number(words, 0, "port") & PORT_MASK, width)
        return f"OK {value:#06x}"

    def _out(self, words: list[str], width: int) -> str:
        port, value = number(words, 0, "port") & PORT_MASK, number(words, 1, "value")
        self._machine.write_port(port, width, value & (1 << 8 * width) - 1)
        return "OK"

    # ---- memory and devices ----

    def _read_value(self, words: list[str], width: int) -> str:
        data = self._machine.read(number(words, 0, "address"), width)
        return f"OK {int.from_bytes(data, 'little'):#018x}"

    def _write_value(self, words: list[str], width: int) -> str:
        address, value = number(words, 0, "address"), number(words, 1, "value")
        self._machine.write(address, (value & (1 << 8 * width) - 1).to_bytes(width, "little"))
        return "OK"

    def _read(self, words: list[str]) -> str:
        address, size = extent(words, MAX_SIZE)
        if not size:
            raise RequestError("FAIL read: size is 0, at least 1 is expected")
        return f"OK 0x{self._machine.read(address, size).hex()}"

    def _write(self, words: list[str]) -> str:
        address, size = extent(words, MAX_SIZE)
        text = operand(words, 2, "data")
        if len(text) < 3:
            raise RequestError("ERR invalid argument size")
        digits = text[2 : 2 + 2 * size]  # two digits of prefix, whatever they are
        try:
            data = bytes.fromhex(digits[: len(digits) & ~1])
        except ValueError:
            raise RequestError("FAIL write: data is not hexadecimal") from None
        self._machine.write(address, data.ljust(size, b"\0"))
        return "OK"

    def _memset(self, words: list[str]) -> str:
        address, size = extent(words, MAX_MEMSET)
        pattern = bytes([number(words, 2, "value") & 0xFF])
        for done in range(0, size, MEMSET_PIECE):
            self._machine.write(address + done, pattern * min(MEMSET_PIECE, size - done))
        return "OK"

    def _b64read(self, words: list[str]) -> str:
        address, size = extent(words, MAX_SIZE)
        return f"OK {base64.b64encode(self._machine.read(address, size)).decode()}"

    def _b64write(self, words: list[str]) -> str:
        address, size = extent(words, MAX_SIZE)
        text = operand(words, 2, "data")
        if len(text) < 3:
            raise RequestError("ERR invalid argument size")
        try:
            data = base64.b64decode(text, validate=True)
        except binascii.Error as error:
            raise RequestError(f"FAIL b64write: data is not base64: {error}") from None
        self._machine.write(address, data[:size])
        return "OK"

    # ---- interrupts ----

    def _intercept_inputs(self, words: list[str]) -> str:
        pins = self._find_pins(operand(words, 0, "path"))
        if len(words) > 1:
            raise RequestError("FAIL Interception of named in-GPIOs not yet supported")
        if self._intercepted is not None and self._intercepted is not pins:
            raise RequestError("FAIL IRQ intercept already enabled")
        if self._intercepted is None:
            self._intercepted, self._levels = pins, {}
            pins.observe(self._on_level)
        return "OK"

    def _intercept_outputs(self, words: list[str]) -> str:
        pins = self._find_pins(operand(words, 0, "path"))
        if self._intercepted is not None and self._intercepted is not pins:
            raise RequestError("FAIL IRQ intercept already enabled")
        raise RequestError("FAIL No intercepts installed")  # the kernel's controllers show nothing of theirs

    def _set_input(self, words: list[str]) -> str:
        pins = self._find_pins(operand(words, 0, "path"))
        name, pin = operand(words, 1, "name"), number(words, 2, "pin")
        level = number(words, 3, "level")
        if name != UNNAMED_INPUTS or pin >= pins.count:
            raise RequestError(f"FAIL set_irq_in: no pin {pin} '{name}', expected '{UNNAMED_INPUTS}' 0 … {pins.count - 1}")
        pins.set_level(pin, level)
        return "OK"

    def _find_pins(self, path: str) -> InputPins:
        pins = self._pins.get(path.rpartition("/")[2])
        if pins is None:
            raise RequestError("FAIL Unknown device")
        return pins

    def _on_level(self, pin: int, level: int) -> None:
        if self._levels.get(pin, 0) != level:
            self._levels[pin] = level
            self._report(pin, level)


# ---- virtual time ----


def step(time: HarnessedTime, words: list[str]) -> str:
    """So many nanoseconds on, or as many as it is to the next timer."""
    until = time.now() + duration(words) if words else time.next()
    if until is None:
        return "FAIL cannot advance clock to the next deadline because there is no pending deadline"
    if not words:
        until = max(until, time.now() + 1)
    return f"OK {time.now()}" if time.step(until) else "FAIL could not advance time"


def set_clock(time: HarnessedTime, words: list[str]) -> str:
    """On to a time, which may be now."""
    until, now = duration(words), time.now()
    return f"OK {until}" if until == now or time.step(until) else f"FAIL {now}"


def duration(words: list[str]) -> int:
    """The first operand, nanoseconds with a sign."""
    value = number(words, 0, "time")
    if words[0].startswith("-"):
        return value - LIMIT if value else 0
    return value


# ---- operands ----


def operand(words: list[str], index: int, name: str) -> str:
    """Word *index* behind the command, which is there."""
    if index >= len(words) or not words[index]:
        raise RequestError(f"FAIL operand {index + 1}, the {name}, is missing")
    return words[index]


def number(words: list[str], index: int, name: str) -> int:
    """The same as a number: decimal, 0x or 0; a negative one wraps around 64 bits."""
    text = operand(words, index, name)
    digits = text[1:] if text[0] in "+-" else text
    value = magnitude(digits) if DIGITS.fullmatch(digits) else None
    if value is None:
        raise RequestError(f"FAIL operand {index + 1}, the {name}, is no number below 2^64")
    return -value % LIMIT if text[0] == "-" else value


def extent(words: list[str], limit: int) -> tuple[int, int]:
    """Address and size, in bytes, the first two operands; *limit* is the largest size."""
    address, size = number(words, 0, "address"), number(words, 1, "size")
    if size > limit:
        raise RequestError(f"FAIL operand 2, the size, is {size}, at most {limit} is expected")
    return address, size
