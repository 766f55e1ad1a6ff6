import errno
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvm import KvmError
from kvm.errors import BackingError
from kvm.memory import AddressSpace, HostMemory
from qemumig.ram.block import RAMBlock

MIB = 1 << 20


def smaps_flags(address: int) -> set[str]:
    """VmFlags of the mapping that starts at *address*."""
    with open("/proc/self/smaps") as lines:
        for line in lines:
            if line.startswith(f"{address:x}-"):
                return next(set(line.split()[1:]) for line in lines if line.startswith("VmFlags:"))
    raise AssertionError(f"no mapping starts at {address:#x}")


def resident(memory: HostMemory | RAMBlock) -> int:
    """Bytes of the mapping that are in memory now."""
    with open("/proc/self/smaps") as lines:
        for line in lines:
            if line.startswith(f"{memory.host_address:x}-"):
                return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Rss:"))
    raise AssertionError(f"no mapping starts at {memory.host_address:#x}")


# -- every kind -----------------------------------------------------------------------------------------------


@pytest.fixture(params=["anonymous", "anonymous shared", "memfd", "memfd private", "file", "file shared"])
def memory(request: pytest.FixtureRequest, tmp_path: Path) -> HostMemory:
    made = {
        "anonymous": lambda: HostMemory.anonymous(3 * MIB),
        "anonymous shared": lambda: HostMemory.anonymous(3 * MIB, shared=True),
        "memfd": lambda: HostMemory.memfd(3 * MIB),
        "memfd private": lambda: HostMemory.memfd(3 * MIB, shared=False),
        "file": lambda: HostMemory.file(str(tmp_path / "ram"), 3 * MIB),
        "file shared": lambda: HostMemory.file(str(tmp_path / "ram"), 3 * MIB, shared=True),
    }[request.param]()
    request.addfinalizer(made.close)
    assert made.kind == request.param.split()[0]
    return made


def test_new_memory_is_aligned_for_huge_pages_and_reads_as_zeroes(memory: HostMemory) -> None:
    assert memory.host_address % (2 * MIB) == 0
    assert (memory.size, memory.page_size, memory.fresh) == (3 * MIB, 4096, True)
    assert not any(memory.read(0, memory.size))


def test_bytes_come_back_at_both_ends(memory: HostMemory) -> None:
    memory.write(0, b"first")
    memory.write(memory.size - 4, b"last")
    assert memory.read(0, 6) == b"first\0"
    assert memory.read(memory.size - 5, 5) == b"\0last"


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (3 * MIB, 1), (3 * MIB - 1, 2), (0, 3 * MIB + 1)])
def test_range_outside_is_refused_with_its_numbers(memory: HostMemory, offset: int, length: int) -> None:
    expected = f"range of {length:#x} bytes at offset {offset:#x} of memory of 0x300000 bytes"
    with pytest.raises(KvmError, match=expected):
        memory.read(offset, length)
    with pytest.raises(KvmError, match=expected):
        memory.write(offset, bytes(length))


def test_negative_length_is_refused(memory: HostMemory) -> None:
    with pytest.raises(KvmError, match="-0x1 bytes"):
        memory.read(8, -1)


def test_buffer_is_the_memory_itself(memory: HostMemory) -> None:
    view = memory.buffer()
    assert (view.nbytes, view.format, view.readonly, view.c_contiguous) == (3 * MIB, "B", False, True)
    view[MIB : MIB + 3] = b"abc"
    assert memory.read(MIB, 3) == b"abc"
    view.release()


def test_memory_does_not_go_while_a_view_is_alive(memory: HostMemory) -> None:
    view = memory.buffer()[10:20]
    with pytest.raises(BufferError):
        memory.close()
    view[0] = 7
    view.release()
    memory.close()
    memory.close()


def test_closed_memory_is_refused(memory: HostMemory) -> None:
    memory.close()
    with pytest.raises(ValueError, match="closed"):
        memory.read(0, 1)
    with pytest.raises(ValueError, match="closed"):
        memory.write(0, b"x")


def test_memory_is_not_inherited(memory: HostMemory) -> None:
    assert "dc" in smaps_flags(memory.host_address)


def test_addresses_before_and_behind_cannot_be_touched(memory: HostMemory) -> None:
    start, end = f"{memory.host_address:x}", f"{memory.host_address + memory.size:x}"
    lines = [line.split()[:2] for line in Path("/proc/self/maps").read_text().splitlines()]
    behind = [rights for range_, rights in lines if range_.split("-")[0] == end]
    before = [rights for range_, rights in lines if range_.split("-")[1] == start]
    assert behind == ["---p"]
    assert before in ([], ["---p"])  # nothing of ours when the range was aligned by chance


def test_populated_memory_is_resident_and_unchanged(memory: HostMemory) -> None:
    memory.write(5000, b"kept")
    memory.populate()
    assert resident(memory) == memory.size
    assert memory.read(5000, 4) == b"kept"


def test_populating_works_on_kernels_without_the_request(memory: HostMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvm.memory._MADV_POPULATE_WRITE", 9999)
    memory.write(5000, b"kept")
    memory.populate()
    assert resident(memory) == memory.size
    assert memory.read(4999, 6) == b"\0kept\0"


# -- anonymous ------------------------------------------------------------------------------------------------


def test_private_memory_is_advised_for_huge_and_equal_pages() -> None:
    with HostMemory.anonymous(4 * MIB) as memory:
        flags = smaps_flags(memory.host_address)
        ksm = Path("/sys/kernel/mm/ksm").exists()
        thp = Path("/sys/kernel/mm/transparent_hugepage").exists()
        assert ("mg" in flags, "hg" in flags, "dd" in flags) == (ksm, thp, False)
    with HostMemory.anonymous(4 * MIB, merge=False, dump=False) as memory:
        assert ("mg" in smaps_flags(memory.host_address), "dd" in smaps_flags(memory.host_address)) == (
            False,
            True,
        )


def test_preallocated_memory_is_resident() -> None:
    with HostMemory.anonymous(4 * MIB, prealloc=True) as memory:
        assert resident(memory) == 4 * MIB


@pytest.mark.parametrize("size", [0, -4096, 4097])
def test_size_that_is_not_whole_pages_is_refused(size: int) -> None:
    with pytest.raises(BackingError, match=f"memory size {size:#x} must be a positive multiple"):
        HostMemory.anonymous(size)


@pytest.mark.parametrize("size", [1 << 53, 1 << 70])
def test_more_than_there_can_be_is_refused(size: int) -> None:
    with pytest.raises(BackingError) as caught:
        HostMemory.anonymous(size)
    assert str(caught.value) == f"can't set up guest memory of {size:#x} bytes: Cannot allocate memory"


# -- memfd ----------------------------------------------------------------------------------------------------


def test_memfd_shares_its_bytes_through_the_descriptor() -> None:
    with HostMemory.memfd(MIB) as memory:
        assert memory.fd is not None
        memory.write(100, b"shared")
        assert os.pread(memory.fd, 6, 100) == b"shared"
        assert (memory.shared, memory.path) == (True, None)
    with HostMemory.memfd(MIB, shared=False) as memory:
        assert memory.fd is not None
        memory.write(100, b"private")
        assert os.pread(memory.fd, 7, 100) == bytes(7)


def test_sealed_memfd_keeps_its_size() -> None:
    with HostMemory.memfd(MIB) as memory:
        assert memory.fd is not None
        with pytest.raises(PermissionError):
            os.ftruncate(memory.fd, 4096)
    with HostMemory.memfd(MIB, seal=False) as memory:
        assert memory.fd is not None
        os.ftruncate(memory.fd, 2 * MIB)


def test_memfd_closes_its_descriptor() -> None:
    before = os.listdir("/proc/self/fd")
    HostMemory.memfd(MIB).close()
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize("size", [3 * MIB, 1, 100])
def test_huge_page_size_must_be_a_power_of_two(size: int) -> None:
    with pytest.raises(BackingError, match="power of 2"):
        HostMemory.memfd(8 * MIB, hugetlb=True, hugetlbsize=size)


def test_size_must_be_whole_huge_pages() -> None:
    with pytest.raises(BackingError, match="multiple of page size 0x200000"):
        HostMemory.memfd(3 * MIB, hugetlb=True, hugetlbsize=2 * MIB)


def test_huge_pages_are_used_or_their_lack_is_said() -> None:
    before = os.listdir("/proc/self/fd")
    try:
        memory = HostMemory.memfd(2 * MIB, hugetlb=True, hugetlbsize=2 * MIB)
    except BackingError as error:
        assert str(error) == "unable to map backing store for guest RAM: Cannot allocate memory"
    else:
        assert (memory.page_size, memory.host_address % (2 * MIB)) == (2 * MIB, 0)
        memory.write(0, b"x")
        memory.close()
    assert os.listdir("/proc/self/fd") == before


# -- files ----------------------------------------------------------------------------------------------------


def test_missing_file_is_created_with_the_size_and_stays(tmp_path: Path) -> None:
    path = tmp_path / "ram"
    with HostMemory.file(str(path), MIB, shared=True) as memory:
        memory.write(0, b"kept")
        assert (memory.fresh, memory.path) == (True, str(path))
    assert path.stat().st_size == MIB
    assert path.read_bytes()[:4] == b"kept"


def test_empty_file_grows_and_is_fresh(tmp_path: Path) -> None:
    path = tmp_path / "ram"
    path.touch()
    with HostMemory.file(str(path), MIB, offset=MIB) as memory:
        assert memory.fresh
    assert path.stat().st_size == 2 * MIB


def test_existing_file_is_not_fresh_and_shows_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "ram"
    path.write_bytes(bytes(MIB) + b"content" + bytes(MIB - 7))
    with HostMemory.file(str(path), MIB, shared=True, offset=MIB) as memory:
        assert not memory.fresh
        assert memory.read(0, 7) == b"content"
        memory.write(0, b"CON")
    assert path.read_bytes()[MIB : MIB + 7] == b"CONtent"


def test_private_memory_leaves_the_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "ram"
    path.write_bytes(bytes(MIB))
    with HostMemory.file(str(path), MIB) as memory:
        memory.write(0, b"private")
    assert path.read_bytes() == bytes(MIB)


def test_folder_means_an_unlinked_file_inside(tmp_path: Path) -> None:
    with HostMemory.file(str(tmp_path), MIB, shared=True) as memory:
        assert memory.fresh
        assert memory.fd is not None
        assert os.fstat(memory.fd).st_size == MIB
        assert list(tmp_path.iterdir()) == []


def test_file_that_is_too_small_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "ram"
    path.write_bytes(bytes(MIB))
    before = os.listdir("/proc/self/fd")
    with pytest.raises(BackingError) as caught:
        HostMemory.file(str(path), MIB, offset=4096)
    assert str(caught.value) == (
        f"{path} backing store size 0x100000 is too small for 'size' option 0x100000 plus 'offset' option 0x1000"
    )
    assert path.stat().st_size == MIB
    assert os.listdir("/proc/self/fd") == before


def test_file_that_cannot_be_opened_is_named() -> None:
    with pytest.raises(BackingError) as caught:
        HostMemory.file("/nowhere/ram", MIB)
    assert str(caught.value) == "can't open backing store /nowhere/ram for guest RAM: No such file or directory"
    assert caught.value.errno == errno.ENOENT


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"align": 3 * MIB}, "alignment 0x300000 must be a power of two"),
        ({"align": 1024}, "alignment 0x400 must be multiples of page size 0x1000"),
        ({"offset": 1024}, "offset 0x400 must be multiples of page size 0x1000"),
        ({"offset": -4096}, "offset -0x1000 must be multiples of page size 0x1000"),
    ],
)
def test_crooked_option_is_refused(tmp_path: Path, options: dict[str, int], message: str) -> None:
    path = tmp_path / "ram"
    path.write_bytes(bytes(MIB))
    with pytest.raises(BackingError) as caught:
        HostMemory.file(str(path), MIB, **options)  # type: ignore[arg-type]
    assert str(caught.value) == message


def test_alignment_is_kept(tmp_path: Path) -> None:
    with HostMemory.file(str(tmp_path / "ram"), MIB, align=64 * MIB) as memory:
        assert memory.host_address % (64 * MIB) == 0


def test_read_only_file_gives_read_only_memory(tmp_path: Path) -> None:
    path = tmp_path / "ram"
    path.write_bytes(b"content" + bytes(MIB - 7))
    with HostMemory.file(str(path), MIB, readonly=True) as memory:
        assert (memory.readonly, memory.fresh) == (True, False)
        assert memory.read(0, 7) == b"content"
        assert memory.buffer().readonly
        with pytest.raises(KvmError, match="read-only memory"):
            memory.write(0, b"x")
        memory.populate()


def test_private_memory_of_a_read_only_file_may_be_writable(tmp_path: Path) -> None:
    path = tmp_path / "ram"
    path.write_bytes(bytes(MIB))
    with HostMemory.file(str(path), MIB, readonly=True, rom=False) as memory:
        memory.write(0, b"x")
        assert not memory.readonly
    assert path.read_bytes() == bytes(MIB)


def test_read_only_file_is_never_created(tmp_path: Path) -> None:
    with pytest.raises(BackingError, match="No such file"):
        HostMemory.file(str(tmp_path / "ram"), MIB, readonly=True)
    assert list(tmp_path.iterdir()) == []


def test_discarded_data_is_gone_from_the_file(tmp_path: Path) -> None:
    path = tmp_path / "ram"
    with HostMemory.file(str(path), MIB, shared=True, discard_data=True) as memory:
        memory.write(0, b"secret")
    assert not any(path.read_bytes())


def test_stray_access_behind_the_memory_crashes_the_process() -> None:
    script = (
        "import ctypes; from kvm.memory import HostMemory; memory = HostMemory.anonymous(4096);"
        "ctypes.memset(memory.host_address + memory.size, 1, 1)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == -11


MISSING = 77  # exit status of the script where userfaultfd cannot be had
BRINGS_THE_PAGE = f"""
import ctypes, fcntl, os, struct, sys, threading
from kvm.memory import HostMemory

userfaultfd, user_mode_only = 323, 1
fd = ctypes.CDLL(None).syscall(userfaultfd, os.O_CLOEXEC | user_mode_only)
if fd < 0:
    sys.exit({MISSING})
api, register, copy = 0xC018AA3F, 0xC020AA00, 0xC028AA03
memory = HostMemory.anonymous(8192)
fcntl.ioctl(fd, api, struct.pack("<3Q", 0xAA, 0, 0))
fcntl.ioctl(fd, register, struct.pack("<4Q", memory.host_address, 8192, 1, 0))
page = ctypes.create_string_buffer(b"brought", 4096)

def bring(offset):
    os.read(fd, 32)  # a fault
    where, source = memory.host_address + offset, ctypes.addressof(page)
    fcntl.ioctl(fd, copy, struct.pack("<5Q", where, source, 4096, 0, 0))

seen = []
for offset, use in ((0, lambda: seen.append(memory.read(0, 7))), (4096, lambda: memory.write(4096, b"B"))):
    thread = threading.Thread(target=use)
    thread.start()
    bring(offset)
    thread.join()
assert seen == [b"brought"], seen
assert memory.read(4096, 7) == b"Brought"
"""


def test_page_may_be_brought_by_a_python_thread_while_another_waits_for_it() -> None:
    done = subprocess.run([sys.executable, "-c", BRINGS_THE_PAGE], cwd=Path(__file__).parents[2], check=False, timeout=30)
    if done.returncode == MISSING:
        pytest.skip("userfaultfd is missing")
    assert done.returncode == 0


# -- the guest's addresses ------------------------------------------------------------------------------------


@pytest.fixture
def ram() -> HostMemory:
    return HostMemory.anonymous(MIB)


def test_address_is_found_where_its_mapping_is(ram: HostMemory) -> None:
    space = AddressSpace()
    space.map(0x100000, ram, 0x2000, 0x3000, slot=1)
    assert space.find(0x100000, 0x3000) == ram.host_address + 0x2000
    assert space.find(0x102FFF, 1) == ram.host_address + 0x4FFF
    mapping = space.mapping_at(0x101000)
    assert mapping is not None
    assert (mapping.slot, mapping.offset, mapping.end) == (1, 0x2000, 0x103000)


@pytest.mark.parametrize(("address", "length"), [(0xFFFFF, 1), (0x103000, 1), (0x102FFF, 2), (0x100000, -1), (1 << 64, 1)])
def test_unmapped_address_is_refused_with_both_numbers(ram: HostMemory, address: int, length: int) -> None:
    space = AddressSpace()
    space.map(0x100000, ram, 0, 0x3000, slot=1)
    expected = f"{length:#x} bytes at guest address {address:#x} are not all mapped"
    for use in (space.find, space.read):
        with pytest.raises(KvmError, match=expected):
            use(address, length)


def test_one_range_may_be_mapped_twice(ram: HostMemory) -> None:
    space = AddressSpace()
    space.map(0xF0000, ram, 0, 0x10000, slot=1)
    space.map(0xFFFF0000, ram, 0, 0x10000, slot=3)
    space.write(0xF0010, b"both")
    assert space.read(0xFFFF0010, 4) == b"both"


def test_access_crosses_mappings_that_touch(ram: HostMemory) -> None:
    space = AddressSpace()
    space.map(0x2000, ram, 0x8000, 0x1000, slot=1)
    space.map(0x1000, ram, 0x4000, 0x1000, slot=0)
    space.write(0x1FFE, b"abcd")
    assert ram.read(0x4FFE, 2) == b"ab"
    assert ram.read(0x8000, 2) == b"cd"
    assert space.read(0x1FFE, 4) == b"abcd"
    with pytest.raises(KvmError, match="are not all mapped"):
        space.find(0x1FFE, 4)  # no one host address for it


def test_write_that_ends_outside_writes_nothing(ram: HostMemory) -> None:
    space = AddressSpace()
    space.map(0, ram, 0, 0x1000, slot=0)
    with pytest.raises(KvmError, match="0x4 bytes at guest address 0xffe"):
        space.write(0xFFE, b"abcd")
    assert ram.read(0xFFE, 2) == b"\0\0"


@pytest.mark.parametrize(("address", "size"), [(0x0, 0x2000), (0x2FFF, 0x1000), (0x1000, 0x2000), (0x1800, 0x100)])
def test_overlap_is_refused_with_both_ranges(ram: HostMemory, address: int, size: int) -> None:
    space = AddressSpace()
    space.map(0x1000, ram, 0, 0x2000, slot=0)
    with pytest.raises(KvmError, match=r"overlaps 0x1000\.\.0x3000"):
        space.map(address, ram, 0, size, slot=1)
    assert [mapping.slot for mapping in space] == [0]


def test_mapping_may_not_reach_outside_its_memory(ram: HostMemory) -> None:
    with pytest.raises(KvmError, match="of memory of 0x100000 bytes"):
        AddressSpace().map(0, ram, 0xFF000, 0x2000, slot=0)


def test_unmapped_range_is_gone_and_free(ram: HostMemory) -> None:
    space = AddressSpace()
    space.map(0x1000, ram, 0, 0x1000, slot=0)
    space.unmap(0x1000)
    assert space.mapping_at(0x1000) is None
    space.map(0x1000, ram, 0x5000, 0x1000, slot=1)
    with pytest.raises(KvmError, match="no mapping starts at guest address 0x1800"):
        space.unmap(0x1800)


def test_page_size_of_the_house_is_the_hosts() -> None:
    assert mmap.PAGESIZE == 4096
