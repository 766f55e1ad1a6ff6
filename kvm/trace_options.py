"""-trace [enable=]PATTERN[,events=FILE][,file=FILE]: which events are traced, and where to (cli.md §7).

A pattern that begins with a dash switches off.  A file of events has one pattern a line; `#` begins a comment.
"""

from __future__ import annotations

from collections.abc import Iterable

from qemumig.trace import Trace

from .chardev import reason
from .diagnostics import Diagnostics


def start_tracing(events: Trace, requests: Iterable[tuple[str, dict[str, str | None]]], diagnostics: Diagnostics) -> bool:
    """Do what -trace asked for: *requests*, each as it was typed and by its keys; False, and a message, on failure."""
    events.timestamps = diagnostics.timestamps
    for text, keys in requests:
        if not trace_to(events, keys.get("file"), diagnostics):
            return False
        if not _read_patterns(events, keys.get("events"), diagnostics):
            return False
        if pattern := keys.get("enable"):
            _switch(events, pattern, f" -trace {text}", diagnostics)
    return True


def trace_to(events: Trace, path: str | None, diagnostics: Diagnostics) -> bool:
    """Let lines go to the end of file *path*, if that is said; False, and a message, when it cannot be opened."""
    try:
        if path:
            events.open_file(path)
    except OSError as error:
        diagnostics.say(f"Error opening logfile {path}: {reason(error)}")
        return False
    return True


def _read_patterns(events: Trace, path: str | None, diagnostics: Diagnostics) -> bool:
    if not path:
        return True
    try:
        with open(path, errors="surrogateescape") as file:
            lines = file.read().splitlines()
    except OSError as error:
        diagnostics.say_at(path, reason(error))
        return False
    for number, line in enumerate(lines, 1):
        if pattern := line.partition("#")[0].strip():
            _switch(events, pattern, f"{path}:{number}", diagnostics)
    return True


def _switch(events: Trace, pattern: str, place: str, diagnostics: Diagnostics) -> None:
    name = pattern.removeprefix("-")
    if not events.enable(name, name == pattern):
        diagnostics.say_at(place, f"warning: trace event '{name}' does not exist")
