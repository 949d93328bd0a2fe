"""Memory that all processes of a server share: heartbeats, open sessions and counters.

Made by the supervisor before it forks; anonymous, so it is gone with the last process. Each worker has a column
of 64-bit slots on cache lines of its own, which it alone adds to: its heartbeat, its open sessions, then the
counters of metrics.py. Totals are sums over the columns. All access is atomic and takes no lock, so a process
killed at any instant leaves nothing half done; what a dead worker held open the supervisor takes off. What the
counters mean is not known here. An index outside the memory raises IndexError.
"""

from cpython.exc cimport PyErr_SetFromErrno
from libc.stdint cimport int64_t
from libc.stddef cimport size_t


cdef extern from "<sys/mman.h>" nogil:
    int PROT_READ, PROT_WRITE, MAP_SHARED, MAP_ANONYMOUS
    void* MAP_FAILED
    void* mmap(void* address, size_t length, int protection, int flags, int fd, long offset) noexcept
    int munmap(void* address, size_t length) noexcept


cdef extern from "<sys/prctl.h>" nogil:
    int PR_SET_PDEATHSIG
    int prctl(int option, unsigned long argument) noexcept


cdef extern from * nogil:
    """
    /* Sequentially consistent, so that of two workers that open a session at the same instant at least one sees
       both: a limit on the total holds exactly. A locked add costs 5 ns. */
    static inline void slot_add(int64_t *slot, int64_t n) { __atomic_fetch_add(slot, n, __ATOMIC_SEQ_CST); }
    static inline int64_t slot_get(int64_t *slot) { return __atomic_load_n(slot, __ATOMIC_SEQ_CST); }
    static inline void slot_set(int64_t *slot, int64_t n) { __atomic_store_n(slot, n, __ATOMIC_SEQ_CST); }
    """
    void slot_add(int64_t* slot, int64_t n) noexcept
    int64_t slot_get(int64_t* slot) noexcept
    void slot_set(int64_t* slot, int64_t n) noexcept


cdef enum:
    CACHE_LINE = 8  # slots
    HEARTBEAT = 0  # nanoseconds
    OPEN_SESSIONS = 1
    FIRST_COUNTER = 2


cdef class Shared:
    cdef int64_t* slots
    cdef size_t length
    cdef readonly int workers
    cdef readonly int counters
    cdef int column  # slots from one worker's column to the next's

    def __cinit__(self, int workers, int counters):
        self.slots = NULL
        if workers < 1 or counters < 0:
            raise ValueError("at least one worker and no negative number of counters")
        self.workers = workers
        self.counters = counters
        self.column = (FIRST_COUNTER + counters + CACHE_LINE - 1) // CACHE_LINE * CACHE_LINE
        self.length = <size_t>workers * <size_t>self.column * sizeof(int64_t)
        cdef void* memory = mmap(NULL, self.length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0)
        if memory == MAP_FAILED:
            PyErr_SetFromErrno(OSError)
        self.slots = <int64_t*>memory

    def __dealloc__(self):
        if self.slots != NULL:
            munmap(self.slots, self.length)

    cdef int64_t* slot(self, int worker, int number) except NULL:
        if not 0 <= worker < self.workers:
            raise IndexError("no such worker")
        return self.slots + <size_t>worker * self.column + number

    cdef int check_counter(self, int counter) except -1:
        if not 0 <= counter < self.counters:
            raise IndexError("no such counter")
        return 0

    cdef int64_t total_of(self, int number) noexcept:
        cdef int64_t total = 0
        cdef int worker
        for worker in range(self.workers):
            total += slot_get(self.slots + <size_t>worker * self.column + number)
        return total

    def beat(self, int worker, double monotonic_seconds):
        slot_set(self.slot(worker, HEARTBEAT), <int64_t>(monotonic_seconds * 1e9))

    def heartbeat(self, int worker):
        return slot_get(self.slot(worker, HEARTBEAT)) / 1e9

    def open_session(self, int worker):
        slot_add(self.slot(worker, OPEN_SESSIONS), 1)
        return self.total_of(OPEN_SESSIONS)

    def close_session(self, int worker):
        slot_add(self.slot(worker, OPEN_SESSIONS), -1)

    def open_sessions(self):
        return self.total_of(OPEN_SESSIONS)

    def clear(self, int worker):
        cdef int64_t* sessions = self.slot(worker, OPEN_SESSIONS)
        cdef int64_t held = slot_get(sessions)
        slot_set(sessions, 0)
        slot_set(self.slot(worker, HEARTBEAT), 0)
        return held

    def add(self, int worker, int counter, int64_t n):
        self.check_counter(counter)
        slot_add(self.slot(worker, FIRST_COUNTER + counter), n)

    def total(self, int counter):
        self.check_counter(counter)
        return self.total_of(FIRST_COUNTER + counter)


def die_with_parent(int signal):
    if prctl(PR_SET_PDEATHSIG, <unsigned long>signal) != 0:
        PyErr_SetFromErrno(OSError)
