"""A raw image file: the bytes of a disk, as they are.

    read · write · flush · discard · write_zeroes        by offset and length in bytes, within `size`

The size is fixed when the file is opened, rounded up to whole sectors; what the file does not have reads as zeroes.
With *direct* the host's page cache is passed by: whole blocks go through an aligned buffer of ours, and a write that
covers a block in part reads the rest of it first.

Who uses an image says so with locks on bytes that need not exist, the same ones as QEMU's, so both keep each other
off.  A lock on 100 + n says "I do this", one on 200 + n says "nobody else shall"; n is 0 for reading, 1 for writing.
A reader holds 100 and 201, a writer 101 as well.  A machine that waits for its state holds none: the image is still
another one's.

Threads   One at a time.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import stat
import struct

SECTOR_SIZE = 512
DIRECT_BLOCK = 4096  # bytes; every host file system takes this alignment
DIRECT_PIECE = 1 << 20  # bytes of the aligned buffer

_ZERO_PIECE = bytes(1 << 20)

# Not in Python's os and fcntl of 3.11.
_FALLOC_FL_KEEP_SIZE, _FALLOC_FL_PUNCH_HOLE, _FALLOC_FL_ZERO_RANGE = 0x01, 0x02, 0x10
_F_OFD_GETLK, _F_OFD_SETLK = 36, 37
_FLOCK = struct.Struct("@hhqqi")
_UNSUPPORTED = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV}

_USES, _FORBIDS = 100, 200
_READING, _WRITING = 0, 1
_PERMISSIONS = {_READING: "consistent read", _WRITING: "write"}

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long)


class BlockError(Exception):
    """An image cannot be had; the message is a sentence for the user, *hints* are lines to follow it."""

    def __init__(self, message: str, *hints: str) -> None:
        super().__init__(message)
        self.hints = hints


class RawImage:
    """The image in *path*; a context manager.  What the system refuses later raises OSError.

    size        bytes, a multiple of 512
    read_only   writes are refused with EPERM
    forgets     what is written is gone at the end, and nobody else can have it
    """

    forgets = False

    def __init__(
        self,
        path: str,
        *,
        read_only: bool = False,
        direct: bool = False,
        flushes: bool = True,
        unmaps: bool = False,
        locks: bool = True,
    ) -> None:
        """Open it, without a lock.  Raises BlockError.

        *flushes*: `flush` reaches the disk; *unmaps*: discarded ranges are given back to the file system;
        *locks*: `lock` really locks.
        """
        self.path = path
        self.read_only = read_only
        self._writes_file = not read_only
        self._flushes = flushes
        self._unmaps = unmaps
        self._locks = locks
        self._locked = False
        self._unflushed = False
        self._fd = _open(path, read_only, direct)
        self.size = -(-os.fstat(self._fd).st_size // SECTOR_SIZE) * SECTOR_SIZE
        self._buffer = mmap.mmap(-1, DIRECT_PIECE) if direct else None

    def __enter__(self) -> RawImage:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Give it back, locks and all; twice is allowed."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            if self._buffer is not None:
                self._buffer.close()

    # -- who uses it

    def lock(self) -> None:
        """Claim the file for reading, and for writing unless it is only read; nothing happens when that is done.

        BlockError when somebody else's claim stands against it.
        """
        if self._locked or not self._locks:
            return
        uses = [_READING, _WRITING] if self._writes_file else [_READING]
        for byte in (*(_USES + one for one in uses), _FORBIDS + _WRITING):
            self._set_lock(fcntl.F_RDLCK, byte)
        self._locked = True
        for one in uses:
            self._require_free(_FORBIDS + one, f'Failed to get "{_PERMISSIONS[one]}" lock')
        self._require_free(_USES + _WRITING, f'Failed to get shared "{_PERMISSIONS[_WRITING]}" lock')

    def unlock(self) -> None:
        """Let others have it."""
        if self._locked:
            for byte in (_USES + _READING, _USES + _WRITING, _FORBIDS + _WRITING):
                self._set_lock(fcntl.F_UNLCK, byte)
            self._locked = False

    def _set_lock(self, kind: int, byte: int) -> None:
        try:
            fcntl.fcntl(self._fd, _F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0))
        except OSError as error:
            self._locked = False
            raise BlockError(f"Failed to lock byte {byte} of '{self.path}': {error.strerror}") from error

    def _require_free(self, byte: int, refusal: str) -> None:
        """Nobody else holds *byte*."""
        found = fcntl.fcntl(self._fd, _F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
        if _FLOCK.unpack(found)[0] != fcntl.F_UNLCK:
            self.unlock()
            raise BlockError(refusal, f"Is another process using the image [{self.path}]?")

    # -- contents

    def read(self, offset: int, length: int) -> bytes:
        """*length* bytes from *offset*."""
        self._check_range(offset, length)
        data = self._read_blocks(offset, length) if self._buffer is not None else _pread(self._fd, offset, length)
        return data + bytes(length - len(data))

    def write(self, offset: int, data: bytes) -> None:
        """Write *data* at *offset*."""
        self._check_range(offset, len(data))
        self._require_writable()
        self._unflushed = True
        if self._buffer is not None:
            self._write_blocks(offset, data)
        else:
            _pwrite(self._fd, offset, memoryview(data))

    def flush(self) -> None:
        """What was written is on the disk when this returns."""
        if self._unflushed and self._flushes:
            os.fdatasync(self._fd)
        self._unflushed = False

    def discard(self, offset: int, length: int) -> None:
        """The range need not keep its contents; without *unmaps* it does."""
        self._check_range(offset, length)
        if self._unmaps and length and not self.read_only:
            self._unflushed = True
            self._allocate(_FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE, offset, length)

    def write_zeroes(self, offset: int, length: int, *, may_unmap: bool = False) -> None:
        """The range reads as zeroes; *may_unmap*: its room on the disk may go."""
        self._check_range(offset, length)
        self._require_writable()
        if not length:
            return
        self._unflushed = True
        if may_unmap and self._unmaps and self._allocate(_FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE, offset, length):
            return
        if self._allocate(_FALLOC_FL_ZERO_RANGE, offset, length):
            return
        for start in range(offset, offset + length, len(_ZERO_PIECE)):
            self.write(start, _ZERO_PIECE[: offset + length - start])

    def _allocate(self, mode: int, offset: int, length: int) -> bool:
        """fallocate; False when the file system cannot do that."""
        if _libc.fallocate(self._fd, mode, offset, length) == 0:
            return True
        number = ctypes.get_errno()
        if number not in _UNSUPPORTED:
            raise OSError(number, os.strerror(number))
        return False

    def _check_range(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise ValueError(f"{length:#x} bytes at {offset:#x} of an image of {self.size:#x} bytes")

    def _require_writable(self) -> None:
        if self.read_only:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    # -- past the page cache

    def _read_blocks(self, offset: int, length: int) -> bytes:
        """Like _pread, in whole blocks."""
        data = bytearray()
        while len(data) < length:
            at = offset + len(data)
            skip = at % DIRECT_BLOCK
            got = self._fill(at - skip, min(length - len(data) + skip, DIRECT_PIECE))
            if got <= skip:
                break
            assert self._buffer is not None
            data += self._buffer[skip : min(got, skip + length - len(data))]
        return bytes(data)

    def _write_blocks(self, offset: int, data: bytes) -> None:
        assert self._buffer is not None
        done = 0
        while done < len(data):
            start = (offset + done) // DIRECT_BLOCK * DIRECT_BLOCK
            skip = offset + done - start
            count = min(len(data) - done, DIRECT_PIECE - skip)
            whole = -(-(skip + count) // DIRECT_BLOCK) * DIRECT_BLOCK
            if skip or skip + count < whole:
                got = self._fill(start, whole)
                self._buffer[got:whole] = bytes(whole - got)
            self._buffer[skip : skip + count] = data[done : done + count]
            with memoryview(self._buffer) as view:
                self._write_whole_blocks(start, view[:whole])
            done += count

    def _write_whole_blocks(self, start: int, blocks: memoryview) -> None:
        """Write, but do not let the file grow past the size of the image."""
        _pwrite(self._fd, start, blocks)
        if start + len(blocks) > self.size:
            os.ftruncate(self._fd, self.size)

    def _fill(self, start: int, length: int) -> int:
        """Read whole blocks into the aligned buffer; how many bytes came, fewer only at the end of the file."""
        whole = -(-length // DIRECT_BLOCK) * DIRECT_BLOCK
        assert self._buffer is not None
        with memoryview(self._buffer) as view:
            done = 0
            while done < whole and done % DIRECT_BLOCK == 0:
                count = os.preadv(self._fd, [view[done:whole]], start + done)
                if count == 0:
                    break
                done += count
        return done


def _open(path: str, read_only: bool, direct: bool) -> int:
    """A descriptor of the regular file *path*."""
    flags = (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC | (os.O_DIRECT if direct else 0)
    try:
        fd = os.open(path, flags | os.O_NONBLOCK)  # a FIFO without a writer must not hold us up
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise BlockError(f"Could not open '{path}': {reason}") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise BlockError(f"'file' driver requires '{path}' to be a regular file")
    return fd


def _pread(fd: int, offset: int, length: int) -> bytes:
    """*length* bytes, or as many as there are."""
    data = os.pread(fd, length, offset)
    while 0 < len(data) < length:
        more = os.pread(fd, length - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data


def _pwrite(fd: int, offset: int, data: memoryview) -> None:
    """All of *data*."""
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)
