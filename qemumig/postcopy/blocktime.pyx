"""FaultTimes: who waited for pages, and for how long (postcopy.md §11).

    begin   a thread touched a page that is not here       end   the page was placed: all that waited for it go on

A vCPU is down from its fault to the placing of that page.  When the placing lets a vCPU go on while all of them were
down, the time since the last vCPU's fault counts as time in which the whole guest stood still.  Latencies are counted in
sixteen steps an octave, fine enough for percentiles, and folded into QEMU's 24 octaves.

Threads   `begin` by the fault thread, `end` by the receivers, the figures by anyone.
Holds     a wait begins once and ends once; the kernel may tell of the same one again
"""

from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free

from .mutex cimport pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock
from ..ram.bitmap cimport SEQ_CST, atomic_load

cdef extern from "<time.h>" nogil:
    cdef struct timespec:
        long tv_sec
        long tv_nsec
    int clock_gettime(int clock, timespec *now)
    enum: CLOCK_MONOTONIC


cdef uint64_t now_ns() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <uint64_t> now.tv_sec * 1000000000 + <uint64_t> now.tv_nsec


cdef int step_of(uint64_t ns) noexcept nogil:
    """Where in the histogram a latency is counted."""
    cdef uint64_t width = 1000
    cdef int octave = 0
    while octave < OCTAVES - 1 and ns >= 2 * width:
        width *= 2
        octave += 1
    if ns < width:
        return 0
    return octave * STEPS + <int> min((ns - width) * STEPS // width, <uint64_t> (STEPS - 1))


cdef class FaultTimes:
    """*thread_ids*: the kernel's numbers of the vCPU threads; see blocktime.pyi."""

    def __cinit__(self, thread_ids):
        cdef int index
        self.vcpus = len(thread_ids)
        self.thread_ids = <uint32_t *> calloc(self.vcpus + 1, sizeof(uint32_t))
        self.waits = <Wait *> calloc(self.vcpus + OTHERS, sizeof(Wait))
        self.blocked_ns = <uint64_t *> calloc(self.vcpus + 1, sizeof(uint64_t))
        self.latency_ns = <uint64_t *> calloc(self.vcpus + 1, sizeof(uint64_t))
        self.faults = <uint64_t *> calloc(self.vcpus + 1, sizeof(uint64_t))
        if not (self.thread_ids and self.waits and self.blocked_ns and self.latency_ns and self.faults):
            raise MemoryError("no memory for the times of page faults")
        for index in range(self.vcpus):
            self.thread_ids[index] = thread_ids[index]
        pthread_mutex_init(&self.lock, NULL)

    def __dealloc__(self):
        free(self.thread_ids)
        free(self.waits)
        free(self.blocked_ns)
        free(self.latency_ns)
        free(self.faults)
        pthread_mutex_destroy(&self.lock)

    # ---- the engine ----

    cdef int find_slot(self, uint32_t thread_id) noexcept nogil:
        """Where to note the wait of a thread; −1 when there is no room."""
        cdef int index
        for index in range(self.vcpus):
            if thread_id and self.thread_ids[index] == thread_id:
                return index
        for index in range(self.vcpus, self.vcpus + OTHERS):
            if self.waits[index].address == 0:
                return index
        return -1

    cdef void begin(self, uint64_t address, uint32_t thread_id) noexcept nogil:
        """A thread waits for the host page at *address* from now on."""
        cdef int slot
        pthread_mutex_lock(&self.lock)
        slot = self.find_slot(thread_id)
        if slot >= 0 and self.waits[slot].address == 0:
            self.waits[slot].address = address
            self.waits[slot].since_ns = now_ns()
            self.waiting += 1
            if slot < self.vcpus:
                self.down += 1
                self.last_fault_ns = self.waits[slot].since_ns
        pthread_mutex_unlock(&self.lock)

    cdef void end(self, uint64_t address, uint64_t length) noexcept nogil:
        """The range was placed."""
        cdef uint64_t now
        cdef int slot
        cdef bint all_down
        if atomic_load(&self.waiting, SEQ_CST) == 0:
            return
        now = now_ns()
        pthread_mutex_lock(&self.lock)
        all_down = self.vcpus > 0 and self.down == self.vcpus
        for slot in range(self.vcpus + OTHERS):
            if self.waits[slot].address == 0 or not address <= self.waits[slot].address < address + length:
                continue
            self.end_wait(slot, now)
            if slot < self.vcpus and all_down:
                self.all_down_ns += now - self.last_fault_ns
                all_down = False
        pthread_mutex_unlock(&self.lock)

    cdef void end_wait(self, int slot, uint64_t now) noexcept nogil:
        cdef uint64_t waited = now - self.waits[slot].since_ns
        cdef int who = min(slot, self.vcpus)
        self.waits[slot].address = 0
        self.waiting -= 1
        self.latency_ns[who] += waited
        self.faults[who] += 1
        self.histogram[step_of(waited)] += 1
        if slot < self.vcpus:
            self.down -= 1
            self.blocked_ns[slot] += waited

    # ---- the door ----

    def all_blocked_ns(self) -> int:
        """How long all vCPUs waited at once."""
        return self.all_down_ns

    def vcpu_blocked_ns(self) -> list:
        """How long each vCPU waited."""
        return [self.blocked_ns[index] for index in range(self.vcpus)]

    def vcpu_latency_ns(self) -> list:
        """What a wait of each vCPU took on average."""
        return [mean(self.latency_ns[index], self.faults[index]) for index in range(self.vcpus)]

    def other_latency_ns(self) -> int:
        """What a wait of everybody else took on average."""
        return mean(self.latency_ns[self.vcpus], self.faults[self.vcpus])

    def mean_latency_ns(self) -> int:
        """What a wait took on average."""
        return mean(sum(self.latency_ns[i] for i in range(self.vcpus + 1)), self.count())

    def count(self) -> int:
        """Waits that have ended."""
        return sum(self.faults[index] for index in range(self.vcpus + 1))

    def distribution(self) -> list:
        """How many waits fell into each octave of microseconds."""
        return [sum(self.histogram[o * STEPS + s] for s in range(STEPS)) for o in range(OCTAVES)]

    def percentile_us(self, double share) -> float:
        """The latency that *share* (0 … 1) of all waits did not exceed, in µs, to a sixteenth of its octave."""
        cdef double wanted = share * self.count()
        cdef uint64_t seen = 0
        cdef int index
        for index in range(OCTAVES * STEPS):
            seen += self.histogram[index]
            if seen and seen >= wanted:
                return (1 << index // STEPS) * (1 + (index % STEPS + 1) / <double> STEPS)
        return 0.0


def mean(total, count):
    return total // count if count else 0
