"""A line editor for a terminal at the other end of a stream (hmp.md §1).

In    keys, one byte at a time; escape sequences of the usual terminals
Out   bytes that make the terminal show the line, and each line when it is entered

    key           does                                    key                does
    printing      goes in at the cursor                   up, ^P · down, ^N  earlier line · later line
    left, right   move the cursor                         ^A, Home · ^E, End start · end of the line
    ^H, DEL · ^D, Delete   erase before · at the cursor   ^W · ^U            erase the word · all before the cursor
    TAB           completes the word                      ^L                 clears the screen

Whatever changes the line draws it anew: back to the line's start, the text, ESC [K, back to the cursor.

Threads   none of its own
Holds     (1) a line never has more than MAX_LINE bytes; further ones are ignored
          (2) the history never has more than MAX_HISTORY lines, no two alike
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, auto

MAX_LINE = 4095
MAX_HISTORY = 64
SCREEN_WIDTH = 80
NARROWEST_COLUMN, COLUMN_GAP = 10, 2  # of a list of completions

LEFT, RIGHT, ERASE_REST, CLEAR_SCREEN = b"\x1b[D", b"\x1b[C", b"\x1b[K", b"\x1b[2J\x1b[1;1H"
NEW_LINE = b"\r\n"
ESCAPE, CONTROL_SEQUENCE, DELETE = 0x1B, 0x9B, 0x7F


class Keys(Enum):
    """What the next byte is part of."""

    PLAIN = auto()
    ESCAPE = auto()  # after ESC
    SEQUENCE = auto()  # after ESC [
    SHIFTED = auto()  # after ESC O


Complete = Callable[[str], list[str]]  # the line up to the cursor → what its last word may become


class LineEditor:
    """One line at a time, and the lines before it; *complete* knows what may follow."""

    def __init__(self, prompt: bytes, complete: Complete) -> None:
        self.history: list[bytes] = []
        self._prompt = prompt
        self._complete = complete
        self._begin_line()
        self._keys = Keys.PLAIN
        self._number = 0  # of an escape sequence
        self._actions: dict[int, Callable[[], None]] = {
            0x01: self._to_start,
            0x04: self._erase_at_cursor,
            0x05: self._to_end,
            0x08: self._erase_before_cursor,
            0x09: self._complete_word,
            0x0C: self._clear_screen,
            0x0E: self._later,
            0x10: self._earlier,
            0x15: self._erase_to_start,
            0x17: self._erase_word,
            DELETE: self._erase_before_cursor,
        }
        self._sequences: dict[tuple[Keys, str], Callable[[], None]] = {
            (Keys.SEQUENCE, "A"): self._earlier,
            (Keys.SEQUENCE, "B"): self._later,
            (Keys.SEQUENCE, "C"): self._right,
            (Keys.SEQUENCE, "D"): self._left,
            (Keys.SEQUENCE, "1~"): self._to_start,
            (Keys.SEQUENCE, "3~"): self._erase_at_cursor,
            (Keys.SEQUENCE, "4~"): self._to_end,
            (Keys.SHIFTED, "H"): self._to_start,
            (Keys.SHIFTED, "F"): self._to_end,
        }

    def _begin_line(self) -> None:
        self._line = bytearray()
        self._cursor = 0
        self._drawn = b""  # what the terminal shows of the line, and where its cursor is
        self._drawn_cursor = 0
        self._place = len(self.history)  # in the history; its length: the line that is being typed
        self._output = bytearray()

    def prompt(self) -> bytes:
        """Begin a new line: what to send for it."""
        self._begin_line()
        self._keys = Keys.PLAIN
        return self._prompt

    def key(self, byte: int) -> tuple[bytes, bytes | None]:
        """What to send for this key, and the line if it ended one; `prompt` comes before the next key then."""
        self._output = bytearray()
        if self._keys is not Keys.PLAIN:
            self._continue_sequence(byte)
        elif byte in b"\r\n":
            line = bytes(self._line)
            self._remember(line)
            return NEW_LINE, line
        elif byte == ESCAPE:
            self._keys = Keys.ESCAPE
        elif byte == CONTROL_SEQUENCE:
            self._begin_sequence(Keys.SEQUENCE)
        elif byte in self._actions:
            self._actions[byte]()
        elif byte >= 0x20:
            self._insert(bytes([byte]))
        self._draw()
        return bytes(self._output), None

    # ---- escape sequences ----

    def _begin_sequence(self, kind: Keys) -> None:
        self._keys = kind
        self._number = 0

    def _continue_sequence(self, byte: int) -> None:
        kind, self._keys = self._keys, Keys.PLAIN
        if kind is Keys.ESCAPE:
            if byte in b"[O":
                self._begin_sequence(Keys.SEQUENCE if byte == ord("[") else Keys.SHIFTED)
        elif kind is Keys.SEQUENCE and byte in b"0123456789":
            self._number = min(self._number * 10 + byte - ord("0"), 1000)
            self._keys = kind
        else:
            name = chr(byte)
            action = self._sequences.get((kind, f"{self._number}~" if name == "~" else name))
            if action is not None:
                action()

    # ---- changes of the line ----

    def _insert(self, text: bytes) -> None:
        text = text[: MAX_LINE - len(self._line)]
        self._line[self._cursor : self._cursor] = text
        self._cursor += len(text)

    def _left(self) -> None:
        self._cursor = max(self._cursor - 1, 0)

    def _right(self) -> None:
        self._cursor = min(self._cursor + 1, len(self._line))

    def _to_start(self) -> None:
        self._cursor = 0

    def _to_end(self) -> None:
        self._cursor = len(self._line)

    def _erase_back_to(self, start: int) -> None:
        del self._line[start : self._cursor]
        self._cursor = start

    def _erase_before_cursor(self) -> None:
        self._erase_back_to(max(self._cursor - 1, 0))

    def _erase_at_cursor(self) -> None:
        del self._line[self._cursor : self._cursor + 1]

    def _erase_to_start(self) -> None:
        self._erase_back_to(0)

    def _erase_word(self) -> None:
        before = self._line[: self._cursor].rstrip()
        self._erase_back_to(max(before.rfind(blank) for blank in (b" ", b"\t")) + 1)

    # ---- the history ----

    def _remember(self, line: bytes) -> None:
        if not line:
            return
        if line in self.history:
            self.history.remove(line)
        self.history.append(line)
        del self.history[:-MAX_HISTORY]

    def _earlier(self) -> None:
        if self._place > 0:
            self._show(self._place - 1)

    def _later(self) -> None:
        if self._place < len(self.history):
            self._show(self._place + 1)

    def _show(self, place: int) -> None:
        self._place = place
        self._line = bytearray(self.history[place] if place < len(self.history) else b"")
        self._cursor = len(self._line)

    # ---- completion ----

    def _complete_word(self) -> None:
        before = self._line[: self._cursor].decode(errors="surrogateescape")
        word = before[max(before.rfind(blank) for blank in " \t") + 1 :]
        found = sorted(set(self._complete(before)))
        if len(found) == 1:
            self._insert(f"{found[0][len(word) :]} ".encode())
        elif found:
            self._insert(shared_beginning(found)[len(word) :].encode())
            self._output += NEW_LINE + columns(found)
            self._draw_anew()

    # ---- what the terminal shows ----

    def _clear_screen(self) -> None:
        self._output += CLEAR_SCREEN
        self._draw_anew()

    def _draw_anew(self) -> None:
        """The cursor is at the start of a line of the screen."""
        self._output += self._prompt + self._line + ERASE_REST
        self._drawn, self._drawn_cursor = bytes(self._line), len(self._line)

    def _draw(self) -> None:
        if self._drawn != self._line:
            self._output += LEFT * self._drawn_cursor + self._line + ERASE_REST
            self._drawn, self._drawn_cursor = bytes(self._line), len(self._line)
        distance = self._cursor - self._drawn_cursor
        self._output += RIGHT * distance if distance > 0 else LEFT * -distance
        self._drawn_cursor = self._cursor


def shared_beginning(words: list[str]) -> str:
    """What all of *words*, which are sorted, begin with."""
    first, last = words[0], words[-1]
    length = next((at for at, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[:length]


def columns(words: list[str]) -> bytes:
    """*words* in columns of equal width, as many as the screen takes."""
    width = min(max(max(map(len, words)) + COLUMN_GAP, NARROWEST_COLUMN), SCREEN_WIDTH)
    each_row = SCREEN_WIDTH // width
    rows = [words[start : start + each_row] for start in range(0, len(words), each_row)]
    return b"".join(b"".join(word.ljust(width).encode() for word in row) + NEW_LINE for row in rows)
