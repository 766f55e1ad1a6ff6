"""JSON as QEMU's monitor reads and writes it (qmp.md §1.1).

In    the client's bytes, cut anywhere; no newline needed; strings in double or single quotes
Out   JSON values, each as soon as its last byte is there, and JsonErrors in between

    feed(b'{"execute":"st') · next_value() → INCOMPLETE · feed(b'op"}{') · next_value() → {"execute": "stop"}

A byte that fits nowhere is an error; what follows is skipped up to the next byte of structure, so one bad request
does not spoil the next.  Brackets decide where a value ends: only then are its tokens looked at, so one bad value
gives one error.

Threads   none of its own
Holds     (1) memory stays within MAX_SIZE bytes and MAX_TOKENS tokens of the unfinished value
          (2) each byte is looked at a bounded number of times, however the client cuts its writes
          (3) nesting never uses the interpreter's stack
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

MAX_NESTING = 1024
MAX_SIZE = 8 << 20  # bytes of one value
MAX_TOKENS = 1 << 18
MAX_WORD = 4096  # bytes of a number or keyword; one that comes in single bytes is looked at again for each

WHITESPACE = re.compile(rb"[ \t\r\n]*")
STRUCTURE = b"{}[]:,"
KEYWORD = re.compile(rb"[a-z]+")
NUMBER = re.compile(rb"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
NUMBER_START = re.compile(rb"-?(?:(?:0|[1-9][0-9]*)(?:\.(?:[0-9]+(?:[eE][+-]?[0-9]*)?)?|[eE][+-]?[0-9]*)?)?")
STRING_BODY = {
    ord('"'): re.compile(rb'(?:[^"\\\x00-\x1f\xff]++|\\[^\x00-\x1f\xff])*+'),
    ord("'"): re.compile(rb"(?:[^'\\\x00-\x1f\xff]++|\\[^\x00-\x1f\xff])*+"),
}
RECOVERY_END = re.compile(rb"[{}\[\]:,\x00-\x08\x0b\x0c\x0e-\x1f\xff]")  # what ends the skipping after an error
ESCAPE = re.compile(r"\\(?:u(.{0,4})|(.))", re.DOTALL)
SIMPLE_ESCAPES = dict(zip("\"\\/bfnrt'", "\"\\/\b\f\n\r\t'", strict=True))
LITERALS = {b"true": True, b"false": False, b"null": None}

OUTPUT_ESCAPE = re.compile('[\x00-\x1f"\\\\\x7f-\U0010ffff]')
OUTPUT_NAMES = {
    '"': '\\"',
    "\\": "\\\\",
    "\b": "\\b",
    "\f": "\\f",
    "\n": "\\n",
    "\r": "\\r",
    "\t": "\\t",
}


class JsonError(Exception):
    """The bytes are no JSON; the text is QEMU's."""


INCOMPLETE = object()  # `next_value`: more bytes are needed


class Token(NamedTuple):
    """A piece of JSON: its kind is a byte of STRUCTURE, or "k"eyword, "n"umber, "s"tring."""

    kind: int
    text: bytes


def parse_error(text: str) -> JsonError:
    """A JsonError with the words QEMU begins them with."""
    return JsonError(f"JSON parse error, {text}")


class JsonStream:
    """Cuts a stream of bytes into JSON values."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._position = 0  # first byte of the buffer that no token has used
        self._scanned = 0  # how far the string at _position is known to go on, 0 when not in one
        self._tokens: list[Token] = []
        self._size = 0  # bytes of the tokens
        self._braces = 0
        self._brackets = 0
        self._skipping = False  # after an error

    def feed(self, data: bytes) -> None:
        """Add bytes of the client."""
        del self._buffer[: self._position]
        self._scanned = max(self._scanned - self._position, 0)
        self._position = 0
        self._buffer += data

    def next_value(self) -> Any:
        """The next value, or INCOMPLETE; JsonError for each fault, after which one simply goes on."""
        while True:
            token = self._next_token()
            if token is None:
                return INCOMPLETE
            self._count(token)
            if self._braces < 0 or self._brackets < 0 or self._braces == self._brackets == 0:
                tokens, self._tokens = self._tokens, []
                self._forget()
                return parse(tokens)

    def finish(self) -> None:
        """The input has ended: a value that is not complete is an error."""
        if self._tokens or self._position < len(self._buffer):
            raise parse_error("premature EOI")

    def _forget(self) -> None:
        self._tokens = []
        self._size = self._braces = self._brackets = self._scanned = 0

    def _count(self, token: Token) -> None:
        self._tokens.append(token)
        self._size += len(token.text)
        if token.kind in b"{}":
            self._braces += 1 if token.kind == ord("{") else -1
        elif token.kind in b"[]":
            self._brackets += 1 if token.kind == ord("[") else -1
        if self._braces + self._brackets > MAX_NESTING:
            self._forget()
            raise JsonError("JSON nesting depth limit exceeded")
        if len(self._tokens) > MAX_TOKENS:
            self._forget()
            raise JsonError("JSON token count limit exceeded")
        if self._size > MAX_SIZE:
            self._forget()
            raise JsonError("JSON token size limit exceeded")

    def _next_token(self) -> Token | None:
        """The next token; None when its end is not in the buffer yet."""
        if not self._scanned and not self._skip():
            return None
        first = self._buffer[self._position]
        if first in STRUCTURE:
            return self._take(first, 1)
        if first in STRING_BODY:
            return self._string(STRING_BODY[first])
        if first == ord("-") or (chr(first).isdigit() and first < 128):
            return self._number()
        keyword = KEYWORD.match(self._buffer, self._position)
        if keyword is None:
            raise self._stray(self._position + 1)
        return None if self._at_end(keyword.end(), MAX_WORD) else self._take(ord("k"), len(keyword.group()))

    def _skip(self) -> bool:
        """Step over whitespace, and over everything up to a byte of structure after an error; False at the end."""
        if self._skipping:
            found = RECOVERY_END.search(self._buffer, self._position)
            self._position = found.start() if found else len(self._buffer)
            self._skipping = found is None
        spaces = WHITESPACE.match(self._buffer, self._position)
        self._position = spaces.end() if spaces else self._position
        return self._position < len(self._buffer)

    def _at_end(self, end: int, limit: int) -> bool:
        """True when a token that ends at *end* might go on in bytes to come; it may have *limit* bytes."""
        if end < len(self._buffer):
            return False
        if end - self._position > limit:
            self._position = end
            self._forget()
            self._skipping = True
            raise JsonError("JSON token size limit exceeded")
        return True

    def _take(self, kind: int, length: int) -> Token:
        start = self._position
        self._position += length
        return Token(kind, bytes(self._buffer[start : self._position]))

    def _number(self) -> Token | None:
        start = self._position
        prefix = NUMBER_START.match(self._buffer, start)
        end = prefix.end() if prefix else start
        if self._at_end(end, MAX_WORD):
            return None
        whole = NUMBER.fullmatch(self._buffer, start, end)
        if whole is None or self._buffer[end : end + 1].isdigit():  # "1.x", or "01": no number goes on like that
            raise self._stray(end + 1)
        return self._take(ord("n"), end - start)

    def _string(self, body: re.Pattern[bytes]) -> Token | None:
        quote = self._buffer[self._position]
        match = body.match(self._buffer, max(self._scanned, self._position + 1))
        end = match.end() if match else self._position + 1
        # A backslash at the end of the buffer waits for the byte it belongs to.
        if end == len(self._buffer) or (self._buffer[end] == ord("\\") and end + 1 == len(self._buffer)):
            self._at_end(len(self._buffer), MAX_SIZE)
            self._scanned = end
            return None
        self._scanned = 0
        if self._buffer[end] != quote:
            stray = end + 2 if self._buffer[end] == ord("\\") else end + 1
            raise self._stray(stray)
        return self._take(ord("s"), end + 1 - self._position)

    def _stray(self, end: int) -> JsonError:
        """The error about the bytes up to *end*, which are dropped with the value they are in."""
        text = bytes(self._buffer[self._position : end]).decode("utf-8", "replace")
        self._position = end
        self._forget()
        self._skipping = True
        return parse_error(f"stray '{text}'")


class _Frame:
    """A list or an object under construction."""

    __slots__ = ("container", "key", "state")

    def __init__(self, container: list | dict) -> None:
        self.container = container
        self.state = FIRST
        self.key: str | None = None


# What may come next in a frame.
FIRST, KEY, COLON, VALUE, SEPARATOR = range(5)


def parse(tokens: list[Token]) -> Any:
    """The value that *tokens* spell; JsonError when they spell none."""
    stack: list[_Frame] = []
    for token in tokens:
        if stack and _consume(stack[-1], token):
            continue
        if stack and _closes(stack[-1], token):
            value: Any = stack.pop().container
        elif token.kind == ord("{"):
            stack.append(_Frame({}))
            continue
        elif token.kind == ord("["):
            stack.append(_Frame([]))
            continue
        else:
            value = scalar(token)
        if not stack:
            return value
        _add(stack[-1], value)
    raise parse_error("premature EOI")


def _closes(frame: _Frame, token: Token) -> bool:
    closer = ord("}") if isinstance(frame.container, dict) else ord("]")
    return token.kind == closer and frame.state in (FIRST, SEPARATOR)


def _consume(frame: _Frame, token: Token) -> bool:
    """Take a colon or comma where one is due; False when *token* is a value or a closing bracket."""
    is_object = isinstance(frame.container, dict)
    if frame.state == COLON:
        if token.kind != ord(":"):
            raise parse_error("missing : in object pair")
        frame.state = VALUE
        return True
    if frame.state == SEPARATOR and not _closes(frame, token):
        if token.kind != ord(","):
            raise parse_error(f"expected separator in {'dict' if is_object else 'list'}")
        frame.state = KEY if is_object else VALUE
        return True
    return False


def _add(frame: _Frame, value: Any) -> None:
    """Put a complete value where *frame* wants it."""
    container = frame.container
    if isinstance(container, list):
        container.append(value)
        frame.state = SEPARATOR
    elif frame.state == VALUE:
        assert frame.key is not None
        container[frame.key] = value
        frame.state = SEPARATOR
    else:
        if not isinstance(value, str):
            raise parse_error("key is not a string in object")
        if value in container:
            raise parse_error("duplicate key")
        frame.key, frame.state = value, COLON


def scalar(token: Token) -> Any:
    """The value of a token that stands alone."""
    if token.kind == ord("s"):
        return string(token.text)
    if token.kind == ord("n"):
        return number(token.text)
    if token.kind != ord("k"):
        raise parse_error("expecting value")
    if token.text not in LITERALS:
        raise parse_error(f"invalid keyword '{token.text.decode()}'")
    return LITERALS[token.text]


def number(text: bytes) -> int | float:
    """An integer from -2^63 to 2^64 - 1 as it is, any other number as a double."""
    if text.lstrip(b"-").isdigit() and len(text) <= 21:
        value = int(text)
        if -(1 << 63) <= value < 1 << 64:
            return value
    result = float(text)
    if math.isinf(result):
        raise parse_error("number out of range")
    return result


def string(text: bytes) -> str:
    """The contents of a quoted string."""
    body = text[1:-1].replace(b"\xc0\x80", b"\\u0000")  # NUL as some encoders write it
    try:
        decoded = body.decode("utf-8")
    except UnicodeDecodeError:
        raise parse_error("invalid UTF-8 sequence in string") from None
    if any(is_noncharacter(ord(char)) for char in set(decoded)):
        raise parse_error("invalid UTF-8 sequence in string")
    return unescape(decoded) if "\\" in decoded else decoded


def is_noncharacter(code: int) -> bool:
    """True for the code points that are never characters (U+FFFE and such)."""
    return code & 0xFFFE == 0xFFFE or 0xFDD0 <= code <= 0xFDEF


def unescape(text: str) -> str:
    """*text* with its backslash sequences resolved."""
    result: list[str] = []
    position = 0
    while True:
        escape = ESCAPE.search(text, position)
        if escape is None:
            return "".join(result) + text[position:]
        result.append(text[position : escape.start()])
        position = escape.end()
        if escape.group(2) is not None:
            if escape.group(2) not in SIMPLE_ESCAPES:
                raise parse_error("invalid escape sequence in string")
            result.append(SIMPLE_ESCAPES[escape.group(2)])
            continue
        code = code_unit(escape.group(1))
        if 0xD800 <= code < 0xDC00 and text[position : position + 2] == "\\u":
            low = code_unit(text[position + 2 : position + 6])
            if 0xDC00 <= low < 0xE000:
                code = 0x10000 + ((code & 0x3FF) << 10 | low & 0x3FF)
                position += 6
        if 0xD800 <= code < 0xE000 or is_noncharacter(code):
            raise parse_error(f"\\u{escape.group(1)} is not a valid Unicode character")
        result.append(chr(code))


def code_unit(digits: str) -> int:
    """The number behind a backslash and "u"."""
    if not re.fullmatch("[0-9a-fA-F]{4}", digits):
        raise parse_error(f"\\u{digits} is not a valid Unicode character")
    return int(digits, 16)


def dump(value: Any, pretty: bool = False) -> bytes:
    """*value* as one line of ASCII with CR LF at its end; *pretty* spreads it over several."""
    return ("".join(_pieces(value, pretty)) + "\r\n").encode("ascii")


def _pieces(value: Any, pretty: bool) -> Iterator[str]:
    # Each open container is on the stack: (iterator over its members, closing bracket).
    stack: list[tuple[Iterator, str]] = []
    separator = ""
    while True:
        yield separator
        if isinstance(value, dict):
            yield "{"
            stack.append((iter(value.items()), "}"))
        elif isinstance(value, list | tuple):
            yield "["
            stack.append((iter(value), "]"))
        else:
            yield scalar_text(value)
        first = isinstance(value, dict | list | tuple)
        while True:
            if not stack:
                return
            members, closer = stack[-1]
            member: Any = next(members, INCOMPLETE)
            if member is not INCOMPLETE:
                break
            stack.pop()
            yield line_break(len(stack)) + closer if pretty else closer
            first = False
        comma = "" if first else "," if pretty else ", "
        separator = comma + (line_break(len(stack)) if pretty else "")
        if closer == "}":
            key, value = member
            separator += f"{quote(str(key))}: "
        else:
            value = member


def line_break(depth: int) -> str:
    """A new line in pretty output."""
    return "\r\n" + "    " * depth


def scalar_text(value: Any) -> str:
    """A string, number, boolean or null as JSON; TypeError for anything else."""
    if isinstance(value, str):
        return quote(value)
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(int(value))
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.17g}"
    raise TypeError(f"{value!r} cannot be written as JSON")


def quote(text: str) -> str:
    """*text* in double quotes, everything but printable ASCII escaped."""
    return f'"{OUTPUT_ESCAPE.sub(_escape, text)}"'


def _escape(match: re.Match[str]) -> str:
    char = match.group()
    if char in OUTPUT_NAMES:
        return OUTPUT_NAMES[char]
    code = ord(char)
    if 0xD800 <= code < 0xE000:  # half a character: an undecodable byte of a file name
        return "\\uFFFD"
    if code < 0x10000:
        return f"\\u{code:04X}"
    code -= 0x10000
    return f"\\u{0xD800 + (code >> 10):04X}\\u{0xDC00 + (code & 0x3FF):04X}"
