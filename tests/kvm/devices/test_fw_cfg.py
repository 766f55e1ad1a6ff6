from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvm.devices.fw_cfg import DmaPorts, FwCfg, GuestAccess
from kvm.errors import KvmError
from qemumig.savevm.devices.fw_cfg import FW_CFG, FwCfgState
from qemumig.savevm.reader import BytesReader

GIB = 1 << 30
READ, SKIP, SELECT, WRITE, ERROR = 2, 4, 8, 16, 1
REQUEST, TARGET = 0x100, 0x1000


class Ram:
    """64 KiB of guest memory."""

    def __init__(self) -> None:
        self.data = bytearray(0x10000)

    def read(self, address: int, length: int) -> bytes:
        self._check(address, length)
        return bytes(self.data[address : address + length])

    def write(self, address: int, data: bytes) -> None:
        self._check(address, len(data))
        self.data[address : address + len(data)] = data

    def _check(self, address: int, length: int) -> None:
        if address + length > len(self.data):
            raise KvmError(14, f"{length} bytes at {address:#x}")


@pytest.fixture
def ram() -> Ram:
    return Ram()


def device(ram: Ram, ram_size: int = 5 * GIB) -> FwCfg:
    return FwCfg(ram_size, 2, 4, GuestAccess(ram.read, ram.write))


def read_key(fw_cfg: FwCfg, key: int, count: int) -> bytes:
    fw_cfg.write(0, 2, key)
    return bytes(fw_cfg.read(1, 1) for _ in range(count))


def request(fw_cfg: FwCfg, ram: Ram, control: int, length: int, target: int = TARGET) -> int:
    """Run one DMA request; its control word afterwards."""
    ram.write(REQUEST, struct.pack(">IIQ", control, length, target))
    ports = DmaPorts(fw_cfg)
    ports.write(0, 4, 0)
    ports.write(4, 4, int.from_bytes(struct.pack(">I", REQUEST), "little"))
    return int.from_bytes(ram.read(REQUEST, 4), "big")


def test_keys_hold_what_a_real_machine_says(ram: Ram) -> None:
    fw_cfg = device(ram)
    assert read_key(fw_cfg, 0, 6) == b"QEMU\0\0"
    assert read_key(fw_cfg, 1, 4) == b"\x03\0\0\0"
    assert read_key(fw_cfg, 3, 8) == struct.pack("<Q", 5 * GIB)
    assert (read_key(fw_cfg, 5, 2), read_key(fw_cfg, 0xF, 2)) == (b"\x02\0", b"\x04\0")


def test_the_directory_lists_files_that_can_be_read_by_their_keys(ram: Ram) -> None:
    fw_cfg = device(ram)
    count = int.from_bytes(read_key(fw_cfg, 0x19, 4), "big")
    entries = [struct.unpack(">IHH56s", read_key(fw_cfg, 0x19, 4 + 64 * count)[4 + 64 * i :][:64]) for i in range(count)]
    files = {name.rstrip(b"\0"): read_key(fw_cfg, key, size + 2) for size, key, _, name in entries}
    assert files[b"etc/boot-fail-wait"] == b"\xff\xff\xff\xff\0\0"
    # What QEMU 10.0 gives a guest of 5 GiB.
    assert files[b"etc/e820"].hex() == (
        "00c0fffe00000000004000000000000002000000"
        "0000000000000000000000c00000000001000000"
        "0000000001000000000000800000000001000000"
        "0000"
    )


def test_ram_below_the_hole_is_one_range(ram: Ram) -> None:
    fw_cfg = device(ram, GIB)
    assert read_key(fw_cfg, 0x23, 42)[20:] == struct.pack("<QQI", 0, GIB, 1) + b"\0\0"


def test_unknown_keys_read_as_zeroes_for_ever(ram: Ram) -> None:
    assert read_key(device(ram), 0x7777, 64) == bytes(64)


def test_only_a_word_selects_and_nothing_else_is_written(ram: Ram) -> None:
    fw_cfg = device(ram)
    read_key(fw_cfg, 0, 1)
    fw_cfg.write(0, 1, 1)
    fw_cfg.write(1, 1, 0x55)
    assert fw_cfg.read(1, 1) == ord("E")
    assert (fw_cfg.read(0, 1), fw_cfg.read(0, 2)) == (0, 0)


def test_the_dma_ports_read_as_text(ram: Ram) -> None:
    ports = DmaPorts(device(ram))
    assert ports.read(0, 4) == int.from_bytes(b"QEMU", "little")
    assert ports.read(4, 4) == int.from_bytes(b" CFG", "little")
    assert ports.read(0, 1) == ord("Q")


def test_dma_selects_skips_and_reads(ram: Ram) -> None:
    fw_cfg = device(ram)
    assert request(fw_cfg, ram, 3 << 16 | SELECT | SKIP, 2) == 0
    assert request(fw_cfg, ram, READ, 4) == 0
    assert ram.read(TARGET, 4) == struct.pack("<Q", 5 * GIB)[2:6]


def test_dma_past_the_end_of_the_data_writes_zeroes(ram: Ram) -> None:
    ram.write(TARGET, b"\xaa" * 8)
    assert request(device(ram), ram, SELECT | READ, 8) == 0
    assert ram.read(TARGET, 8) == b"QEMU\0\0\0\0"


def test_dma_in_one_wide_write_starts_too(ram: Ram) -> None:
    fw_cfg = device(ram)
    ram.write(REQUEST, struct.pack(">IIQ", READ, 4, TARGET))
    DmaPorts(fw_cfg).write(0, 8, int.from_bytes(struct.pack(">Q", REQUEST), "little"))
    assert ram.read(TARGET, 4) == b"QEMU"


@pytest.mark.parametrize("control", [WRITE, WRITE | SELECT])
def test_dma_cannot_write_a_key(ram: Ram, control: int) -> None:
    assert request(device(ram), ram, control, 4) == ERROR


def test_dma_out_of_ram_is_an_error(ram: Ram) -> None:
    assert request(device(ram), ram, READ, 4, 0xFFFE) == ERROR
    assert request(device(ram), ram, READ, 0xFFFFFFFF, 0x8000) == ERROR


def test_a_request_that_is_not_in_ram_changes_nothing(ram: Ram) -> None:
    fw_cfg, before = device(ram), bytes(ram.data)
    ports = DmaPorts(fw_cfg)
    ports.write(0, 4, 0xFFFFFFFF)
    ports.write(4, 4, 0xFFFFFFFF)
    assert bytes(ram.data) == before
    assert fw_cfg.save() == FwCfgState()


def test_reading_goes_on_where_the_source_was(ram: Ram) -> None:
    source, destination = device(ram), device(ram)
    read_key(source, 3, 3)
    destination.load(source.save())
    rest = [bytes(one.read(1, 1) for _ in range(6)) for one in (source, destination)]
    assert rest[0] == rest[1] == struct.pack("<Q", 5 * GIB)[3:] + b"\0"


@given(st.integers(0, 0xFFFF), st.integers(0, 0xFFFFFFFF), st.integers(0, (1 << 64) - 1))
def test_any_record_is_kept_and_never_harms(key: int, offset: int, dma_address: int) -> None:
    ram = Ram()
    fw_cfg = device(ram)
    record = FwCfgState(key, offset, dma_address)
    wire, _ = FW_CFG.save(record)
    fw_cfg.load(FW_CFG.load(BytesReader(wire), 2))
    assert fw_cfg.save() == record
    assert fw_cfg.read(1, 1) in range(256)


def test_reset_selects_the_signature(ram: Ram) -> None:
    fw_cfg = device(ram)
    read_key(fw_cfg, 3, 3)
    fw_cfg.reset()
    assert fw_cfg.save() == FwCfgState()
