"""AML, the bytecode of ACPI's definition blocks, as far as the machine needs it (ACPI 5.0, chapter 20; resources: 6.4).

Every function gives bytes; what contains others takes them as arguments:

    scope("\\_SB_", device("COM1", name("_HID", eisa_id("PNP0501")), name("_CRS", resources(io_ports(0x3F8, 8), irq(4)))))
"""

from __future__ import annotations

import struct

_NAME, _PACKAGE, _BUFFER, _METHOD, _SCOPE = b"\x08", b"\x12", b"\x11", b"\x14", b"\x10"
_DEVICE, _OPERATION_REGION, _FIELD = b"\x5b\x82", b"\x5b\x80", b"\x5b\x81"
_STRING, _BYTE, _WORD, _DWORD = b"\x0d", b"\x0a", b"\x0b", b"\x0c"
_STORE, _AND, _EQUAL, _IF, _NOTIFY = b"\x70", b"\x7b", b"\x93", b"\xa0", b"\x86"
LOCAL0 = b"\x60"
_SYSTEM_MEMORY = b"\x00"
_DWORD_ACCESS_WRITE_ZEROES = b"\x43"  # no lock
_SERIALIZED = 8

_NAME_SIZE = 4
_LONGEST_SHORT_LENGTH = 63


def path(text: str) -> bytes:
    """A name of up to four characters, from the root with a backslash in front."""
    segment = text.removeprefix("\\")
    if not 0 < len(segment) <= _NAME_SIZE:
        raise ValueError(f"AML name {text!r} has {len(segment)} characters, expected 1 to {_NAME_SIZE}")
    return text[: -len(segment)].encode() + segment.ljust(_NAME_SIZE, "_").encode()


def integer(value: int) -> bytes:
    """A constant of up to 32 bits."""
    if value in (0, 1):
        return bytes((value,))
    if value < 1 << 8:
        return _BYTE + bytes((value,))
    return _WORD + struct.pack("<H", value) if value < 1 << 16 else _DWORD + struct.pack("<I", value)


def string(text: str) -> bytes:
    """ASCII text."""
    return _STRING + text.encode("ascii") + b"\0"


def eisa_id(text: str) -> bytes:
    """A plug-and-play id, three letters and four hexadecimal digits, packed into an integer."""
    letters = [ord(letter) - 0x40 for letter in text[:3]]
    packed = letters[0] << 26 | letters[1] << 21 | letters[2] << 16 | int(text[3:], 16)
    return _DWORD + struct.pack(">I", packed)


def name(text: str, value: bytes) -> bytes:
    """A named object."""
    return _NAME + path(text) + value


def package(*elements: bytes) -> bytes:
    """A list of objects."""
    return _PACKAGE + _sized(bytes((len(elements),)) + b"".join(elements))


def scope(text: str, *contents: bytes) -> bytes:
    """Contents that belong to an object that exists already."""
    return _SCOPE + _sized(path(text) + b"".join(contents))


def device(text: str, *contents: bytes) -> bytes:
    """A device and what is known of it."""
    return _DEVICE + _sized(path(text) + b"".join(contents))


# -- a register in memory, and a method that reads it


def memory_region(text: str, address: int, length: int) -> bytes:
    """Memory, by a name."""
    return _OPERATION_REGION + path(text) + _SYSTEM_MEMORY + integer(address) + integer(length)


def dword_field(region: str, text: str) -> bytes:
    """The first 32 bits of a region, by a name of their own."""
    return _FIELD + _sized(path(region) + _DWORD_ACCESS_WRITE_ZEROES + path(text) + _length(32, itself=False))


def method(text: str, arguments: int, *statements: bytes) -> bytes:
    """A method that one thread at a time runs."""
    return _METHOD + _sized(path(text) + bytes((arguments | _SERIALIZED,)) + b"".join(statements))


def store(source: bytes, target: bytes) -> bytes:
    """target = source"""
    return _STORE + source + target


def when_set(value: bytes, bit: int, *statements: bytes) -> bytes:
    """If the bit (a mask) of *value* is set: the statements."""
    masked = _AND + value + integer(bit) + b"\0"  # the result goes nowhere else
    return _IF + _sized(_EQUAL + masked + integer(bit) + b"".join(statements))


def notify(text: str, value: int) -> bytes:
    """Tell the driver of a device."""
    return _NOTIFY + path(text) + integer(value)


# -- resources


def resources(*descriptors: bytes) -> bytes:
    """A resource template; the end tag's checksum of zero counts as right."""
    content = b"".join(descriptors) + b"\x79\x00"
    return _BUFFER + _sized(integer(len(content)) + content)


def io_ports(first: int, count: int) -> bytes:
    """Ports that are decoded with all 16 bits, at one place only."""
    return struct.pack("<BBHHBB", 0x47, 1, first, first, 1, count)


def irq(number: int) -> bytes:
    """An ISA interrupt: an edge, high, not shared."""
    return struct.pack("<BH", 0x22, 1 << number)


def memory32(address: int, length: int) -> bytes:
    """Registers in memory, below 4 GiB, to be read and written."""
    return struct.pack("<BHBII", 0x86, 9, 1, address, length)


def interrupt(gsi: int, *, edge: bool) -> bytes:
    """A global interrupt, consumed, high, not shared."""
    return struct.pack("<BHBBI", 0x89, 6, 1 | edge << 1, 1, gsi)


# -- lengths


def _sized(content: bytes) -> bytes:
    """*content* behind its length."""
    return _length(len(content), itself=True) + content


def _length(value: int, *, itself: bool) -> bytes:
    """A package length of one to four bytes, which counts its own bytes too when *itself*."""
    if value + itself <= _LONGEST_SHORT_LENGTH:
        return bytes((value + itself,))
    for more in (1, 2, 3):  # bytes after the first, whose low half has the lowest four bits
        total = value + (1 + more) * itself
        if total < 1 << 4 + 8 * more:
            return bytes((more << 6 | total & 0x0F,)) + (total >> 4).to_bytes(more, "little")
    raise ValueError(f"an AML object of {value:#x} bytes is too long, expected less than {1 << 28:#x}")
