"""Numbers as a person types them: sums, products, parentheses (hmp.md §1).

    sum     = logic { ("+" | "-") logic }          7   0x1f   017   'A'
    logic   = product { ("&" | "|" | "^") product }
    product = unary { ("*" | "/" | "%") unary }    blanks anywhere between them
    unary   = ("+" | "-" | "~") unary | "(" sum ")" | number | 'character'

Everything is a signed number of 64 bits and wraps around.  What follows an expression is left to whoever asked.

Holds     (1) depth of nesting is bounded, so no input reaches the interpreter's limit
"""

from __future__ import annotations

import re

from ..c_number import DIGITS, LIMIT, magnitude
from .errors import LineError

MAX_NESTING = 64
_BLANKS = re.compile(r"[ \t\r\n\f\v]*")


def signed(value: int) -> int:
    """The low 64 bits of *value* as a signed number."""
    value %= LIMIT
    return value - LIMIT if value >> 63 else value


def evaluate(text: str, position: int) -> tuple[int, int]:
    """The expression in *text* at *position*: its value, and where it and the blanks after it end."""
    reader = _Reader(text, position)
    return reader.sum(), reader.position


class _Reader:
    def __init__(self, text: str, position: int) -> None:
        self.position = position
        self._text = text
        self._depth = 0

    def sum(self) -> int:
        value = self._logic()
        while (operator := self._peek()) in ("+", "-"):
            self._step()
            right = self._logic()
            value = signed(value + right if operator == "+" else value - right)
        return value

    def _logic(self) -> int:
        value = self._product()
        while (operator := self._peek()) in ("&", "|", "^"):
            self._step()
            right = self._product()
            value = {"&": value & right, "|": value | right, "^": value ^ right}[operator]
        return value

    def _product(self) -> int:
        value = self._unary()
        while (operator := self._peek()) in ("*", "/", "%"):
            self._step()
            right = self._unary()
            value = signed(value * right) if operator == "*" else divide(value, right, operator)
        return value

    def _unary(self) -> int:
        signs = []
        while (sign := self._peek()) in ("+", "-", "~"):
            self._step()
            signs.append(sign)
        value = self._atom()
        for sign in reversed(signs):
            value = signed({"+": value, "-": -value, "~": ~value}[sign])
        return value

    def _atom(self) -> int:
        character = self._peek()
        if character == "(":
            return self._parenthesis()
        if character == "'":
            return self._character()
        if character == "$":
            raise LineError("unknown register")
        if not character:
            raise LineError("unexpected end of expression")
        return self._number()

    def _parenthesis(self) -> int:
        self._depth += 1
        if self._depth > MAX_NESTING:
            raise LineError(f"expression has more than {MAX_NESTING} nested parentheses")
        self._step()
        value = self.sum()
        if self._peek() != ")":
            raise LineError("')' expected")
        self._step()
        self._depth -= 1
        return value

    def _character(self) -> int:
        literal = self._text[self.position + 1 : self.position + 3]
        if not literal:
            raise LineError("character constant expected")
        if literal[1:] != "'":
            raise LineError("missing terminating ' character")
        self._step(3)
        return ord(literal[0])

    def _number(self) -> int:
        match = DIGITS.match(self._text, self.position)
        if match is None:
            raise LineError(f"invalid char '{self._peek()}' in expression")
        value = magnitude(match.group())
        if value is None:
            raise LineError("number too large")
        self._step(len(match.group()))
        return signed(value)

    def _peek(self) -> str:
        """The next character, "" at the end."""
        return self._text[self.position : self.position + 1]

    def _step(self, count: int = 1) -> None:
        """Go over *count* characters and the blanks behind them."""
        self.position = skip_blanks(self._text, self.position + count)


def divide(value: int, divisor: int, operator: str) -> int:
    """Quotient or remainder as C rounds them: towards zero."""
    if divisor == 0:
        raise LineError("division by zero")
    quotient = abs(value) // abs(divisor)
    if (value < 0) != (divisor < 0):
        quotient = -quotient
    return signed(quotient if operator == "/" else value - quotient * divisor)


def skip_blanks(text: str, position: int) -> int:
    """Where the blanks in *text* at *position* end."""
    match = _BLANKS.match(text, position)
    return match.end() if match else position
