"""The device tree: what the machine is, for a guest without ACPI, as fw_cfg's file etc/fdt.

    header    10 big-endian words    magic, size, offsets of structure, strings and reservations, versions, cpu, sizes
    reserved  one empty entry
    structure 1 name … begins a node   3 length, name's offset, value   2 ends a node   9 ends the tree
    strings   names of properties, each once

It names the interrupt controllers, the serial port, the clock, and the virtio-mmio slots that have a device.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from ..config import Chipset
from . import ioapic, irqchip, rtc, serial, virtio_mmio

_MAGIC, _VERSION, _COMPATIBLE_VERSION = 0xD00DFEED, 17, 16
_BEGIN, _END, _PROPERTY, _END_OF_TREE = (struct.pack(">I", token) for token in (1, 2, 3, 9))
_HEADER, _RESERVED = struct.Struct(">10I"), bytes(16)
_FIRST, _SECOND = 1, 2  # phandles of the I/O APICs
_EDGE, _LEVEL = 0, 1  # the second cell of an interrupt
_PINS = 24

Node = tuple[str, dict[str, bytes]]


def build(chipset: Chipset, isa_serial: bool, disks: Sequence[int]) -> bytes:
    """The tree; *disks*: slots of virtio-mmio with a device."""
    children = [_ioapic("ioapic1", irqchip.IOAPIC_ADDRESS, 0x1000, _FIRST)]
    if chipset.ioapic2:
        children.append(_ioapic("ioapic2", *ioapic.ADDRESS, _SECOND))
    if chipset.rtc:
        children.append(_device("rtc", "motorola,mc146818", *rtc.PORTS, rtc.GSI))
    chosen = {}
    if isa_serial:
        children.append(_device("serial", "ns16550", *serial.PORTS, serial.GSI))
        chosen["stdout-path"] = _text(f"/serial@{serial.PORTS[0]:x}")
    for slot in sorted(disks):
        address, gsi = virtio_mmio.slot_address(slot), chipset.first_virtio_gsi + slot
        children.append(_device("virtio_mmio", "virtio,mmio", address, virtio_mmio.SLOT_SIZE, gsi, _LEVEL))
        children[-1][1]["dma-coherent"] = b""
    children.append(("chosen", chosen))
    root = {"compatible": _text("linux,microvm"), "#address-cells": _cells(2), "#size-cells": _cells(2)}
    return _encode(root, children)


def _ioapic(name: str, address: int, length: int, phandle: int) -> Node:
    return f"{name}@{address:x}", {
        "compatible": _text("intel,ce4100-ioapic"),
        "interrupt-controller": b"",
        "#interrupt-cells": _cells(2),
        "#address-cells": _cells(2),
        "reg": struct.pack(">QQ", address, length),
        "phandle": _cells(phandle),
    }


def _device(name: str, compatible: str, address: int, length: int, gsi: int, trigger: int = _EDGE) -> Node:
    return f"{name}@{address:x}", {
        "compatible": _text(compatible),
        "reg": struct.pack(">QQ", address, length),
        "interrupt-parent": _cells(_FIRST if gsi < _PINS else _SECOND),
        "interrupts": _cells(gsi % _PINS, trigger),
    }


def _cells(*values: int) -> bytes:
    return struct.pack(f">{len(values)}I", *values)


def _text(text: str) -> bytes:
    return text.encode() + b"\0"


def _encode(root: dict[str, bytes], children: list[Node]) -> bytes:
    """Properties of the root and its children, which have no children of their own."""
    strings = bytearray()
    offsets: dict[str, int] = {}

    def properties(values: dict[str, bytes]) -> bytes:
        encoded = b""
        for name, value in values.items():
            if name not in offsets:
                offsets[name] = len(strings)
                strings.extend(_text(name))
            encoded += _PROPERTY + _cells(len(value), offsets[name]) + _padded(value)
        return encoded

    structure = _BEGIN + _padded(b"\0") + properties(root)
    for name, values in children:
        structure += _BEGIN + _padded(_text(name)) + properties(values) + _END
    structure += _END + _END_OF_TREE
    start = _HEADER.size + len(_RESERVED)
    end = start + len(structure)
    sizes = len(strings), len(structure)
    places = end + len(strings), start, end, _HEADER.size
    return _HEADER.pack(_MAGIC, *places, _VERSION, _COMPATIBLE_VERSION, 0, *sizes) + _RESERVED + structure + strings


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
