"""QEMU's way of writing options: comma-separated lists, switches, sizes (cli.md §1).

    "q35,accel=kvm,,x,usb"  with implied key "type"   →  [("type", "q35"), ("accel", "kvm,x"), ("usb", None)]

`,,` is a comma inside a value; a trailing comma is ignored; None stands for a key without a value.  All errors are
UsageErrors; whoever knows the option puts its name in front (`UsageError.during`).
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable

UINT64_MAX = (1 << 64) - 1
IDENTIFIER = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")
NUMBER = re.compile(r"(0[xX][0-9a-fA-F]+|[0-9]+(?:\.[0-9]*)?|\.[0-9]+)([bBkKmMgGtTpPeE]?)")
UNITS = {suffix: 1024**power for power, suffix in enumerate("bkmgtpe")}
SIZE_HINT = (
    "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-",
    "and exabytes, respectively.",
)
IDENTIFIER_HINT = "Identifiers consist of letters, digits, '-', '.', '_', starting with a letter."


class UsageError(Exception):
    """The command line asks for something that cannot be done.

    *messages* are printed one a line, each after the program's name; *hints* follow as they are.  A *complete* one
    says by itself what it is about.
    """

    def __init__(self, *messages: str, hints: Iterable[str] = (), complete: bool = False) -> None:
        super().__init__("; ".join(messages))
        self.messages = messages
        self.hints = tuple(hints)
        self.complete = complete

    def during(self, option: str) -> UsageError:
        """The same error, said to be about *option* ("-m 16X")."""
        if self.complete:
            return self
        return UsageError(*(f"{option}: {text}" for text in self.messages), hints=self.hints)


def split(text: str, implied_key: str = "") -> list[tuple[str, str | None]]:
    """*text* as key and value pairs in order; a first element without "=" is the value of *implied_key*."""
    pairs: list[tuple[str, str | None]] = []
    for index, element in enumerate(_elements(text)):
        key, equals, value = element.partition("=")
        if index == 0 and not equals and implied_key:
            pairs.append((implied_key, element))
        else:
            pairs.append((key, value if equals else None))
    return pairs


def _elements(text: str) -> list[str]:
    """*text* cut at single commas; doubled ones become one, a trailing one is dropped."""
    parts = [part.replace("\0", ",") for part in text.replace(",,", "\0").split(",")]
    if parts[-1] == "":
        parts.pop()
    return parts


def switch(key: str, value: str | None) -> bool:
    """The meaning of "on" or "off"; a key alone counts as on."""
    if value in (None, "on", "yes", "true", "y"):
        return True
    if value in ("off", "no", "false", "n"):
        return False
    raise UsageError(f"Parameter '{key}' expects 'on' or 'off'")


def choice(key: str, value: str | None, allowed: Container[str]) -> str:
    """*value* when it is one of *allowed*."""
    if value is None or value not in allowed:
        raise UsageError(f"Parameter '{key}' does not accept value '{value or ''}'")
    return value


def size(key: str, value: str | None, default_unit: str = "b") -> int:
    """A number of bytes such as "64M", "1.5G" or "0x1000"; a bare number counts in *default_unit*."""
    text = value or ""
    if re.fullmatch(r"-[0-9]+", text):
        raise UsageError(f"Value '{text}' is out of range for parameter '{key}'")
    match = NUMBER.fullmatch(text)
    if match is None or ("." in text and not match.group(2)):
        raise UsageError(f"Parameter '{key}' expects a non-negative number below 2^64", hints=SIZE_HINT)
    digits, suffix = match.groups()
    unit = UNITS[(suffix or default_unit).lower()]
    if digits[:2] in ("0x", "0X"):
        result = int(digits, 16) * unit
    else:
        whole, _, fraction = digits.partition(".")
        result = int(whole or "0") * unit
        if fraction:
            result += int(fraction) * unit // 10 ** len(fraction)
    if result > UINT64_MAX:
        raise UsageError(f"Value '{text}' is out of range for parameter '{key}'")
    return result


def integer(key: str, value: str | None) -> int:
    """A decimal or 0x… integer, which may be negative."""
    try:
        return int(value or "", 0)
    except ValueError:
        raise UsageError(f"Parameter '{key}' expects integer") from None


def identifier(key: str, value: str | None) -> str:
    """A name that things on the command line are called by."""
    if value is None or not IDENTIFIER.fullmatch(value):
        raise UsageError(f"Parameter '{key}' expects an identifier", hints=(IDENTIFIER_HINT,))
    return value


def unique(pairs: Iterable[tuple[str, str | None]], allowed: Iterable[str]) -> dict[str, str | None]:
    """*pairs* as a dictionary, the last of equal keys winning; a key that is not in *allowed* is an error.

    `nofoo` without a value is `foo=off`.
    """
    known = set(allowed)
    result: dict[str, str | None] = {}
    for key, value in pairs:
        if value is None and key not in known and key.startswith("no") and key[2:] in known:
            key, value = key[2:], "off"
        if key not in known:
            raise UsageError(f"Invalid parameter '{key}'")
        result[key] = value
    return result
