"""Userfaultfd: the kernel tells of pages that are missing and takes them, whole (postcopy.md §4).

    open      /dev/userfaultfd where it may be opened, else the system call
    API       which features the kernel offers is asked on a descriptor of its own; then those that are wanted and offered
    register  a range of addresses; the kernel says what it can do there
    copy, zero, wake, protect     for engines, without the GIL

Threads   one opens, registers and closes; the engines' calls may come from any thread at once.
Holds     EEXIST is no error: somebody else has placed the page, and it is whole
"""

import os

from libc.errno cimport EAGAIN, EEXIST, EINTR, EPERM, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from ..errors import MachineError

cdef extern from *:
    """
    #include <sys/ioctl.h>
    #include <sys/syscall.h>
    #include <linux/userfaultfd.h>
    #include <unistd.h>
    /* newer than some headers: bits of the kernel's interface */
    #define FEATURE_WP_HUGETLBFS_SHMEM (1 << 12)
    #define FEATURE_WP_UNPOPULATED (1 << 13)
    #ifndef USERFAULTFD_IOC_NEW
    #define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
    #endif
    """
    long syscall(long number, ...) nogil
    int ioctl(int fd, unsigned long request, ...) nogil
    ssize_t read(int fd, void *buffer, size_t count) nogil
    enum:
        SYS_userfaultfd
    unsigned long USERFAULTFD_IOC_NEW, UFFDIO_API, UFFDIO_REGISTER, UFFDIO_UNREGISTER, UFFDIO_WAKE
    unsigned long UFFDIO_COPY, UFFDIO_ZEROPAGE, UFFDIO_WRITEPROTECT
    uint64_t UFFD_API
    int _UFFDIO_COPY, _UFFDIO_ZEROPAGE, _UFFDIO_WAKE, _UFFDIO_WRITEPROTECT
    uint64_t UFFDIO_REGISTER_MODE_MISSING, UFFDIO_REGISTER_MODE_WP, UFFDIO_WRITEPROTECT_MODE_WP
    uint8_t UFFD_EVENT_PAGEFAULT
    uint64_t UFFD_FEATURE_THREAD_ID, UFFD_FEATURE_MISSING_HUGETLBFS, UFFD_FEATURE_MISSING_SHMEM
    uint64_t UFFD_FEATURE_PAGEFAULT_FLAG_WP
    uint64_t FEATURE_WP_UNPOPULATED, FEATURE_WP_HUGETLBFS_SHMEM
    struct uffdio_api:
        uint64_t api, features, ioctls
    struct uffdio_range:
        uint64_t start
        uint64_t len
    struct uffdio_register:
        uffdio_range range
        uint64_t mode, ioctls
    struct uffdio_copy:
        uint64_t dst, src, len, mode
        long long copy
    struct uffdio_zeropage:
        uffdio_range range
        uint64_t mode
        long long zeropage
    struct uffdio_writeprotect:
        uffdio_range range
        uint64_t mode
    struct feat_union "__typeof__(((struct uffd_msg *)0)->arg.pagefault.feat)":
        uint32_t ptid
    struct pagefault "__typeof__(((struct uffd_msg *)0)->arg.pagefault)":
        uint64_t flags, address
        feat_union feat
    union uffd_arg "__typeof__(((struct uffd_msg *)0)->arg)":
        pagefault pagefault
    struct uffd_msg:
        uint8_t event
        uffd_arg arg

cdef enum:
    MESSAGES_AT_A_TIME = 32

DEVICE = "/dev/userfaultfd"

THREAD_ID = UFFD_FEATURE_THREAD_ID
MISSING_HUGETLBFS = UFFD_FEATURE_MISSING_HUGETLBFS
MISSING_SHMEM = UFFD_FEATURE_MISSING_SHMEM
WRITE_PROTECT = UFFD_FEATURE_PAGEFAULT_FLAG_WP
WRITE_PROTECT_SHARED = FEATURE_WP_HUGETLBFS_SHMEM
WRITE_PROTECT_MISSING = FEATURE_WP_UNPOPULATED


def open_descriptor():
    """A new userfaultfd that also tells of what the kernel itself touches; MachineError says what would permit it."""
    cdef long fd
    cdef int number, device
    cdef long flags = os.O_CLOEXEC | os.O_NONBLOCK
    try:
        device = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        device = -1  # not there, or not for us: the system call may be
    if device >= 0:
        fd = ioctl(device, USERFAULTFD_IOC_NEW, flags)
        number = errno
        os.close(device)
        if fd >= 0:
            return fd
    fd = syscall(SYS_userfaultfd, flags)
    if fd >= 0:
        return fd
    number = errno
    if number == EPERM:
        raise MachineError(
            f"userfaultfd is not permitted here: 'sysctl vm.unprivileged_userfaultfd=1', or permission to read and write "
            f"{DEVICE} (Linux 6.1 and later), would permit it"
        )
    raise MachineError(f"userfaultfd cannot be opened: {os.strerror(number)}; a kernel with CONFIG_USERFAULTFD is needed")


cdef offer(int fd, uint64_t wanted):
    """Agree with the kernel on the API with the features *wanted*; those that it offers, and what it can do at all."""
    cdef uffdio_api api
    api.api = UFFD_API
    api.features = wanted
    api.ioctls = 0
    if ioctl(fd, UFFDIO_API, &api) != 0:
        raise MachineError(f"userfaultfd: UFFDIO_API with features {wanted:#x}: {os.strerror(errno)}")
    return api.features


def offered_features():
    """UFFD_FEATURE_… that the kernel offers; MachineError when it offers nothing at all to us."""
    fd = open_descriptor()
    try:
        return offer(fd, 0)
    finally:
        os.close(fd)


cdef class Userfaultfd:
    """An open userfaultfd; see uffd.pyi."""

    def __cinit__(self, uint64_t wanted=0):
        self.fd = -1
        self.features = wanted & offered_features()
        self.fd = open_descriptor()
        offer(self.fd, self.features)

    def __dealloc__(self):
        if self.fd >= 0:
            os.close(self.fd)

    def close(self):
        """Give the descriptor back; the kernel treats all ranges as ordinary memory again, and wakes who waits."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def register_missing(self, uint64_t address, uint64_t length, str name) -> bool:
        """Tell of missing pages in the range; True when the kernel can place zero pages there."""
        cdef uint64_t ioctls = self.register_mode(address, length, UFFDIO_REGISTER_MODE_MISSING, name)
        if not (ioctls >> _UFFDIO_COPY) & 1:
            raise MachineError(f"RAM block '{name}': the kernel cannot place pages in memory of this kind (UFFDIO_COPY)")
        return (ioctls >> _UFFDIO_ZEROPAGE) & 1

    def register_protected(self, uint64_t address, uint64_t length, str name) -> None:
        """Tell of writes to protected pages in the range."""
        cdef uint64_t ioctls = self.register_mode(address, length, UFFDIO_REGISTER_MODE_WP, name)
        if not (ioctls >> _UFFDIO_WRITEPROTECT) & 1:
            raise MachineError(f"RAM block '{name}': the kernel cannot protect memory of this kind (UFFDIO_WRITEPROTECT)")

    cdef register_mode(self, uint64_t address, uint64_t length, uint64_t mode, str name):
        cdef uffdio_register request
        request.range.start = address
        request.range.len = length
        request.mode = mode
        request.ioctls = 0
        if ioctl(self.fd, UFFDIO_REGISTER, &request) != 0:
            raise MachineError(
                f"RAM block '{name}': userfaultfd does not take its memory ({os.strerror(errno)}), "
                f"expected anonymous memory, a memfd, or a file on tmpfs or hugetlbfs"
            )
        return request.ioctls

    def unregister(self, uint64_t address, uint64_t length) -> None:
        """The range is ordinary memory again; who waits for a page of it goes on."""
        cdef uffdio_range request
        request.start = address
        request.len = length
        if ioctl(self.fd, UFFDIO_UNREGISTER, &request) != 0:
            raise MachineError(f"userfaultfd: UFFDIO_UNREGISTER of {length:#x} bytes: {os.strerror(errno)}")

    def release(self, uint64_t address, uint64_t length) -> None:
        """Nothing of the range is protected any more, nor told of; whoever waits goes on."""
        with nogil:
            self.protect(<void *> address, length, False)
        self.unregister(address, length)

    # ---- for engines ----

    cdef int copy(self, void *target, const void *source, uint64_t length, uint64_t *done) noexcept nogil:
        """Place *length* bytes, whole host pages; *done* of them are.  EEXIST when the first that is left was there already."""
        cdef uffdio_copy request
        done[0] = 0
        while done[0] < length:
            request.dst = <uint64_t> target + done[0]
            request.src = <uint64_t> source + done[0]
            request.len = length - done[0]
            request.mode = 0
            request.copy = 0
            if ioctl(self.fd, UFFDIO_COPY, &request) == 0:
                done[0] = length
                return 0
            if errno != EAGAIN and errno != EINTR:
                return errno
            if request.copy > 0:
                done[0] += request.copy
        return 0

    cdef int zero(self, void *target, uint64_t length, uint64_t *done) noexcept nogil:
        """Place zero pages, likewise."""
        cdef uffdio_zeropage request
        done[0] = 0
        while done[0] < length:
            request.range.start = <uint64_t> target + done[0]
            request.range.len = length - done[0]
            request.mode = 0
            request.zeropage = 0
            if ioctl(self.fd, UFFDIO_ZEROPAGE, &request) == 0:
                done[0] = length
                return 0
            if errno != EAGAIN and errno != EINTR:
                return errno
            if request.zeropage > 0:
                done[0] += request.zeropage
        return 0

    cdef int wake(self, void *target, uint64_t length) noexcept nogil:
        """Let who waits for a page of the range try again."""
        cdef uffdio_range request
        request.start = <uint64_t> target
        request.len = length
        return 0 if ioctl(self.fd, UFFDIO_WAKE, &request) == 0 else errno

    cdef int protect(self, void *target, uint64_t length, bint on) noexcept nogil:
        """Protect the range against writes, or let them happen and wake who waits."""
        cdef uffdio_writeprotect request
        while True:
            request.range.start = <uint64_t> target
            request.range.len = length
            request.mode = UFFDIO_WRITEPROTECT_MODE_WP if on else 0
            if ioctl(self.fd, UFFDIO_WRITEPROTECT, &request) == 0:
                return 0
            if errno != EAGAIN and errno != EINTR:
                return errno

    cdef int read_faults(self, FaultMessage *faults, int limit, int *count) noexcept nogil:
        """Up to *limit* faults that are waiting, without waiting for any."""
        cdef uffd_msg messages[MESSAGES_AT_A_TIME]
        cdef ssize_t length
        cdef int index
        count[0] = 0
        length = read(self.fd, messages, min(limit, <int> MESSAGES_AT_A_TIME) * sizeof(uffd_msg))
        if length < 0:
            return 0 if errno == EAGAIN or errno == EINTR else errno
        for index in range(<int> (length // <ssize_t> sizeof(uffd_msg))):
            if messages[index].event != UFFD_EVENT_PAGEFAULT:
                continue  # none of the others was asked for
            faults[count[0]].address = messages[index].arg.pagefault.address
            faults[count[0]].flags = messages[index].arg.pagefault.flags
            faults[count[0]].thread_id = messages[index].arg.pagefault.feat.ptid
            count[0] += 1
        return 0
