from __future__ import annotations

import struct

from kvm.config import Chipset
from kvm.devices.fdt import build

Tree = dict[str, dict[str, bytes]]


def read(data: bytes) -> Tree:
    """Properties of the root ("") and of its children, by the specification and nothing else."""
    magic, total, structure, strings, reserved, version, compatible, _, strings_size, structure_size = struct.unpack_from(
        ">10I", data
    )
    assert (magic, total, version, compatible) == (0xD00DFEED, len(data), 17, 16)
    assert data[reserved : reserved + 16] == bytes(16) and reserved % 8 == structure % 4 == 0
    assert strings + strings_size == total and structure + structure_size == strings
    found: Tree = {}
    path: list[str] = []
    at = structure

    def word() -> int:
        nonlocal at
        at += 4
        return struct.unpack_from(">I", data, at - 4)[0]

    while (token := word()) != 9:
        if token == 1:
            end = data.index(b"\0", at)
            path.append(data[at:end].decode())
            found[path[-1]] = {}
            at += (end - at) // 4 * 4 + 4
        elif token == 2:
            path.pop()
        else:
            assert token == 3
            length, name = word(), strings + word()
            found[path[-1]][data[name : data.index(b"\0", name)].decode()] = data[at : at + length]
            at += -(-length // 4) * 4
    assert path == [] and at == structure + structure_size
    return found


def cells(*values: int) -> bytes:
    return struct.pack(f">{len(values)}I", *values)


def test_the_smallest_machine() -> None:
    tree = read(build(Chipset(), False, []))
    assert list(tree) == ["", "ioapic1@fec00000", "chosen"]
    assert tree[""]["compatible"] == b"linux,microvm\0"
    assert tree["chosen"] == {}


def test_every_device_is_there_and_says_where_it_interrupts() -> None:
    tree = read(build(Chipset(acpi=True, ioapic2=True, rtc=True), True, [23, 2]))
    assert tree["rtc@70"]["interrupts"] == cells(8, 0)
    assert tree["serial@3f8"]["reg"] == struct.pack(">QQ", 0x3F8, 8)
    disk = tree["virtio_mmio@feb02e00"]
    assert disk["interrupt-parent"] == tree["ioapic2@fec10000"]["phandle"]
    assert disk["interrupts"] == cells(23, 1)
    assert disk["reg"] == struct.pack(">QQ", 0xFEB02E00, 0x200)
    assert "virtio_mmio@feb00400" in tree
    assert tree["chosen"] == {"stdout-path": b"/serial@3f8\0"}


def test_slots_lead_to_the_first_ioapic_when_there_is_no_second() -> None:
    for chipset, pin in ((Chipset(), 5), (Chipset(acpi=True), 16)):
        tree = read(build(chipset, True, [3]))
        disk = tree["virtio_mmio@feb00600"]
        assert disk["interrupt-parent"] == tree["ioapic1@fec00000"]["phandle"]
        assert disk["interrupts"] == cells(pin + 3, 1)
