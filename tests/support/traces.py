"""The lines of some trace events, while a test does something."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qemumig.trace import TRACE


@contextmanager
def recorded(directory: Path, *patterns: str) -> Iterator[list[str]]:
    """What the events that fit *patterns* say meanwhile; filled at the end."""
    path = directory / "trace"
    lines: list[str] = []
    TRACE.open_file(str(path))
    try:
        for pattern in patterns:
            assert TRACE.enable(pattern)
        yield lines
    finally:
        TRACE.close()
        lines += [line.rstrip() for line in path.read_text().splitlines()]
