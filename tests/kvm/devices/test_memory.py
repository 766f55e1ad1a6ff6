from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvm.devices.memory import GuestMemory, Piece, memory_map
from kvm.errors import KvmError
from kvm.memory import HostMemory
from kvm.system import Kvm

pytestmark = pytest.mark.needs("kvm")

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
TOP = 4 * GIB


def test_64_mib_with_a_small_image_have_the_four_slots_of_a_real_machine() -> None:
    assert memory_map(64 * MIB, 64 * KIB) == [
        Piece(0, 0, 0xF0000, False),
        Piece(0xF0000, 0, 0x10000, True),
        Piece(0x100000, 0x100000, 63 * MIB, False),
        Piece(0xFFFF0000, 0, 0x10000, True),
    ]


def test_ram_beyond_3_gib_goes_on_at_4_gib() -> None:
    pieces = [piece for piece in memory_map(5 * GIB, 64 * KIB) if not piece.is_firmware]
    assert pieces[1:] == [Piece(MIB, MIB, 3 * GIB - MIB, False), Piece(TOP, 3 * GIB, 2 * GIB, False)]


def test_the_low_alias_shows_the_last_128_kib_of_a_large_image() -> None:
    firmware = [piece for piece in memory_map(GIB, 256 * KIB) if piece.is_firmware]
    assert firmware == [Piece(0xE0000, 128 * KIB, 128 * KIB, True), Piece(TOP - 256 * KIB, 0, 256 * KIB, True)]


def test_little_ram_has_fewer_pieces() -> None:
    assert memory_map(512 * KIB, 64 * KIB)[0] == Piece(0, 0, 512 * KIB, False)
    assert len(memory_map(512 * KIB, 64 * KIB)) == 3


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with Kvm() as kvm:
        with kvm.create_vm() as vm:
            memory = GuestMemory(vm, HostMemory.anonymous(4 * MIB), "microvm.ram", 192 * KIB)
            yield memory
        memory.close()


def test_blocks_are_named_sized_and_ordered_as_on_the_wire(memory: GuestMemory) -> None:
    blocks = [(block.idstr, block.used_length, block.guest_address, block.fresh) for block in memory.blocks]
    assert blocks == [("microvm.ram", 4 * MIB, 0, True), ("pc.bios", 192 * KIB, TOP - 192 * KIB, True)]


def test_the_larger_block_comes_first_whichever_it_is() -> None:
    with Kvm() as kvm, kvm.create_vm() as vm:
        memory = GuestMemory(vm, HostMemory.anonymous(128 * KIB), "m", 192 * KIB)
        assert [block.idstr for block in memory.blocks] == ["pc.bios", "m"]
        vm.close()
        memory.close()


def test_firmware_is_seen_in_both_places_and_is_one_block(memory: GuestMemory) -> None:
    image = bytes(range(256)) * 768
    memory.load_firmware(image)
    assert memory.read(TOP - len(image), len(image)) == image
    assert memory.read(MIB - 128 * KIB, 128 * KIB) == image[64 * KIB :]
    memory.write(MIB - 16, b"changed")
    assert memory.read(TOP - 16, 7) == b"changed"


def test_writes_are_reported_by_block_after_they_are_there(memory: GuestMemory) -> None:
    seen = []

    def wrote(block: object, offset: int, length: int) -> None:
        seen.append((block.idstr, offset, length, memory.read(MIB - 128 * KIB - 4, 8)))  # type: ignore[attr-defined]

    memory.report_writes_to(wrote)
    memory.write(MIB - 128 * KIB - 4, b"ramsbios")
    assert [entry[:3] for entry in seen] == [("microvm.ram", MIB - 128 * KIB - 4, 4), ("pc.bios", 64 * KIB, 4)]
    assert seen[-1][3] == b"ramsbios"
    assert not any(block.fresh for block in memory.blocks)


@pytest.mark.parametrize(("address", "length"), [(4 * MIB - 2, 4), (TOP, 1), (3 * GIB, 1), (1 << 64, 8), (4 * MIB, 1)])
def test_what_is_not_ram_is_refused_whole(memory: GuestMemory, address: int, length: int) -> None:
    with pytest.raises(KvmError, match="are RAM"):
        memory.write(address, b"x" * length)
    with pytest.raises(KvmError, match="are RAM"):
        memory.read(address, length)
    assert memory.read(4 * MIB - 2, 2) == b"\0\0"


def test_holes_read_as_zeroes(memory: GuestMemory) -> None:
    memory.write(4 * MIB - 2, b"ab")
    memory.load_firmware(b"f" * 192 * KIB)
    assert memory.read_or_zeroes(4 * MIB - 2, 6) == b"ab\0\0\0\0"
    assert memory.read_or_zeroes(TOP - 2, 4) == b"ff\0\0"
    assert memory.read_or_zeroes(3 * GIB, 8) == bytes(8)
    assert memory.read_or_zeroes(0, 0) == b""


def test_discarded_memory_is_fresh_again(memory: GuestMemory) -> None:
    memory.write(0x1234, b"secret")
    memory.load_firmware(b"f" * 192 * KIB)
    memory.discard()
    assert memory.read(0x1234, 6) == bytes(6)
    assert memory.read(TOP - 4, 4) == bytes(4)
    assert all(block.fresh for block in memory.blocks)


def test_shared_memory_is_not_discarded() -> None:
    with Kvm() as kvm, kvm.create_vm() as vm:
        memory = GuestMemory(vm, HostMemory.memfd(4 * MIB), "mem0", 64 * KIB)
        memory.write(0, b"kept")
        memory.discard()
        assert memory.read(0, 4) == b"kept"
        vm.close()
        memory.close()


def test_closed_memory_reads_as_zeroes(memory: GuestMemory) -> None:
    memory.write(0, b"gone")
    memory.close()
    assert memory.read_or_zeroes(0, 4) == bytes(4)
