"""Values and names as people read them: numbers with their hexadecimal form, buffers as text or bytes.

What a recording holds was chosen by somebody else: nothing unprintable reaches a terminal.
"""

from __future__ import annotations

import dataclasses

from ...savevm.commands import Command
from ...savevm.vmdesc import DescribedField

_SHOWN_BYTES = 32
_NOT_ARMED = (1 << 64) - 1
_NUMBERS = ("int", "uint", "bool", "more")


def printable(text: str) -> str:
    """*text* with everything escaped that a terminal would not show as it is."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def is_number(field: DescribedField) -> bool:
    """Whether the type of *field* says that its bytes are one number."""
    return field.type.startswith(_NUMBERS) and 0 < len(field.data) <= 8


def shown(field: DescribedField) -> str:
    """The value of a field in one line."""
    data = field.data
    if field.type == "subsection":
        return f"version {int.from_bytes(data[-4:], 'big')}"
    if field.type == "timer" and len(data) == 8:
        return "not armed" if field.value == _NOT_ARMED else f"{field.value} ns"
    if is_number(field):
        return str(field.value) if -10 < field.value < 10 else f"{field.value} ({field.value:#x})"
    if not any(data):
        return f"{len(data)} zero bytes" if len(data) > 1 else data.hex()
    text = data.rstrip(b"\0")
    if len(text) > 2 and all(0x20 <= one < 0x7F for one in text):
        return repr(text.decode("ascii"))
    dots = f" … ({len(data)} bytes)" if len(data) > _SHOWN_BYTES else ""
    return data[:_SHOWN_BYTES].hex(" ") + dots


def command_text(command: Command) -> str:
    """A command by its name and what it carries."""
    name = command.type.name.removeprefix("MIG_CMD_")
    parts = []
    for one in dataclasses.fields(command):
        value = getattr(command, one.name)
        if one.name == "ranges":
            value = ", ".join(f"{start:#x}+{length:#x}" for start, length in value)
        if value is not None:
            parts.append(f"{one.name} {printable(str(value))}")
    return "  ".join([name, *parts])


def thousands(count: int) -> str:
    """A count with separators."""
    return f"{count:,}".replace(",", " ")
