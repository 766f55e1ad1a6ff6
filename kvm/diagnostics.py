"""What the program says on stderr: one line a message, the program's name in front (cli.md)."""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import dataclass
from datetime import UTC, datetime

from .keyval import UsageError


@dataclass
class Diagnostics:
    """The voice of the program; any thread may use it."""

    program: str = os.path.basename(sys.argv[0])
    timestamps: bool = False  # -msg timestamp=on
    guest: str = ""  # its name goes in front; -msg guest-name=on

    def say(self, text: str) -> None:
        """Print "PROG: *text*"."""
        self._print(f"{self.program}: {text}")

    def say_at(self, place: str, text: str) -> None:
        """Print "PROG:*place*: *text*"; a place is a file, or a line of it."""
        self._print(f"{self.program}:{place}: {text}")

    def error(self, error: UsageError) -> None:
        """Print what is wrong with the command line, and the hints that go with it."""
        for text in error.messages:
            self.say(text)
        for hint in error.hints:
            self.verbatim(hint)

    def verbatim(self, line: str) -> None:
        """Print *line* as it is."""
        self._print(line, stamped=False)

    def _print(self, line: str, stamped: bool = True) -> None:
        if self.guest and stamped:
            line = f"{self.guest} {line}"
        if self.timestamps and stamped:
            now = datetime.now(UTC)
            line = f"{now:%Y-%m-%dT%H:%M:%S.%fZ} {line}"
        # One write a line, so that lines of several threads do not mix; surrogates stand for odd bytes of argv.
        # Nobody may be there to read it: what the program was about to do, it does all the same.
        with contextlib.suppress(OSError):
            sys.stderr.buffer.write(os.fsencode(line + "\n"))
            sys.stderr.buffer.flush()
