"""Guest memory: as the host maps it, and as the guest addresses it.

    HostMemory      bytes of ours      anonymous or shared memory, a memfd or a file, at `host_address`
    AddressSpace    bytes of theirs    guest-physical ranges, each a piece of some HostMemory

The range of host addresses is reserved with one Python mmap object, which owns it; the memory proper is mapped
over its middle, aligned for huge pages.  So a view of guest memory is an ordinary memoryview, and the mapping
cannot go while one is alive.

Holds     (1) nothing is read or written outside a mapping, whatever addresses a caller computes
          (2) `fresh` is true only if every byte reads as zero because nobody can have written any yet

Threads   Mapping and closing by one thread; reading and writing by any.  Bytes are copied without the GIL: a page
          may have to be brought by somebody else (userfaultfd), who needs it.  A fork does not inherit memory.
"""

from __future__ import annotations

import bisect
import ctypes
import errno
import fcntl
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass

from .errors import BackingError, KvmError

PAGE_SIZE = 4096
HUGE_PAGE_SIZE = 2 << 20

# Not in Python's mmap of 3.11.
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_MADV_POPULATE_WRITE = 23
_HUGETLBFS_MAGIC = 0x958458F6
_SHM_FOLDER = "/dev/shm"
_MAP_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.fstatfs.argtypes = (ctypes.c_int, ctypes.c_void_p)


class HostMemory:
    """A piece of guest RAM in this process; made by `anonymous`, `memfd`, `shm` or `file`, a context manager.

    host_address   of its first byte, aligned to 2 MiB or to larger host pages
    size           bytes
    page_size      of the host pages behind it: 4096, or the size of huge pages asked for by name
    shared         writes reach the memfd or file, and whoever else maps it
    fresh          reads as zeroes, nobody wrote yet (when it was made)
    readonly       only reads are possible
    fd, path, kind descriptor and path of what is behind it, or None; "anonymous", "memfd", "shm" or "file"
    """

    def __init__(
        self,
        size: int,
        *,
        kind: str,
        shared: bool,
        fresh: bool,
        page_size: int = PAGE_SIZE,
        align: int = 0,
        fd: int | None = None,
        path: str | None = None,
        offset: int = 0,
        readonly: bool = False,
        discard_data: bool = False,
        reserve: bool = True,
    ) -> None:
        """Map it; *fd*, when there is one, belongs to the new object.  Raises BackingError."""
        self.size = size
        self.kind = kind
        self.shared = shared
        self.fresh = fresh
        self.page_size = page_size
        self.fd = fd
        self.path = path
        self.readonly = readonly
        self._discard_data = discard_data
        flags = mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE
        flags |= mmap.MAP_ANONYMOUS if fd is None else 0
        flags |= 0 if reserve else _MAP_NORESERVE
        self._range, self.host_address = _reserve(size, max(align, page_size, HUGE_PAGE_SIZE))
        self._start = self.host_address - _address(self._range)
        try:
            _map_over(self.host_address, size, readonly, flags, fd, offset)
        except BackingError:
            self._range.close()
            raise
        self._advise(mmap.MADV_DONTFORK)

    # -- the four kinds

    @classmethod
    def anonymous(
        cls,
        size: int,
        *,
        shared: bool = False,
        prealloc: bool = False,
        merge: bool = True,
        dump: bool = True,
        reserve: bool = True,
    ) -> HostMemory:
        """Memory with nothing behind it.

        *shared* makes it shmem; nobody else can map it all the same.  *merge*: the kernel may share equal pages
        of private memory (KSM); *dump*: a core dump includes it; *reserve*: room for it is set aside at once.
        """
        _check_size(size, PAGE_SIZE)
        memory = cls(size, kind="anonymous", shared=shared, fresh=True, reserve=reserve)
        memory._finish(prealloc, merge, dump)
        return memory

    @classmethod
    def memfd(
        cls,
        size: int,
        *,
        name: str = "memory",
        shared: bool = True,
        hugetlb: bool = False,
        hugetlbsize: int = 0,
        seal: bool = True,
        prealloc: bool = False,
        merge: bool = True,
        dump: bool = True,
        reserve: bool = True,
    ) -> HostMemory:
        """Memory behind a descriptor without a path; *hugetlbsize* in bytes, 0 for the host's default."""
        page_size = _huge_page_size(hugetlbsize) if hugetlb else PAGE_SIZE
        _check_size(size, page_size)
        flags = os.MFD_CLOEXEC | (os.MFD_ALLOW_SEALING if seal else 0)
        if hugetlb:
            flags |= os.MFD_HUGETLB | (page_size.bit_length() - 1) << os.MFD_HUGE_SHIFT
        try:
            fd = os.memfd_create(name, flags)
        except OSError as error:
            raise BackingError(error.errno or 0, f"can't create memfd {name!r} for guest RAM") from error
        with _closed_on_error(fd):
            _grow(fd, size, f"memfd {name!r}")
            if seal:
                _seal(fd)
            memory = cls(size, kind="memfd", shared=shared, fresh=True, page_size=page_size, fd=fd, reserve=reserve)
        memory._finish(prealloc, merge, dump)
        return memory

    @classmethod
    def shm(
        cls,
        size: int,
        *,
        shared: bool = True,
        prealloc: bool = False,
        merge: bool = True,
        dump: bool = True,
        reserve: bool = True,
    ) -> HostMemory:
        """POSIX shared memory whose name is gone at once: the descriptor alone leads to it (cli.md §4)."""
        if not shared:
            raise BackingError(errno.EINVAL, "can't create shm backend with `share=off`", reason=False)
        _check_size(size, PAGE_SIZE)
        fd = _open_shm()
        with _closed_on_error(fd):
            _grow(fd, size, "shared memory")
            memory = cls(size, kind="shm", shared=True, fresh=True, fd=fd, reserve=reserve)
        memory._finish(prealloc, merge, dump)
        return memory

    @classmethod
    def file(
        cls,
        path: str,
        size: int,
        *,
        shared: bool = False,
        offset: int = 0,
        align: int = 0,
        readonly: bool = False,
        rom: bool | None = None,
        discard_data: bool = False,
        prealloc: bool = False,
        merge: bool = True,
        dump: bool = True,
        reserve: bool = True,
    ) -> HostMemory:
        """*size* bytes from *offset* of a file; also one on hugetlbfs, whose page size then holds.

        A missing file is created and stays, a folder means an unlinked file inside; an empty file grows.
        *readonly* opens it for reading only, and so is the memory unless *rom* is False.  *discard_data*:
        at close the file's contents need not reach the disk any more.
        """
        fd, fresh = _open_backing(path, readonly)
        with _closed_on_error(fd):
            page_size = _file_page_size(fd)
            _check_size(size, page_size)
            _check_file_options(offset, align, page_size)
            length = os.fstat(fd).st_size
            if length == 0 and not readonly:
                _grow(fd, offset + size, path)
                fresh = True
            elif length < offset + size:
                raise BackingError(
                    errno.EINVAL,
                    f"{path} backing store size {length:#x} is too small for 'size' option {size:#x} "
                    f"plus 'offset' option {offset:#x}",
                    reason=False,
                )
            memory = cls(
                size,
                kind="file",
                shared=shared,
                fresh=fresh,
                page_size=page_size,
                align=align,
                fd=fd,
                path=path,
                offset=offset,
                readonly=readonly and rom is not False,
                discard_data=discard_data and shared and not readonly,
                reserve=reserve,
            )
        memory._finish(prealloc, merge, dump)
        return memory

    # -- use

    def buffer(self) -> memoryview:
        """All of it as bytes, not copied; writable unless `readonly`.  close() waits for no view: release it."""
        view = memoryview(self._range)[self._start : self._start + self.size]
        return view.toreadonly() if self.readonly else view

    def read(self, offset: int, length: int) -> bytes:
        """A copy of *length* bytes from *offset*."""
        self._check_range(offset, length)
        data = bytearray(length)
        if length:
            with memoryview(self._range):  # it stays mapped meanwhile
                ctypes.memmove((ctypes.c_char * length).from_buffer(data), self.host_address + offset, length)
        return bytes(data)

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write *data* at *offset*."""
        source = bytes(data)
        self._check_range(offset, len(source))
        if self.readonly:
            what = f"write of {len(source)} bytes at offset {offset:#x} of read-only memory"
            raise KvmError(errno.EROFS, what)
        with memoryview(self._range):  # it stays mapped meanwhile
            ctypes.memmove(self.host_address + offset, source, len(source))

    def populate(self) -> None:
        """Have every page in memory now, so that no later access has to wait for one."""
        if self.readonly:
            return  # pages of a file that nobody can write are the page cache's business
        if _libc.madvise(self.host_address, self.size, _MADV_POPULATE_WRITE) == 0:
            return
        number = ctypes.get_errno()
        if number != errno.EINVAL:  # kernels before 5.14 do not know the request
            raise BackingError(number, f"can't preallocate {self.size:#x} bytes of guest RAM")
        for offset in range(self._start, self._start + self.size, PAGE_SIZE):
            self._range[offset] = self._range[offset]  # a write that changes nothing

    def close(self) -> None:
        """Unmap and close; twice is allowed.  Raises BufferError while a view is alive."""
        if self._range.closed:
            return
        if self._discard_data:
            self._advise(mmap.MADV_REMOVE)
        self._range.close()
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None

    def __enter__(self) -> HostMemory:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<HostMemory {self.kind} {self.path or ''} {self.size:#x} bytes at {self.host_address:#x}>"

    # -- inside

    def _finish(self, prealloc: bool, merge: bool, dump: bool) -> None:
        """The advice and the work that come after the mapping."""
        if self.page_size == PAGE_SIZE:
            self._advise(mmap.MADV_HUGEPAGE)
        if merge and not self.shared:
            self._advise(mmap.MADV_MERGEABLE)
        if not dump:
            self._advise(mmap.MADV_DONTDUMP)
        if prealloc:
            try:
                self.populate()
            except KvmError:
                self.close()
                raise

    def _advise(self, advice: int) -> None:
        """Advice is no promise: a kernel without THP or KSM refuses it, and all goes on as well."""
        _libc.madvise(self.host_address, self.size, advice)

    def _check_range(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            what = f"range of {length:#x} bytes at offset {offset:#x} of memory of {self.size:#x} bytes"
            raise KvmError(errno.EFAULT, what)


# -- the mapping ----------------------------------------------------------------------------------------------


def _reserve(size: int, alignment: int) -> tuple[mmap.mmap, int]:
    """A range of addresses, and the aligned address in it that has room for *size* bytes."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    total = -(-size // alignment) * alignment + alignment
    try:
        reserved = mmap.mmap(-1, total, flags=flags)
    except (OSError, OverflowError) as error:
        number = getattr(error, "errno", None) or errno.ENOMEM
        raise BackingError(number, f"can't set up guest memory of {size:#x} bytes") from error
    start = _address(reserved)
    aligned = -(-start // alignment) * alignment
    no_access = 0  # before and behind the memory: a stray access of ours shall crash, not corrupt
    _libc.mprotect(start, aligned - start, no_access)
    end = aligned + -(-size // PAGE_SIZE) * PAGE_SIZE
    _libc.mprotect(end, start + total - end, no_access)
    return reserved, aligned


def _address(mapping: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(mapping))


def _map_over(address: int, size: int, readonly: bool, flags: int, fd: int | None, offset: int) -> None:
    protection = mmap.PROT_READ | (0 if readonly else mmap.PROT_WRITE)
    descriptor = -1 if fd is None else fd
    if _libc.mmap(address, size, protection, flags | _MAP_FIXED, descriptor, offset) == _MAP_FAILED:
        number = ctypes.get_errno()
        what = "can't set up guest memory" if fd is None else "unable to map backing store for guest RAM"
        raise BackingError(number, what if fd is not None else f"{what} of {size:#x} bytes")


# -- what is behind it ----------------------------------------------------------------------------------------


class _statfs(ctypes.Structure):
    """The two fields of interest, and room for the rest."""

    _fields_ = [("f_type", ctypes.c_long), ("f_bsize", ctypes.c_long), ("rest", ctypes.c_long * 30)]


class _closed_on_error:
    """Close a descriptor when the body fails; on success it has found an owner."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is not None:
            os.close(self.fd)


def _open_backing(path: str, readonly: bool) -> tuple[int, bool]:
    """A descriptor for *path*, and whether the file is new and so reads as zeroes."""
    access = os.O_RDONLY if readonly else os.O_RDWR
    try:
        if os.path.isdir(path) and not readonly:
            import tempfile  # only here: it is slow to import

            fd, name = tempfile.mkstemp(prefix="qemumig_ram.", dir=path)
            os.unlink(name)
            return fd, True
        if readonly:
            return os.open(path, access | os.O_CLOEXEC), False
        try:
            return os.open(path, access | os.O_CLOEXEC | os.O_CREAT | os.O_EXCL, 0o644), True
        except FileExistsError:
            return os.open(path, access | os.O_CLOEXEC), False
    except OSError as error:
        raise BackingError(error.errno or 0, f"can't open backing store {path} for guest RAM") from error


def _open_shm() -> int:
    """A descriptor for new shared memory without a name; the folder is the one of shm_open(3)."""
    name = f"{_SHM_FOLDER}/qemumig-{os.getpid()}-{os.urandom(8).hex()}"
    try:
        fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        os.unlink(name)
    except OSError as error:
        raise BackingError(error.errno or 0, f"can't create shared memory in {_SHM_FOLDER} for guest RAM") from error
    return fd


def _grow(fd: int, size: int, name: str) -> None:
    try:
        os.ftruncate(fd, size)
    except (OSError, OverflowError) as error:
        number = getattr(error, "errno", None) or errno.EFBIG
        raise BackingError(number, f"can't resize {name} to {size:#x} bytes for guest RAM") from error


def _seal(fd: int) -> None:
    """The size is fixed from now on: who shares it cannot make our accesses fault."""
    try:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    except OSError as error:
        raise BackingError(error.errno or 0, "can't seal the memfd of guest RAM") from error


def _file_page_size(fd: int) -> int:
    info = _statfs()
    if _libc.fstatfs(fd, ctypes.byref(info)) == 0 and info.f_type & 0xFFFFFFFF == _HUGETLBFS_MAGIC:
        return info.f_bsize
    return PAGE_SIZE


def _huge_page_size(size: int) -> int:
    """*size* when it may be one, the host's default for 0."""
    if size == 0:
        with open("/proc/meminfo") as lines:
            kib = next((int(line.split()[1]) for line in lines if line.startswith("Hugepagesize:")), 2048)
        return kib << 10
    if size < PAGE_SIZE or size & (size - 1):
        raise BackingError(errno.EINVAL, f"huge page size {size:#x} must be a power of 2", reason=False)
    return size


def _check_size(size: int, page_size: int) -> None:
    if size <= 0 or size % page_size:
        what = f"memory size {size:#x} must be a positive multiple of page size {page_size:#x}"
        raise BackingError(errno.EINVAL, what, reason=False)


def _check_file_options(offset: int, align: int, page_size: int) -> None:
    if align < 0 or align & (align - 1):
        raise BackingError(errno.EINVAL, f"alignment {align:#x} must be a power of two", reason=False)
    for name, value in (("alignment", align), ("offset", offset)):
        if value < 0 or value % page_size:
            what = f"{name} {value:#x} must be multiples of page size {page_size:#x}"
            raise BackingError(errno.EINVAL, what, reason=False)


# -- the guest's addresses ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Mapping:
    """*size* bytes of *memory* from *offset*, seen by the guest at *guest_address*; *slot* is KVM's number."""

    guest_address: int
    memory: HostMemory
    offset: int
    size: int
    slot: int

    @property
    def end(self) -> int:
        return self.guest_address + self.size

    @property
    def host_address(self) -> int:
        return self.memory.host_address + self.offset


class AddressSpace:
    """Where guest-physical memory is on the host; no two mappings overlap."""

    def __init__(self) -> None:
        self._starts: list[int] = []  # guest addresses, ascending
        self._mappings: list[Mapping] = []  # in the same order

    def __iter__(self) -> Iterator[Mapping]:
        return iter(self._mappings)

    def map(self, guest_address: int, memory: HostMemory, offset: int, size: int, slot: int) -> Mapping:
        """Add a mapping; a range outside *memory*, or one that overlaps another mapping, is a KvmError."""
        memory._check_range(offset, size)
        new = Mapping(guest_address, memory, offset, size, slot)
        at = bisect.bisect_left(self._starts, guest_address)
        for other in self._mappings[max(at - 1, 0) : at + 1]:
            if other.guest_address < new.end and new.guest_address < other.end:
                what = f"guest range {_range(new.guest_address, size)} overlaps {_range(*_extent(other))}"
                raise KvmError(errno.EEXIST, what)
        if guest_address < 0 or size <= 0:
            raise KvmError(errno.EINVAL, f"guest range {_range(guest_address, size)} has no address or size")
        self._starts.insert(at, guest_address)
        self._mappings.insert(at, new)
        return new

    def unmap(self, guest_address: int) -> None:
        """Remove the mapping that starts at *guest_address*."""
        at = bisect.bisect_left(self._starts, guest_address)
        if at == len(self._starts) or self._starts[at] != guest_address:
            raise KvmError(errno.ENOENT, f"no mapping starts at guest address {guest_address:#x}")
        del self._starts[at], self._mappings[at]

    def mapping_at(self, guest_address: int) -> Mapping | None:
        """The mapping that holds *guest_address*."""
        at = bisect.bisect_right(self._starts, guest_address) - 1
        if at >= 0 and guest_address < self._mappings[at].end:
            return self._mappings[at]
        return None

    def find(self, guest_address: int, length: int) -> int:
        """Host address of *length* bytes that lie in one mapping, else KvmError."""
        mapping = self.mapping_at(guest_address)
        if mapping is None or length < 0 or guest_address + length > mapping.end:
            raise _unmapped(guest_address, length)
        return mapping.host_address + guest_address - mapping.guest_address

    def read(self, guest_address: int, length: int) -> bytes:
        """A copy of *length* bytes, which may lie in several mappings that touch."""
        pieces = self._pieces(guest_address, length)
        return b"".join(mapping.memory.read(offset, size) for mapping, offset, size in pieces)

    def write(self, guest_address: int, data: bytes | bytearray | memoryview) -> None:
        """Write *data*, all of it or (when a byte of the range is unmapped) nothing."""
        view = memoryview(data).cast("B")
        done = 0
        for mapping, offset, size in self._pieces(guest_address, len(view)):
            mapping.memory.write(offset, view[done : done + size])
            done += size

    def _pieces(self, guest_address: int, length: int) -> list[tuple[Mapping, int, int]]:
        """The range as (mapping, offset in its memory, size), checked whole before anything is touched."""
        if length < 0:
            raise _unmapped(guest_address, length)
        pieces = []
        at, end = guest_address, guest_address + length
        while at < end:
            mapping = self.mapping_at(at)
            if mapping is None:
                raise _unmapped(guest_address, length)
            size = min(end, mapping.end) - at
            pieces.append((mapping, mapping.offset + at - mapping.guest_address, size))
            at += size
        return pieces


def _range(start: int, size: int) -> str:
    return f"{start:#x}..{start + size:#x}"


def _extent(mapping: Mapping) -> tuple[int, int]:
    return mapping.guest_address, mapping.size


def _unmapped(guest_address: int, length: int) -> KvmError:
    return KvmError(errno.EFAULT, f"{length:#x} bytes at guest address {guest_address:#x} are not all mapped")
