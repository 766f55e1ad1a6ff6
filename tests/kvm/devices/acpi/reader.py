"""Another hand's reading of the ACPI files: what a firmware does with them, and what an interpreter finds in the AML.

Written from the specification; nothing of the writer's is used.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

COMMAND = 128


class Firmware:
    """Runs the loader's script on *files*: `memory` holds each where it was put, `rsdp` is the RSDP's address."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.memory: dict[str, bytearray] = {}
        self.address: dict[str, int] = {}
        script = files["etc/table-loader"]
        assert len(script) % COMMAND == 0
        for start in range(0, len(script), COMMAND):
            self._run(script[start : start + COMMAND], files)
        self.rsdp = self.address["etc/acpi/rsdp"]

    def _run(self, command: bytes, files: dict[str, bytes]) -> None:
        (kind,) = struct.unpack_from("<I", command)
        name = _name(command[4:60])
        if kind == 1:
            alignment, zone = struct.unpack_from("<IB", command, 60)
            self.address[name] = (0xF0000 if zone == 2 else 0x3000000) + alignment
            assert self.address[name] % alignment == 0 and name not in self.memory
            self.memory[name] = bytearray(files[name])
        elif kind == 2:
            offset, size = struct.unpack_from("<IB", command, 116)
            place = slice(offset, offset + size)
            old = int.from_bytes(self.memory[name][place], "little")
            target = _name(command[60:116])
            assert old < len(self.memory[target])
            self.memory[name][place] = (old + self.address[target]).to_bytes(size, "little")
        else:
            assert kind == 3
            at, start, length = struct.unpack_from("<III", command, 60)
            assert start <= at < start + length <= len(self.memory[name])
            self.memory[name][at] = -sum(self.memory[name][start : start + length]) & 0xFF

    def read(self, address: int, length: int) -> bytes:
        for name, content in self.memory.items():
            offset = address - self.address[name]
            if offset >= 0 and offset + length <= len(content):
                return bytes(content[offset : offset + length])
        raise AssertionError(f"{length} bytes at {address:#x} are in no file")

    def table(self, address: int) -> bytes:
        """A table with its header, its checksum verified."""
        (length,) = struct.unpack("<I", self.read(address + 4, 4))
        table = self.read(address, length)
        assert sum(table) & 0xFF == 0, table[:4]
        return table

    def tables(self) -> dict[str, bytes]:
        """What an operating system finds, from the RSDP on."""
        rsdp = self.read(self.rsdp, 36)
        assert rsdp[:8] == b"RSD PTR " and rsdp[15] == 2
        assert sum(rsdp[:20]) & 0xFF == sum(rsdp) & 0xFF == 0
        length, xsdt_address = struct.unpack_from("<IQ", rsdp, 20)
        assert length == 36
        xsdt = self.table(xsdt_address)
        entries = struct.unpack(f"<{(len(xsdt) - 36) // 8}Q", xsdt[36:])
        found = {"XSDT": xsdt} | {table[:4].decode(): table for table in map(self.table, entries)}
        (dsdt_32,) = struct.unpack_from("<I", found["FACP"], 40)
        (dsdt_64,) = struct.unpack_from("<Q", found["FACP"], 140)
        assert dsdt_32 == dsdt_64
        return found | {"DSDT": self.table(dsdt_64)}


def _name(field: bytes) -> str:
    return field.rstrip(b"\0").decode()


@dataclass
class Device:
    """A device in the namespace: its named values, its methods' bodies, its fields."""

    names: dict[str, object] = field(default_factory=dict)
    methods: dict[str, bytes] = field(default_factory=dict)
    fields: dict[str, int] = field(default_factory=dict)  # name: bits
    regions: dict[str, tuple[int, int, int]] = field(default_factory=dict)


class Aml:
    """Walks definitions; `devices` by full path, `names` of the root."""

    def __init__(self, code: bytes) -> None:
        self.code = code
        self.devices: dict[str, Device] = {}
        self.root = Device()
        self._walk(0, len(code), "", self.root)

    def _walk(self, at: int, end: int, scope: str, owner: Device) -> None:
        while at < end:
            at = self._object(at, scope, owner)
        assert at == end, f"an object ends at {at:#x}, its container at {end:#x}"

    def _object(self, at: int, scope: str, owner: Device) -> int:
        code = self.code
        if code[at] == 0x08:
            name, at = self._path(at + 1, scope)
            owner.names[name.rpartition(".")[2]], at = self._value(at)
            return at
        if code[at] in (0x10, 0x14):
            end, start = self._length(at + 1)
            name, inner = self._path(start, scope)
            if code[at] == 0x10:
                self._walk(inner, end, name, owner)
            else:
                owner.methods[name.rpartition(".")[2]] = code[inner:end]
            return end
        assert code[at] == 0x5B, f"unknown object {code[at]:#x} at {at:#x}"
        if code[at + 1] == 0x80:
            name, at = self._path(at + 2, scope)
            space = code[at]
            address, at = self._value(at + 1)
            length, at = self._value(at)
            assert isinstance(address, int) and isinstance(length, int)
            owner.regions[name.rpartition(".")[2]] = space, address, length
            return at
        end, start = self._length(at + 2)
        name, inner = self._path(start, scope)
        if code[at + 1] == 0x82:
            device = self.devices[name] = Device()
            self._walk(inner, end, name, device)
        else:
            assert code[at + 1] == 0x81
            assert code[inner] & 0x0F == 3  # by double words
            bits, after = self._bits(inner + 5)
            owner.fields[code[inner + 1 : inner + 5].decode()] = bits
            assert after == end
        return end

    def _path(self, at: int, scope: str) -> tuple[str, int]:
        absolute = self.code[at] == 0x5C
        at += absolute
        segment = self.code[at : at + 4].decode()
        assert segment[0].isalpha() or segment[0] == "_"
        return (f"\\{segment}" if absolute or not scope else f"{scope}.{segment}"), at + 4

    def _bits(self, at: int) -> tuple[int, int]:
        lead = self.code[at]
        more = lead >> 6
        if not more:
            return lead & 0x3F, at + 1
        value = lead & 0x0F
        for number in range(more):
            value |= self.code[at + 1 + number] << 4 + 8 * number
        return value, at + 1 + more

    def _length(self, at: int) -> tuple[int, int]:
        """Where the object ends, and where its content begins."""
        length, start = self._bits(at)
        return at + length, start

    def _value(self, at: int) -> tuple[object, int]:
        code, kind = self.code, self.code[at]
        if kind in (0, 1):
            return kind, at + 1
        if kind in (0x0A, 0x0B, 0x0C):
            size = 1 << kind - 0x0A
            return int.from_bytes(code[at + 1 : at + 1 + size], "little"), at + 1 + size
        if kind == 0x0D:
            end = code.index(b"\0", at)
            return code[at + 1 : end].decode(), end + 1
        end, start = self._length(at + 1)
        if kind == 0x11:
            size, start = self._value(start)
            assert size == end - start
            return list(resources(code[start:end])), end
        assert kind == 0x12, f"unknown value {kind:#x} at {at:#x}"
        count, at = code[start], start + 1
        elements = []
        while at < end:
            element, at = self._value(at)
            elements.append(element)
        assert at == end and len(elements) == count
        return elements, end


def resources(data: bytes) -> Iterator[tuple]:
    """(kind, what …) of each descriptor; the end tag is there, and last."""
    at = 0
    while data[at] != 0x79:
        if data[at] & 0x80:
            kind, (length,) = data[at], struct.unpack_from("<H", data, at + 1)
            body = data[at + 3 : at + 3 + length]
            at += 3 + length
        else:
            kind, length = data[at] >> 3, data[at] & 7
            body = data[at + 1 : at + 1 + length]
            at += 1 + length
        if kind == 0x08:
            decode, low, high, _, count = struct.unpack("<BHHBB", body)
            assert decode == 1 and low == high
            yield "io", low, count
        elif kind == 0x04:
            yield "irq", int.from_bytes(body[:2], "little").bit_length() - 1
        elif kind == 0x86:
            yield "memory", *struct.unpack("<xII", body)
        else:
            assert kind == 0x89 and body[1] == 1
            yield "interrupt", int.from_bytes(body[2:6], "little"), "edge" if body[0] & 2 else "level"
    assert at == len(data) - 2
