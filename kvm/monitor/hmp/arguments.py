"""The words after a command: what each may be, and how they are read (hmp.md §1).

    Command(…, arguments=(Flag("d"), Flag("r"), Text("uri")))
    migrate -d "exec:cat > file"     →  {"d": True, "r": False, "uri": "exec:cat > file"}

Each kind reads itself from a Cursor; a LineError says what is wrong with the line.  An optional argument that is left
out is not in the result.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from .errors import LineError
from .expression import evaluate, skip_blanks

_WORD = re.compile(r"[^ \t\r\n\f\v]*")
_ESCAPES = {"n": "\n", "r": "\r", "\\": "\\", "'": "'", '"': '"'}
_UINT32_MAX = (1 << 32) - 1
_MOST_DIGITS = 9  # of a count; more would ask for more than anybody reads

FORMATS = "xduoci"
SIZES = {"b": 1, "h": 2, "w": 4, "g": 8}  # bytes


@dataclass
class Format:
    """How values are shown: *count* of them, each of *size* bytes, with a letter of FORMATS."""

    count: int
    letter: str
    size: int


@dataclass
class Cursor:
    """A place in a line; *command* is the full name, for messages; *flags* are those still to come."""

    text: str
    position: int
    command: str
    format: Format = field(default_factory=lambda: Format(1, "x", 4))  # what applies where the line says nothing
    flags: str = ""

    @property
    def at_end(self) -> bool:
        return self.position >= len(self.text)

    def skip_blanks(self) -> None:
        self.position = skip_blanks(self.text, self.position)

    def peek(self, length: int = 1) -> str:
        return self.text[self.position : self.position + length]

    def word(self) -> str:
        """Everything up to the next blank."""
        match = _WORD.match(self.text, self.position)
        word = match.group() if match else ""
        self.position += len(word)
        return word

    def rest(self) -> str:
        """Everything."""
        rest, self.position = self.text[self.position :], len(self.text)
        return rest


class Argument(Protocol):
    """One argument: `read` takes it from the cursor, which stands behind the blanks; None: it is not there."""

    @property
    def name(self) -> str: ...

    @property
    def usage(self) -> str:
        """How help shows it."""

    def read(self, cursor: Cursor) -> Any: ...


@dataclass(frozen=True)
class Flag:
    """-x, or not; flags stand in the order of their declaration."""

    name: str

    @property
    def usage(self) -> str:
        return f"[-{self.name}]"

    def read(self, cursor: Cursor) -> bool:
        cursor.flags = cursor.flags.replace(self.name, "")
        if cursor.peek() != "-":
            return False
        letter = cursor.peek(2)[1:]
        if letter != self.name:
            if letter and letter in cursor.flags:
                return False
            raise LineError(f"{cursor.command}: unsupported option -{letter}")
        cursor.position += 2
        return True


@dataclass(frozen=True)
class Text:
    """A word, or anything in double quotes."""

    name: str
    optional: bool = False

    @property
    def usage(self) -> str:
        return f"[{self.name}]" if self.optional else self.name

    def read(self, cursor: Cursor) -> str | None:
        if cursor.at_end and self.optional:
            return None
        text = quoted(cursor) if cursor.peek() == '"' else cursor.word() or None
        if text is None:
            raise LineError(f"{cursor.command}: string expected")
        return text


def quoted(cursor: Cursor) -> str | None:
    """A text in double quotes; None when it does not end or has an escape that nobody knows."""
    found: list[str] = []
    position = cursor.position + 1
    while position < len(cursor.text):
        character = cursor.text[position]
        position += 1
        if character == '"':
            cursor.position = position
            return "".join(found)
        if character == "\\":
            character = _ESCAPES.get(cursor.text[position : position + 1], "")
            position += 1
            if not character:
                return None
        found.append(character)
    return None


@dataclass(frozen=True)
class Number:
    """An expression; *wide*: of 64 bits, else of 32, unsigned."""

    name: str
    optional: bool = False
    wide: bool = False

    @property
    def usage(self) -> str:
        return f"[{self.name}]" if self.optional else self.name

    def read(self, cursor: Cursor) -> int | None:
        if cursor.at_end and self.optional:
            return None
        value, cursor.position = evaluate(cursor.text, cursor.position)
        if not self.wide and not 0 <= value <= _UINT32_MAX:
            raise LineError(f"'{cursor.command}' has failed: integer is for 32-bit values")
        return value


@dataclass(frozen=True)
class Switch:
    """on or off."""

    name: str

    @property
    def usage(self) -> str:
        return "on|off"

    def read(self, cursor: Cursor) -> bool:
        word = cursor.word()
        if word not in ("on", "off"):
            raise LineError("Expected 'on' or 'off'")
        return word == "on"


@dataclass(frozen=True)
class Rest:
    """Whatever else there is; nothing is fine, too."""

    name: str

    @property
    def usage(self) -> str:
        return f"[{self.name}]"

    def read(self, cursor: Cursor) -> str | None:
        return cursor.rest() or None


@dataclass(frozen=True)
class Shape:
    """/FMT: a count, a format and a size, each optional; what is left out stays as it was the last time."""

    name: str = "shape"

    @property
    def usage(self) -> str:
        return "/fmt"

    def read(self, cursor: Cursor) -> Format:
        shape = Format(1, cursor.format.letter, cursor.format.size)
        if cursor.peek() == "/":
            cursor.position += 1
            self._read_letters(cursor.word(), shape, cursor)
        cursor.format.letter, cursor.format.size = shape.letter, shape.size
        return shape

    @staticmethod
    def _read_letters(word: str, shape: Format, cursor: Cursor) -> None:
        letters = word.lstrip("0123456789")
        digits = word[: len(word) - len(letters)]
        if len(digits) > _MOST_DIGITS:
            raise LineError(f"{cursor.command}: the count {digits[:_MOST_DIGITS]}… is too large")
        shape.count = int(digits) if digits else 1
        for letter in letters:
            if letter in FORMATS:
                shape.letter = letter
            elif letter in SIZES:
                shape.size = SIZES[letter]
            else:
                raise LineError(f"invalid char in format: '{letter}'")


def read_arguments(arguments: Sequence[Argument], cursor: Cursor) -> dict[str, Any]:
    """All *arguments*, by name, and nothing behind them; LineError says what is wrong."""
    cursor.flags = "".join(argument.name for argument in arguments if isinstance(argument, Flag))
    values = {}
    for argument in arguments:
        cursor.skip_blanks()
        value = argument.read(cursor)
        if value is not None:
            values[argument.name] = value
    cursor.skip_blanks()
    if not cursor.at_end:
        raise LineError(f"{cursor.command}: extraneous characters at the end of line")
    return values
