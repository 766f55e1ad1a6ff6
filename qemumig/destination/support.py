"""Whether this host can take a guest in by postcopy (postcopy.md §4).

Asked when the capability is switched on here, and again when the source advises: what is missing is said before anything
depends on it.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from ctypes import addressof, c_char

from ..errors import MachineError
from ..machine import Machine
from ..postcopy.uffd import MISSING_HUGETLBFS, MISSING_SHMEM, Userfaultfd, offered_features
from ..ram.block import RAMBlock
from ..wire.format import TARGET_PAGE_SIZE

HOST_PAGE_SIZE = mmap.PAGESIZE


def page_size_summary(blocks: Iterable[RAMBlock]) -> int:
    """The OR of the host page sizes of all blocks, which both ends compare."""
    summary = 0
    for block in blocks:
        summary |= block.page_size
    return summary


def check_support(machine: Machine) -> None:
    """MachineError says why pages of *machine* cannot be missing here, and what would help."""
    offered = offered_features()
    for block in machine.ram_blocks:
        wanted = MISSING_HUGETLBFS if block.page_size != HOST_PAGE_SIZE else 0
        wanted |= MISSING_SHMEM if block.shared else 0
        if wanted & ~offered:
            raise MachineError(f"RAM block '{block.idstr}': the kernel cannot tell of missing pages in memory of this kind")
    _try_registration()


def _try_registration() -> None:
    """Register a page of our own: what the kernel offers is one thing, what it does another."""
    page = mmap.mmap(-1, HOST_PAGE_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    uffd = Userfaultfd()
    try:
        uffd.register_missing(addressof(c_char.from_buffer(page)), HOST_PAGE_SIZE, "a page of this process")
    finally:
        uffd.close()


def check_registration(blocks: Iterable[RAMBlock]) -> None:
    """MachineError when the kernel does not tell of missing pages in *blocks* themselves, of which nobody uses any now."""
    uffd = Userfaultfd()
    try:
        for block in blocks:
            uffd.register_missing(block.host_address, block.used_length, block.idstr)
    finally:
        uffd.close()


def check_block(block: RAMBlock, fresh: bool) -> None:
    """MachineError when *block* cannot be filled page by page; *fresh*: nobody has written to it."""
    if block.used_length % block.page_size or block.page_size < TARGET_PAGE_SIZE:
        raise MachineError(
            f"RAM block '{block.idstr}' has {block.used_length:#x} bytes, expected whole host pages of {block.page_size:#x}"
        )
    if not (block.shared or block.anonymous or fresh):
        raise MachineError(
            f"RAM block '{block.idstr}' is a private mapping of a file that holds data, which would shine through where a "
            f"page is missing; share=on, or memory-backend-ram, would help"
        )
