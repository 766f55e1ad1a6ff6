from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import Any

import pytest

from kvm.devices.acpi.tables import LOADER, RSDP, TABLES
from kvm.devices.blobs import Blobs, LogWithBlobs
from kvm.devices.fw_cfg import FwCfg, GuestAccess
from qemumig.errors import MachineError
from qemumig.ram.block import RAMBlock
from qemumig.savevm.devices.fw_cfg import AcpiBlobs, FwCfgState

PAGE = 4096
CONTENTS = {TABLES: b"t" * 5000, LOADER: b"l" * 1664, RSDP: b"r" * 36}
DIRECTORY = 0x19


class PlainLog:
    """The log of guest memory: every page of a block is always dirty."""

    manual_clear = True

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    def start(self) -> None:
        self.told.append(("start",))

    def stop(self) -> None:
        self.told.append(("stop",))

    def fetch(self, block: RAMBlock, words: memoryview) -> None:
        self.told.append(("fetch", block.idstr))

    def clear(self, block: RAMBlock, first_page: int, page_count: int) -> None:
        self.told.append(("clear", block.idstr))

    def mark(self, block: RAMBlock, offset: int, length: int) -> None:
        self.told.append(("mark", block.idstr))


@pytest.fixture
def blobs() -> Iterator[Blobs]:
    blobs = Blobs(CONTENTS)
    yield blobs
    blobs.close()
    blobs.close()


def contents(blobs: Blobs) -> dict[str, bytes]:
    return {blob.name: blob.read(0, 1 << 30) for blob in blobs.files}


def test_blocks_have_the_names_and_lengths_of_a_real_qemus(blobs: Blobs) -> None:
    assert [(block.idstr, block.used_length, block.max_length) for block in blobs.blocks] == [
        ("/rom@etc/acpi/tables", 2 * PAGE, 0x200000),
        ("/rom@etc/table-loader", PAGE, 0x10000),
        ("/rom@etc/acpi/rsdp", PAGE, 0x1000),
    ]
    assert all(block.fresh and block.anonymous for block in blobs.blocks)


def test_they_are_empty_until_they_are_filled(blobs: Blobs) -> None:
    assert contents(blobs) == dict.fromkeys(CONTENTS, b"")
    blobs.fill()
    assert contents(blobs) == CONTENTS
    assert not any(block.fresh for block in blobs.blocks)


def test_a_read_ends_with_the_file(blobs: Blobs) -> None:
    blobs.fill()
    tables = blobs.files[0]
    assert tables.read(4990, 100) == b"t" * 10
    assert tables.read(5000, 100) == tables.read(1 << 31, 1) == b""


def test_sizes_travel_with_fw_cfg(blobs: Blobs) -> None:
    blobs.fill()
    assert blobs.save() == AcpiBlobs(5000, 1664, 36)
    blobs.load(AcpiBlobs(6000, 100, PAGE))
    assert [blob.size for blob in blobs.files] == [6000, 100, PAGE]
    assert blobs.files[0].read(4999, 2) == b"t\0"
    blobs.load(None)
    assert [blob.size for blob in blobs.files] == [2 * PAGE, PAGE, PAGE]
    assert blobs.save() is None


def test_a_stream_cannot_make_a_file_longer_than_its_block(blobs: Blobs) -> None:
    blobs.fill()
    with pytest.raises(
        MachineError, match=r"file etc/acpi/rsdp has 0x1001 bytes, expected at most the 0x1000 of RAM block"
    ):
        blobs.load(AcpiBlobs(1, 1, PAGE + 1))
    assert contents(blobs) == CONTENTS


def test_what_a_migration_brought_is_our_own_again_after_a_reset(blobs: Blobs) -> None:
    blobs.fill()
    blobs.discard()
    assert all(block.fresh for block in blobs.blocks)
    assert contents(blobs)[RSDP] == bytes(36)
    blobs.fill()
    assert contents(blobs) == CONTENTS


def test_fw_cfg_offers_them_at_the_lengths_of_now(blobs: Blobs) -> None:
    files = {"etc/fdt": b"tree", **{blob.name: blob for blob in blobs.files}}
    fw_cfg = FwCfg(1 << 20, 1, 1, GuestAccess(lambda *_: b"", lambda *_: None), files, blobs)
    blobs.fill()

    def read(key: int, count: int) -> bytes:
        fw_cfg.write(0, 2, key)
        return bytes(fw_cfg.read(1, 1) for _ in range(count))

    def directory() -> dict[str, tuple[int, int]]:
        data = read(DIRECTORY, 4 + 64 * 8)
        entries = [data[at : at + 64] for at in range(4, len(data), 64)]
        assert data[:4] == b"\0\0\0\x08"
        numbers = ((int.from_bytes(entry[4:6]), int.from_bytes(entry[:4])) for entry in entries)
        return dict(zip((entry[8:].rstrip(b"\0").decode() for entry in entries), numbers, strict=True))

    assert directory() == {
        "bios-geometry": (0x20, 0),
        "bootorder": (0x21, 0),
        RSDP: (0x22, 36),
        TABLES: (0x23, 5000),
        "etc/boot-fail-wait": (0x24, 4),
        "etc/e820": (0x25, 40),
        "etc/fdt": (0x26, 4),
        LOADER: (0x27, 1664),
    }
    assert read(0x22, 40) == b"r" * 36 + bytes(4)
    assert fw_cfg.save() == FwCfgState(0x22, 36, 0, AcpiBlobs(5000, 1664, 36))
    fw_cfg.load(FwCfgState(0x22, 30, 0, AcpiBlobs(4000, 1664, 34)))
    assert bytes(fw_cfg.read(1, 1) for _ in range(6)) == b"rrrr\0\0"
    assert directory()[TABLES] == (0x23, 4000)


class TestLog:
    @pytest.fixture
    def plain(self) -> PlainLog:
        return PlainLog()

    @pytest.fixture
    def log(self, plain: PlainLog, blobs: Blobs) -> LogWithBlobs:
        log = LogWithBlobs(plain, blobs)  # type: ignore[arg-type]
        blobs.report_writes_to(log.mark)
        return log

    def fetched(self, log: LogWithBlobs, block: RAMBlock) -> int:
        words = array("Q", [0])
        log.fetch(block, memoryview(words))
        return words[0]

    def test_blobs_are_dirty_once_when_they_are_written(self, log: LogWithBlobs, blobs: Blobs) -> None:
        blobs.fill()
        log.start()
        assert [self.fetched(log, block) for block in blobs.blocks] == [0, 0, 0]
        blobs.fill()
        assert [self.fetched(log, block) for block in blobs.blocks] == [3, 1, 1]
        log.clear(blobs.blocks[0], 0, 2)
        assert [self.fetched(log, block) for block in blobs.blocks] == [0, 0, 0]
        log.stop()

    def test_nothing_is_kept_between_two_runs(self, log: LogWithBlobs, blobs: Blobs) -> None:
        log.start()
        blobs.fill()
        log.stop()
        blobs.fill()
        log.start()
        assert self.fetched(log, blobs.blocks[0]) == 0

    def test_guest_memory_has_its_own_log(self, log: LogWithBlobs, plain: PlainLog) -> None:
        block = RAMBlock("microvm.ram", 0x1000, PAGE)
        log.start()
        log.fetch(block, memoryview(array("Q", [0])))
        log.clear(block, 0, 1)
        log.mark(block, 0, 1)
        log.stop()
        assert [what for what, *_ in plain.told] == ["start", "fetch", "clear", "mark", "stop"]
        assert log.manual_clear
