"""Memory that all processes of a server share: heartbeats, open sessions, counters, and the table of destinations.

Made by the supervisor before it forks; anonymous, so it is gone with the last process. Each worker has a column
of 64-bit words on cache lines of its own, which it alone adds to: its heartbeat, its open sessions, then the
counters of metrics.py. Totals are sums over the columns. Behind them stands the table: for each destination that
is sent to, or was dead, how many slots each worker has taken and until when it is dead. All access is atomic and
nobody waits for a lock: who finds a bucket of the table in another's hands is told "not now". So a process killed
at any instant leaves nothing half done; what a dead worker held the supervisor gives back (`clear`). What counters
and keys mean is not known here. An index outside the memory raises IndexError.
"""

from cpython.exc cimport PyErr_SetFromErrno
from libc.stdint cimport int64_t, uint64_t
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
    static inline int slot_swap(int64_t *slot, int64_t old, int64_t n) {
        return __atomic_compare_exchange_n(slot, &old, n, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
    }
    """
    void slot_add(int64_t* slot, int64_t n) noexcept
    int64_t slot_get(int64_t* slot) noexcept
    void slot_set(int64_t* slot, int64_t n) noexcept
    bint slot_swap(int64_t* slot, int64_t old, int64_t n) noexcept


cdef enum:
    CACHE_LINE = 8  # words
    # A worker's column
    HEARTBEAT = 0  # nanoseconds
    OPEN_SESSIONS = 1
    FIRST_COUNTER = 2
    # The table: BUCKETS times a cache line, whose first word is the worker that changes the bucket (+ 1), and WAYS places
    BUCKETS = 2048
    WAYS = 8
    TRIES = 100  # to get a bucket that another worker has: for 50 ns, unless it was stopped there
    # A place
    KEY = 0  # of a destination; 0: free
    DEAD = 1  # until then, nanoseconds
    FAILURES = 2  # in a row
    FIRST_WORKER = 3  # then for each worker: the slots it has taken, and when it was last refused one
    TAKEN = 0
    REFUSED = 1
    # Answers of `take`
    NOT_NOW = -1
    IS_DEAD = -2

cdef int64_t WANTING = 1000000000  # so long a worker counts as waiting for a slot after it was refused one


cdef class Shared:
    cdef int64_t* slots
    cdef int64_t* table
    cdef size_t bucket  # words from one bucket to the next
    cdef size_t place  # words from one place to the next
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
        self.place = FIRST_WORKER + 2 * <size_t>workers
        self.bucket = CACHE_LINE + WAYS * self.place
        cdef size_t columns = <size_t>workers * <size_t>self.column
        self.length = (columns + BUCKETS * self.bucket) * sizeof(int64_t)
        cdef void* memory = mmap(NULL, self.length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0)
        if memory == MAP_FAILED:
            PyErr_SetFromErrno(OSError)
        self.slots = <int64_t*>memory
        self.table = self.slots + columns

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
        cdef size_t number
        cdef int way
        cdef int64_t* bucket
        for number in range(BUCKETS):
            bucket = self.table + number * self.bucket
            slot_swap(bucket, worker + 1, 0)
            for way in range(WAYS):
                slot_set(self.of_worker(self.way(bucket, way), worker, TAKEN), 0)
        return held

    def add(self, int worker, int counter, int64_t n):
        self.check_counter(counter)
        slot_add(self.slot(worker, FIRST_COUNTER + counter), n)

    def total(self, int counter):
        self.check_counter(counter)
        return self.total_of(FIRST_COUNTER + counter)

    # The table of destinations

    cdef int64_t* way(self, int64_t* bucket, int number) noexcept:
        return bucket + CACHE_LINE + <size_t>number * self.place

    cdef int64_t* of_worker(self, int64_t* place, int worker, int what) noexcept:
        return place + FIRST_WORKER + 2 * <size_t>worker + what

    cdef int64_t* bucket_of(self, int64_t key) noexcept:
        return self.table + <size_t>(<uint64_t>key % BUCKETS) * self.bucket

    cdef bint is_waiting(self, int64_t* place, int worker, int64_t now) noexcept:
        cdef int64_t refused = slot_get(self.of_worker(place, worker, REFUSED))
        return refused != 0 and now - refused < WANTING

    cdef int64_t taken_of(self, int64_t* place) noexcept:
        cdef int64_t taken = 0
        cdef int worker
        for worker in range(self.workers):
            taken += slot_get(self.of_worker(place, worker, TAKEN))
        return taken

    cdef int64_t* find(self, int64_t key) noexcept:
        """The place of a destination, NULL when it has none. Without the bucket it may be another's a moment later."""
        cdef int64_t* bucket = self.bucket_of(key)
        cdef int number
        for number in range(WAYS):
            if slot_get(self.way(bucket, number) + KEY) == key:
                return self.way(bucket, number)
        return NULL

    cdef int64_t* vacate(self, int64_t key) noexcept:
        """A place for a new destination, where nobody has a slot: of those the one whose death is longest ago."""
        cdef int64_t* bucket = self.bucket_of(key)
        cdef int64_t* place
        cdef int64_t* best = NULL
        cdef int number
        for number in range(WAYS):
            place = self.way(bucket, number)
            if self.taken_of(place) == 0 and (best == NULL or slot_get(place + DEAD) < slot_get(best + DEAD)):
                best = place
        if best != NULL:  # the key last: a worker that is killed in between leaves a free place
            slot_set(best + KEY, 0)
            slot_set(best + DEAD, 0)
            slot_set(best + FAILURES, 0)
            slot_set(best + KEY, key)
        return best

    cdef int64_t* by_number(self, int64_t number) except NULL:
        if not 0 <= number < BUCKETS * WAYS:
            raise IndexError("no such place")
        return self.way(self.table + <size_t>(number // WAYS) * self.bucket, number % WAYS)

    cdef int64_t enter(self, int worker, int64_t* place, int64_t cap, int64_t now) noexcept:
        """Takes a slot at a place; the bucket is this worker's."""
        cdef int64_t* own = self.of_worker(place, worker, TAKEN)
        cdef int64_t others = 0
        cdef int other
        if slot_get(place + DEAD) > now:
            return IS_DEAD
        if slot_get(place + FAILURES):
            cap = 1  # somebody tries whether it is well again
        for other in range(self.workers):
            if other != worker and self.is_waiting(place, other, now):
                others += 1
        # Those who wait have an equal share each; where that is none, who was not refused yet lets them go first.
        cdef int64_t share = cap // (1 + others)
        if cap % (1 + others) and self.is_waiting(place, worker, now):
            share += 1
        if slot_get(own) >= share or self.taken_of(place) >= cap:
            slot_set(self.of_worker(place, worker, REFUSED), now)
            return NOT_NOW
        slot_set(self.of_worker(place, worker, REFUSED), 0)
        slot_add(own, 1)
        return 0

    def take(self, int worker, int64_t key, int64_t cap, double now):
        self.slot(worker, 0)
        cdef int64_t* bucket = self.bucket_of(key)
        cdef int tries = 0
        while not slot_swap(bucket, 0, worker + 1):
            tries += 1
            if tries == TRIES:
                return NOT_NOW
        cdef int64_t answer = NOT_NOW
        cdef int64_t* place = self.find(key)
        if place == NULL:
            place = self.vacate(key)
        if place != NULL:
            answer = self.enter(worker, place, cap, <int64_t>(now * 1e9))
        slot_set(bucket, 0)
        if answer < 0:
            return answer
        return <size_t>(bucket - self.table) // self.bucket * WAYS + <size_t>(place - bucket - CACHE_LINE) // self.place

    def give(self, int worker, int64_t place):
        self.slot(worker, 0)
        slot_add(self.of_worker(self.by_number(place), worker, TAKEN), -1)

    def taken(self, int64_t key):
        cdef int64_t* place = self.find(key)
        return 0 if place == NULL else self.taken_of(place)

    def failures(self, int64_t place):
        return slot_get(self.by_number(place) + FAILURES)

    def fail(self, int64_t place, int64_t failures, double until):
        cdef int64_t* found = self.by_number(place)
        if not slot_swap(found + FAILURES, failures, failures + 1):
            return False
        slot_set(found + DEAD, <int64_t>(until * 1e9))
        return True

    def well(self, int64_t place):
        cdef int64_t* found = self.by_number(place)
        slot_set(found + DEAD, 0)
        slot_set(found + FAILURES, 0)

    def dead_until(self, int64_t key):
        cdef int64_t* place = self.find(key)
        return 0.0 if place == NULL else slot_get(place + DEAD) / 1e9

    def forget(self, int64_t key):
        cdef int64_t* place = self.find(key)
        if place != NULL:
            slot_set(place + DEAD, 0)
            slot_set(place + FAILURES, 0)

    def forget_all(self):
        cdef int64_t number
        for number in range(BUCKETS * WAYS):
            self.well(number)


def die_with_parent(int signal):
    if prctl(PR_SET_PDEATHSIG, <unsigned long>signal) != 0:
        PyErr_SetFromErrno(OSError)
