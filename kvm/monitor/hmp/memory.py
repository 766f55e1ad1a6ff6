"""Looking into guest memory, and at numbers (hmp.md §2).

    x/4xw 0x1000     00001000: 0x00000000 …     virtual addresses of the session's CPU; xp: physical ones
    print/x 1+2      0x3

A dump reads one line of values at a time, as large as is shown, and ends at the first that is not all there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from qemumig.commands.command import CommandError

from .arguments import Format, Number, Shape
from .command import HumanCommand
from .expression import signed
from .shell import GuestView, HumanSession

MAX_DUMP = 1 << 20  # bytes that one command shows
PAGE_SIZE = 4096
LINE_OF_BYTES, LINE = 8, 16  # bytes shown in a line: single ones, and wider values
ADDRESS_MASK = (1 << 64) - 1

_DECIMAL_WIDTHS = {1: 3, 2: 5, 4: 10, 8: 20}  # columns of the largest value, by its size in bytes
_OCTAL_WIDTHS = {1: 3, 2: 6, 4: 11, 8: 22}
_ESCAPED = {"'": "\\'", "\\": "\\\\", "\n": "\\n", "\r": "\\r"}

Read = Callable[[int, int], bytes | None]  # (address, size) → bytes, None where not all is there


def memory_commands() -> list[HumanCommand]:
    """x, xp and print."""
    shape, address = Shape(), Number("address", wide=True)
    return [
        HumanCommand("print", print_value, (shape, Number("value", wide=True)), ("p",), "print the value of an expression"),
        HumanCommand("x", dump_virtual, (shape, address), help="dump virtual memory from the address on"),
        HumanCommand("xp", dump_physical, (shape, address), help="dump physical memory from the address on"),
    ]


def print_value(session: HumanSession, shape: Format, value: int) -> str:
    unsigned = value & ADDRESS_MASK
    return {
        "x": lambda: f"{unsigned:#x}" if unsigned else "0",
        "o": lambda: f"0{unsigned:o}" if unsigned else "0",
        "u": lambda: f"{unsigned}",
        "c": lambda: quoted(unsigned),
    }.get(shape.letter, lambda: f"{value}")() + "\n"


async def dump_virtual(session: HumanSession, shape: Format, address: int) -> str:
    return await asyncio.to_thread(dump, shape, address, VirtualReader(session.shell.view, session.cpu).read)


async def dump_physical(session: HumanSession, shape: Format, address: int) -> str:
    view = session.shell.view
    return await asyncio.to_thread(dump, shape, address, lambda at, size: read_physical(view, at, size))


def read_physical(view: GuestView, address: int, size: int) -> bytes | None:
    """*size* bytes, when all of them are there."""
    return view.read(address, size) if view.covers(address, size) else None


class VirtualReader:
    """Reads virtual memory of *cpu*; each page is looked up once, for that holds up a running guest."""

    def __init__(self, view: GuestView, cpu: int) -> None:
        self._view = view
        self._cpu = cpu
        self._frames: dict[int, int | None] = {}  # virtual page → where it is

    def read(self, address: int, size: int) -> bytes | None:
        """*size* bytes, when all of them are there."""
        data = b""
        while len(data) < size:
            at = (address + len(data)) & ADDRESS_MASK
            offset = at % PAGE_SIZE
            frame = self._frame(at - offset)
            length = min(size - len(data), PAGE_SIZE - offset)
            piece = None if frame is None else read_physical(self._view, frame + offset, length)
            if piece is None:
                return None
            data += piece
        return data

    def _frame(self, page: int) -> int | None:
        if page not in self._frames:
            self._frames[page] = self._view.translate(self._cpu, page)
        return self._frames[page]


def dump(shape: Format, address: int, read: Read) -> str:
    """The lines of a dump; CommandError for what cannot be shown."""
    left = shape.count * shape.size
    if left > MAX_DUMP:
        raise CommandError(f"{left} bytes were asked for, a dump shows at most {MAX_DUMP}")
    if shape.letter == "i":
        raise CommandError("there is no disassembler here; use x, d, u, o or c")
    line_size = LINE_OF_BYTES if shape.size == 1 else LINE
    lines: list[str] = []
    while left > 0:
        size = min(left, line_size)
        address &= ADDRESS_MASK
        data = read(address, size)
        if data is None:
            return "".join([*lines, f"{address:016x}: Cannot access memory\n"])
        lines.append(f"{address:016x}:{values(data, shape)}\n")
        left -= size
        address += size
    return "".join(lines)


def values(data: bytes, shape: Format) -> str:
    """The values of one line, a blank before each."""
    size = 1 if shape.letter == "c" else shape.size
    numbers = [int.from_bytes(data[start : start + size], "little") for start in range(0, len(data), size)]
    return "".join(f" {value(number, shape.letter, size)}" for number in numbers)


def value(number: int, letter: str, size: int) -> str:
    """One value, as wide as the widest of its kind."""
    if letter == "x":
        return f"0x{number:0{2 * size}x}"
    if letter == "c":
        return quoted(number)
    if letter == "o":
        return (f"0{number:o}" if number else "0").rjust(_OCTAL_WIDTHS[size])
    if letter == "d" and size == 8:  # narrower ones are shown unsigned, as in QEMU
        number = signed(number)
    return str(number).rjust(_DECIMAL_WIDTHS[size])


def quoted(number: int) -> str:
    """A character in single quotes, as C writes it."""
    character = chr(number) if number < 127 else ""
    if character in _ESCAPED:
        return f"'{_ESCAPED[character]}'"
    return f"'{character}'" if 32 <= number < 127 else f"'\\x{number:02x}'"
