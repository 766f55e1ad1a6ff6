"""Userfaultfd for compiled rooms; every call returns 0 or an errno."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t


cdef struct FaultMessage:
    uint64_t address              # that was touched
    uint64_t flags                # UFFD_PAGEFAULT_FLAG_…
    uint32_t thread_id            # of who touched it; 0 when the kernel does not tell


cdef class Userfaultfd:
    cdef readonly int fd
    cdef readonly uint64_t features   # UFFD_FEATURE_…, of those that were wanted

    cdef register_mode(self, uint64_t address, uint64_t length, uint64_t mode, str name)
    cdef int copy(self, void *target, const void *source, uint64_t length, uint64_t *done) noexcept nogil
    cdef int zero(self, void *target, uint64_t length, uint64_t *done) noexcept nogil
    cdef int wake(self, void *target, uint64_t length) noexcept nogil
    cdef int protect(self, void *target, uint64_t length, bint on) noexcept nogil
    cdef int read_faults(self, FaultMessage *faults, int limit, int *count) noexcept nogil
