"""kvm.paging: every way in which a vCPU translates addresses."""

import struct

import pytest

from kvm.paging import CR0_PG, CR4_LA57, CR4_PAE, CR4_PSE, EFER_LMA, ControlRegisters, translate

PRESENT, LARGE = 1, 0x80


class Tables:
    """Guest-physical memory with page tables in it."""

    def __init__(self, entry_size):
        self.memory = bytearray(1 << 20)
        self._form = {4: "<I", 8: "<Q"}[entry_size]

    def put(self, table, index, value):
        struct.pack_into(self._form, self.memory, table + index * struct.calcsize(self._form), value)

    def read(self, address, size):
        return bytes(self.memory[address : address + size]).ljust(size, b"\0")


def registers(cr3=0x1000, cr4=0, efer=0, cr0=CR0_PG):
    return ControlRegisters(cr0, cr3, cr4, efer)


def test_without_paging_an_address_is_itself():
    assert translate(registers(cr0=0), Tables(8).read, 0x1_2345_6789) == 0x2345_6789


def test_two_levels_with_small_and_large_pages():
    tables = Tables(4)
    tables.put(0x1000, 0, 0x2000 | PRESENT)
    tables.put(0x2000, 5, 0x77000 | PRESENT)
    tables.put(0x1000, 1, 0x00C00000 | 3 << 13 | PRESENT | LARGE)
    assert translate(registers(), tables.read, 0x5123) == 0x77123
    assert translate(registers(cr4=CR4_PSE), tables.read, 0x412345) == 3 << 32 | 0xC12345
    assert translate(registers(), tables.read, 0x6000) is None
    assert translate(registers(), tables.read, 0x800000) is None


def test_three_levels():
    tables = Tables(8)
    tables.put(0x1020, 1, 0x2000 | PRESENT)
    tables.put(0x2000, 0, 0x3000 | PRESENT)
    tables.put(0x3000, 2, 0x9_8765_4000 | PRESENT)
    tables.put(0x2000, 1, 0x8_0020_0000 | PRESENT | LARGE)
    pae = registers(cr3=0x1020, cr4=CR4_PAE)
    assert translate(pae, tables.read, 0x4000_2FFF) == 0x9_8765_4FFF
    assert translate(pae, tables.read, 0x4020_0123) == 0x8_0020_0123
    assert translate(pae, tables.read, 0) is None


@pytest.mark.parametrize("levels", [4, 5])
def test_long_mode_with_all_page_sizes(levels):
    tables = Tables(8)
    top = 0x1000
    if levels == 5:
        tables.put(0x1000, 0x1FF, 0x8000 | PRESENT)
        tables.put(0x1000, 0, 0x8000 | PRESENT)
        top = 0x8000
    tables.put(top, 0x1FF, 0x2000 | PRESENT)
    tables.put(0x2000, 0, 0x3000 | PRESENT)
    tables.put(0x2000, 1, 0x40_0000_0000 | PRESENT | LARGE)
    tables.put(0x3000, 0, 0x4000 | PRESENT)
    tables.put(0x3000, 1, 0x60_0000 | PRESENT | LARGE | 1 << 63)
    tables.put(0x4000, 1, 0x5000 | PRESENT)
    long = registers(cr4=CR4_PAE | (CR4_LA57 if levels == 5 else 0), efer=EFER_LMA)
    base = 0xFFFF_FF80_0000_0000
    assert translate(long, tables.read, base + 0x1234) == 0x5234
    assert translate(long, tables.read, base + 0x20_0042) == 0x60_0042
    assert translate(long, tables.read, base + 0x4000_0042) == 0x40_0000_0042
    assert translate(long, tables.read, base + 0x2000) is None
    assert translate(long, tables.read, 0x0100_0000_0000_0000) is None, "not canonical"
