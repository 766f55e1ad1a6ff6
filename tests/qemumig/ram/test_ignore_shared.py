"""Memory that both ends have (`x-ignore-shared`): listed with its address, never sent, never touched."""

from __future__ import annotations

import struct

import pytest

from qemumig.errors import StreamError
from qemumig.options import MigrationOptions
from qemumig.ram.landing import Landing
from qemumig.ram.live import RamSource
from qemumig.ram.load import RamLoader
from qemumig.wire.stream import InputStream, OutputStream
from tests.support.memory import Memory, QuietLog, channel_pair

PAGE = 4096


@pytest.mark.parametrize(
    ("shared", "named", "both"), [(True, True, True), (True, False, False), (False, True, False), (False, False, False)]
)
def test_only_shared_memory_with_a_name_is_at_both_ends(shared: bool, named: bool, both: bool) -> None:
    assert Memory("ram", PAGE, shared=shared, named=named).block.is_at_both_ends is both


@pytest.mark.parametrize("ignore", [True, False])
def test_the_list_names_it_and_no_page_of_it_goes_out(ignore: bool) -> None:
    shared = Memory("mem", 8 * PAGE, shared=True, named=True, guest_address=0x100000)
    private = Memory("rom", 2 * PAGE, guest_address=0xFFFF0000)
    with channel_pair() as (left, right):
        out = OutputStream(left)
        options = MigrationOptions()
        options.set_capabilities([("x-ignore-shared", ignore)])
        source = RamSource([private.block, shared.block], QuietLog(), out, options)
        source.write_block_list()
        source.write_rest()
        out.flush()
        stream = InputStream(right)
        assert stream.read_be64("") == 10 * PAGE | 4
        found = []
        for _ in range(2):
            name = stream.read(stream.read_u8(""), "")
            found.append((name, stream.read_be64(""), stream.read_be64("") if ignore else None))
        assert found == [
            (b"mem", 8 * PAGE, 0x100000 if ignore else None),
            (b"rom", 2 * PAGE, 0xFFFF0000 if ignore else None),
        ]
    assert source.total == (2 if ignore else 10) * PAGE
    assert source.sender.zero_pages == (2 if ignore else 10)


@pytest.mark.parametrize(
    ("record", "finding"),
    [
        (struct.pack(">QB3sQQ", 0x2004, 3, b"mem", 0x2000, 0x1000), "block 'mem' is at guest address 0x0 here, at 0x1000"),
        (struct.pack(">QB3sQQ", 0x3004, 3, b"mem", 0x3000, 0), "block 'mem' has 0x2000 bytes here, the stream says 0x3000"),
        (struct.pack(">QB3sB", 0x1002, 3, b"mem", 0), "a page of block 'mem', expected none: with x-ignore-shared both"),
        (struct.pack(">QB3s", 0x1008, 3, b"mem") + bytes(PAGE), "a page of block 'mem', expected none"),
    ],
    ids=["address", "length", "zero", "page"],
)
def test_what_would_change_it_is_refused(record: bytes, finding: str) -> None:
    memory = Memory("mem", 2 * PAGE, fresh=False, shared=True, named=True)
    memory.write(0, b"\xaa" * 2 * PAGE)
    with channel_pair() as (left, right):
        out = OutputStream(left)
        out.write(record)
        out.flush()
        loader = RamLoader(InputStream(right), Landing([memory.block], ignore_shared=True))
        with pytest.raises(StreamError, match=finding):
            loader.load_body()
    assert memory.contents() == b"\xaa" * 2 * PAGE
