"""Memory given back, so that touching it faults (postcopy.md §3, §4).

    private memory        MADV_DONTNEED
    shared memory         MADV_REMOVE: what is behind it has a hole then, for everybody who maps it
    a private file        only while nobody has written to it: what it holds would shine through

Huge pages are switched off before: the kernel would fill a whole one at the first touch, and its other pages could not be
missing any more.
"""

from __future__ import annotations

import ctypes
import mmap
import os

from ..errors import MachineError
from ..ram.bitmap import Bitmap
from ..ram.block import RAMBlock
from ..wire.format import TARGET_PAGE_SIZE

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def forget_range(block: RAMBlock, start: int, length: int) -> None:
    """Give *length* bytes of *block* from *start* back, whole host pages; MachineError when the kernel refuses."""
    advice = mmap.MADV_REMOVE if block.shared else mmap.MADV_DONTNEED
    if _libc.madvise(block.host_address + start, length, advice) != 0:
        reason = os.strerror(ctypes.get_errno())
        raise MachineError(f"RAM block '{block.idstr}': {length:#x} bytes at {start:#x} cannot be given back: {reason}")


def forget_received(block: RAMBlock, received: Bitmap, start: int, length: int) -> None:
    """Give a range back, and note that nothing of it is here."""
    forget_range(block, start, length)
    received.clear_range(start // TARGET_PAGE_SIZE, length // TARGET_PAGE_SIZE)


def allow_huge_pages(block: RAMBlock, allow: bool) -> None:
    """Advice about transparent huge pages: a kernel without them refuses it, and all goes on as well."""
    _libc.madvise(block.host_address, block.used_length, mmap.MADV_HUGEPAGE if allow else mmap.MADV_NOHUGEPAGE)
