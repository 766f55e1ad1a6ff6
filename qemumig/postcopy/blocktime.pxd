"""FaultTimes for compiled rooms."""

from libc.stdint cimport uint32_t, uint64_t

from .mutex cimport pthread_mutex_t

cdef enum:
    OTHERS = 64                   # threads that are no vCPUs and wait at once; more of them are not timed
    OCTAVES = 24                  # of microseconds: [1, 2), [2, 4) …; shorter counts with the first, longer with the last
    STEPS = 16                    # in which each octave is counted

cdef struct Wait:
    uint64_t address              # of the host page waited for; 0: none
    uint64_t since_ns


cdef class FaultTimes:
    cdef pthread_mutex_t lock
    cdef readonly int vcpus
    cdef uint32_t *thread_ids         # of each vCPU
    cdef Wait *waits                  # of each vCPU, then OTHERS more
    cdef int down                     # vCPUs that wait
    cdef uint64_t waiting             # all that wait; read without the lock
    cdef uint64_t last_fault_ns       # of a vCPU
    cdef uint64_t all_down_ns         # all vCPUs waited at once
    cdef uint64_t *blocked_ns         # of each vCPU
    cdef uint64_t *latency_ns         # sum of its waits, which may be for one page after the other
    cdef uint64_t *faults             # of each vCPU, then of all others together
    cdef uint64_t histogram[OCTAVES * STEPS]

    cdef void begin(self, uint64_t address, uint32_t thread_id) noexcept nogil
    cdef void end(self, uint64_t address, uint64_t length) noexcept nogil
    cdef int find_slot(self, uint32_t thread_id) noexcept nogil
    cdef void end_wait(self, int slot, uint64_t now) noexcept nogil
