"""Which pages of anonymous memory exist at all: the others are zero, and need not be read to know it.

In    a range of this process's memory
Out   one bit a page: set when the page may hold something else than zeroes

The kernel's page map tells: a page that is neither present nor swapped out has never been written, nor has one that is
mapped to the kernel's own page of zeroes.  Asking costs microseconds for 64 MiB; reading that memory would cost
milliseconds, and would populate it.

Only right for private anonymous memory.  An answer is as old as the question: who uses it must have asked after the
hypervisor had begun to log writes to the range, so that a page that comes to life later is known to be dirty.

Threads   one thread at a time per object; no GIL inside.
Holds     (1) when the kernel cannot tell, every page counts as populated
"""

import os

from libc.errno cimport EINTR, errno
from libc.stdint cimport uint64_t
from libc.string cimport memset

from ..wire.format cimport TARGET_PAGE_SIZE
from .bitmap cimport Bitmap, set_bit, word_count

cdef extern from *:
    """
    #include <stdint.h>
    #include <sys/ioctl.h>
    #include <unistd.h>

    /* linux/fs.h has these since 6.7; older headers are met more often than older kernels are. */
    struct qm_page_region { uint64_t start, end, categories; };
    struct qm_pm_scan_arg {
        uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
        uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
    };
    #define QM_PAGEMAP_SCAN _IOWR('f', 16, struct qm_pm_scan_arg)
    enum { QM_PAGE_IS_PRESENT = 1 << 3, QM_PAGE_IS_SWAPPED = 1 << 4, QM_PAGE_IS_PFNZERO = 1 << 5 };
    """
    struct qm_page_region:
        uint64_t start
        uint64_t end
        uint64_t categories
    struct qm_pm_scan_arg:
        uint64_t size
        uint64_t flags
        uint64_t start
        uint64_t end
        uint64_t walk_end
        uint64_t vec
        uint64_t vec_len
        uint64_t max_pages
        uint64_t category_inverted
        uint64_t category_mask
        uint64_t category_anyof_mask
        uint64_t return_mask
    enum: QM_PAGEMAP_SCAN
    enum: QM_PAGE_IS_PRESENT
    enum: QM_PAGE_IS_SWAPPED
    enum: QM_PAGE_IS_PFNZERO
    int ioctl(int fd, unsigned long request, void *argument) nogil
    int close_fd "close"(int fd) nogil
    ssize_t pread(int fd, void *buffer, size_t length, long offset) nogil

cdef enum:
    REGIONS = 256                 # answers of one PAGEMAP_SCAN
    ENTRIES = 512                 # of the page map read at once where there is no PAGEMAP_SCAN


cdef class PageMap:
    """The page map of this process; close it when done."""

    def __cinit__(self, *, bint scan=True):
        try:
            self.fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self.fd = -1
        self.can_scan = scan

    def close(self):
        """Give the descriptor back."""
        if self.fd >= 0:
            close_fd(self.fd)
            self.fd = -1

    def __dealloc__(self):
        if self.fd >= 0:
            close_fd(self.fd)

    cdef bint find_populated(self, uint64_t address, uint64_t pages, uint64_t *words) noexcept nogil:
        """Set the bits of the populated ones of *pages* pages from *address* on, clear the others.

        False, with every bit set, when the kernel does not say.
        """
        memset(words, 0, word_count(pages) * 8)
        if self.can_scan:
            if self.scan(address, pages, words):
                return True
            self.can_scan = False
            memset(words, 0, word_count(pages) * 8)
        if self.read_entries(address, pages, words):
            return True
        memset(words, 0xFF, word_count(pages) * 8)
        return False

    cdef bint scan(self, uint64_t address, uint64_t pages, uint64_t *words) noexcept nogil:
        cdef qm_page_region regions[REGIONS]
        cdef qm_pm_scan_arg argument
        cdef int count, index
        cdef uint64_t page
        memset(&argument, 0, sizeof(argument))
        argument.size = sizeof(argument)
        argument.walk_end = address
        argument.end = address + pages * TARGET_PAGE_SIZE
        argument.vec = <uint64_t> &regions[0]
        argument.vec_len = REGIONS
        argument.category_inverted = QM_PAGE_IS_PFNZERO
        argument.category_mask = QM_PAGE_IS_PFNZERO
        argument.category_anyof_mask = QM_PAGE_IS_PRESENT | QM_PAGE_IS_SWAPPED
        argument.return_mask = QM_PAGE_IS_PRESENT
        while argument.walk_end < argument.end:
            argument.start = argument.walk_end
            count = ioctl(self.fd, QM_PAGEMAP_SCAN, &argument)
            if count < 0:
                if errno == EINTR:
                    argument.walk_end = argument.start
                    continue
                return False
            for index in range(count):
                for page in range(
                    (regions[index].start - address) // TARGET_PAGE_SIZE,
                    (regions[index].end - address) // TARGET_PAGE_SIZE,
                ):
                    set_bit(words, page)
        return True

    cdef bint read_entries(self, uint64_t address, uint64_t pages, uint64_t *words) noexcept nogil:
        cdef uint64_t entries[ENTRIES]
        cdef uint64_t page = 0, count, index
        while page < pages:
            count = min(<uint64_t> ENTRIES, pages - page)
            if pread(self.fd, entries, count * 8, (address // TARGET_PAGE_SIZE + page) * 8) != <ssize_t> (count * 8):
                return False
            for index in range(count):
                if entries[index] >> 62:  # bit 63: present, bit 62: swapped out
                    set_bit(words, page + index)
            page += count
        return True

    def populated(self, uint64_t address, uint64_t pages) -> Bitmap:
        """The populated ones of *pages* pages from *address* on; all of them when the kernel does not say."""
        cdef Bitmap bitmap = Bitmap(pages)
        with nogil:
            known = self.find_populated(address, pages, bitmap.words)
        if not known:
            bitmap.set_all()
        return bitmap
