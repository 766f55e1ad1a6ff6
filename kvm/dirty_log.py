"""Dirty logging, slot by slot: which guest pages were written since somebody last asked.

Out   a bitmap in the caller's own words: bit k of word w is page 64 w + k of the slot

    mode          a fetch                                  a page is reported again
    automatic     reports and forgets                      when it is written after that fetch
    manual        reports                                  by every fetch, until `clear` names it; after that
                                                           when it is written again

In manual mode a page must be cleared *before* its bytes are read: a write in between makes it dirty anew.
Where the kernel offers it, `start` then sets the whole bitmap (`initially_set`) instead of write-protecting all
of the guest at once, so that a guest that runs does not have to wait for that; the first clear of a page protects it.
With nobody to wait, `at_once` saves the clears.

Threads   The guest may run; calls for one slot come from one thread at a time.
"""

from __future__ import annotations

import errno
from ctypes import addressof, byref, c_char
from typing import Any

from . import ioctls
from .errors import KvmError
from .ioctls import Cap, Request, call
from .structs import (
    KVM_DIRTY_LOG_INITIALLY_SET,
    KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
    KVM_MEM_LOG_DIRTY_PAGES,
    kvm_clear_dirty_log,
    kvm_dirty_log,
)
from .vm import Vm

WORD_PAGES = 64
WORD_BYTES = 8


class DirtyLog:
    """The dirty logs of a VM's slots."""

    def __init__(self, vm: Vm, *, manual: bool = True) -> None:
        """Manual mode where *manual* is wished and the kernel has it; it holds for the whole VM."""
        self.vm = vm
        offered = vm.check_extension(Cap.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2) if manual else 0
        flags = offered & (KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET)
        self.manual = bool(flags & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE)
        self.initially_set = self.manual and bool(flags & KVM_DIRTY_LOG_INITIALLY_SET)
        if self.manual:
            vm.enable_cap(Cap.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, flags)

    def start(self, *slots: int, at_once: bool = False) -> None:
        """Log writes to *slots*; those that are logged already go on.  *at_once*: protect all of their pages now."""
        if self.initially_set:
            flags = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | (0 if at_once else KVM_DIRTY_LOG_INITIALLY_SET)
            self.vm.enable_cap(Cap.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, flags)
        for slot in slots:
            flags = self.vm.slot(slot, ioctls.KVM_SET_USER_MEMORY_REGION).flags
            self.vm.set_slot_flags(slot, flags | KVM_MEM_LOG_DIRTY_PAGES)

    def stop(self, *slots: int) -> None:
        """Log writes to *slots* no more; what was logged is gone."""
        for slot in slots:
            flags = self.vm.slot(slot, ioctls.KVM_SET_USER_MEMORY_REGION).flags
            self.vm.set_slot_flags(slot, flags & ~KVM_MEM_LOG_DIRTY_PAGES)

    def fetch(self, slot: int, words: Any) -> None:
        """Write the slot's dirty bits over *words*; see the table above for what that does to the log.

        *words*: a writable, contiguous buffer of ceil(pages / 64) 64-bit words or more; memoryview or ctypes
        array.  Raises KvmError, ENOENT when the slot is not logged.
        """
        request = ioctls.KVM_GET_DIRTY_LOG
        buffer = _words(words, self.vm.slot(slot, request).pages, slot, request)
        log = kvm_dirty_log(slot=slot, dirty_bitmap=addressof(buffer))
        call(self.vm.fd, request, byref(log), f" (slot {slot})")

    def clear(self, slot: int, words: Any, first_page: int, page_count: int) -> None:
        """Forget, and protect again, the pages whose bits are set in *words*; manual mode only.

        Bit 0 of *words*[0] is *first_page*, a multiple of 64; *page_count* is one too, unless the range ends
        with the slot.
        """
        request = ioctls.KVM_CLEAR_DIRTY_LOG
        where = f"{request.name} (slot {slot}, {page_count} pages from {first_page}"
        if not self.manual:
            raise KvmError(errno.EINVAL, f"{where}: this log clears itself when it is fetched)")
        pages = self.vm.slot(slot, request).pages
        if not (0 <= first_page < pages and 0 < page_count <= pages - first_page):
            raise KvmError(errno.EINVAL, f"{where}: the slot has {pages} pages)")
        whole = page_count % WORD_PAGES == 0 or first_page + page_count == pages
        if first_page % WORD_PAGES or not whole:
            raise KvmError(errno.EINVAL, f"{where}: expected multiples of {WORD_PAGES}, or the slot's end)")
        buffer = _words(words, page_count, slot, request)
        log = kvm_clear_dirty_log(slot=slot, num_pages=page_count, first_page=first_page, dirty_bitmap=addressof(buffer))
        call(self.vm.fd, request, byref(log), f" (slot {slot}, {page_count} pages from {first_page})")


def _words(words: Any, pages: int, slot: int, request: Request) -> c_char:
    """*words* as something with an address, once it is known to hold a bit for each of *pages*.

    ctypes refuses a buffer that is read-only or not contiguous (TypeError); the result keeps it alive.
    """
    needed = (pages + WORD_PAGES - 1) // WORD_PAGES * WORD_BYTES
    size = memoryview(words).nbytes
    if size < needed:
        what = f"a bitmap of {size} bytes for {pages} pages, expected {needed} bytes or more"
        raise KvmError(errno.EINVAL, f"{request.name} (slot {slot}: {what})")
    return c_char.from_buffer(words)
