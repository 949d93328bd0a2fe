"""Memory that all processes of a server share: heartbeats, counters, destinations, what each client may and has open.

Made by the supervisor before it forks; anonymous, so it is gone with the last process. Each worker has a column
of 64-bit words on cache lines of its own, which it alone adds to: its heartbeat, its open sessions, then the
counters of metrics.py. Totals are sums over the columns. Behind them stands the table: for each destination that
is sent to, or was dead, how many slots each worker has taken and until when it is dead. Then come the rates (GCRA:
for each key the time at which it owes nothing more, in one word) and what is open (for each key a count per worker).
All access is atomic and nobody waits long for a lock: who finds a bucket or set in another's hands is told "not
now". So a process killed at any instant leaves nothing half done; what a dead worker held the supervisor gives back
(`clear`). What counters and keys mean is not known here. An index outside the memory raises IndexError.
"""

from cpython.exc cimport PyErr_SetFromErrno
from libc.errno cimport errno, ESRCH
from libc.math cimport ceil
from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint64_t
from libc.string cimport memcpy

import os


cdef extern from "<sys/mman.h>" nogil:
    int PROT_READ, PROT_WRITE, MAP_SHARED, MAP_ANONYMOUS
    void* MAP_FAILED
    void* mmap(void* address, size_t length, int protection, int flags, int fd, long offset) noexcept
    int munmap(void* address, size_t length) noexcept


cdef extern from "<sched.h>" nogil:
    int sched_yield() noexcept


cdef extern from "<signal.h>" nogil:
    int kill(int pid, int signal) noexcept


cdef extern from "<unistd.h>" nogil:
    int getpid() noexcept


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
    # The rates: RATE_SETS times a cache line, whose first word is the process that brings a key in, and RATE_WAYS rates
    RATE_SETS = 65536
    RATE_WAYS = 7
    UNITS = 65536  # of the clock of rates in a second: "1000/s" is kept to 0.7 %
    TIME_BITS = 40  # of a rate: after 194 days its clock begins again
    LONGEST = 86400  # seconds that a rate may owe
    # What is open: OPEN_SETS times OPEN_LINE words, the first as above, then OPEN_WAYS keys
    OPEN_SETS = 4096
    OPEN_LINE = 32
    OPEN_WAYS = 31
    PATIENCE = 1000  # times that a set in another's hands is waited for; what is done there takes 50 ns

cdef int64_t WANTING = 1000000000  # so long a worker counts as waiting for a slot after it was refused one
cdef uint64_t TIME = (<uint64_t>1 << TIME_BITS) - 1
cdef uint64_t AHEAD = <uint64_t>1 << 33  # 36 hours: what seems to be due later than that was due long ago


cdef uint64_t debt_of(uint64_t rate, uint64_t now) noexcept:
    """How many units of time a rate owes."""
    cdef uint64_t ahead = (rate - now) & TIME
    return ahead if ahead < AHEAD else 0


cdef uint64_t tag_of(uint64_t key) noexcept:
    """What of a key stands beside its time; never 0, which is a free place."""
    cdef uint64_t tag = key & ~TIME
    return tag if tag else TIME + 1


cdef bint hold(int64_t* lock) noexcept:
    """Takes a set for this process. A holder that was killed is followed; one that is stopped is not waited for."""
    cdef int64_t own = getpid()
    cdef int64_t holder
    cdef int tries
    for tries in range(PATIENCE):
        if slot_swap(lock, 0, own):
            return True
        if tries > TRIES:
            sched_yield()
    holder = slot_get(lock)
    if holder != 0 and kill(<int>holder, 0) != 0 and errno == ESRCH:
        return slot_swap(lock, holder, own)
    return False


cdef uint64_t turn(uint64_t word, int bits) noexcept:
    return word << bits | word >> (64 - bits)


cdef class _Sip:
    """SipHash-1-3 (Aumasson and Bernstein, 2012): who does not know the secret finds no two clients with one key."""

    cdef uint64_t k0, k1, v0, v1, v2, v3

    def __cinit__(self, bytes secret):
        memcpy(&self.k0, <const char*>secret, 8)
        memcpy(&self.k1, <const char*>secret + 8, 8)

    cdef void round(self) noexcept:
        self.v0 += self.v1
        self.v1 = turn(self.v1, 13) ^ self.v0
        self.v0 = turn(self.v0, 32)
        self.v2 += self.v3
        self.v3 = turn(self.v3, 16) ^ self.v2
        self.v0 += self.v3
        self.v3 = turn(self.v3, 21) ^ self.v0
        self.v2 += self.v1
        self.v1 = turn(self.v1, 17) ^ self.v2
        self.v2 = turn(self.v2, 32)

    cdef void take(self, uint64_t word) noexcept:
        self.v3 ^= word
        self.round()
        self.v0 ^= word

    cdef uint64_t hash(self, uint64_t kind, const unsigned char* data, size_t length) noexcept:
        cdef size_t at
        cdef uint64_t word
        self.v0 = self.k0 ^ <uint64_t>0x736F6D6570736575
        self.v1 = self.k1 ^ <uint64_t>0x646F72616E646F6D
        self.v2 = self.k0 ^ <uint64_t>0x6C7967656E657261
        self.v3 = self.k1 ^ <uint64_t>0x7465646279746573
        self.take(kind)
        for at in range(0, length & ~<size_t>7, 8):
            memcpy(&word, data + at, 8)
            self.take(word)
        word = (<uint64_t>length + 8) << 56
        memcpy(&word, data + (length & ~<size_t>7), length & 7)
        self.take(word)
        self.v2 ^= 0xFF
        self.round()
        self.round()
        self.round()
        return self.v0 ^ self.v1 ^ self.v2 ^ self.v3


cdef class Shared:
    cdef int64_t* slots
    cdef int64_t* table
    cdef int64_t* rates
    cdef int64_t* open_keys
    cdef int64_t* open_counts  # a column for each worker
    cdef _Sip sip
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
        cdef size_t places = OPEN_SETS * OPEN_LINE
        cdef size_t first_rate = (columns + BUCKETS * self.bucket + CACHE_LINE - 1) // CACHE_LINE * CACHE_LINE
        cdef size_t first_open = first_rate + RATE_SETS * CACHE_LINE
        self.length = (first_open + places * (1 + <size_t>workers)) * sizeof(int64_t)
        cdef void* memory = mmap(NULL, self.length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0)
        if memory == MAP_FAILED:
            PyErr_SetFromErrno(OSError)
        self.slots = <int64_t*>memory
        self.table = self.slots + columns
        self.rates = self.slots + first_rate
        self.open_keys = self.slots + first_open
        self.open_counts = self.open_keys + places
        self.sip = _Sip(os.urandom(16))

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
        cdef int64_t* own = self.open_counts + <size_t>worker * OPEN_SETS * OPEN_LINE
        for number in range(OPEN_SETS * OPEN_LINE):
            if slot_get(own + number) != 0:
                slot_set(own + number, 0)
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

    cdef int64_t take_slot(self, int worker, int64_t* place, int64_t cap, int64_t now) noexcept:
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
            answer = self.take_slot(worker, place, cap, <int64_t>(now * 1e9))
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

    # Rates and what is open, by key

    def key(self, int kind, const unsigned char[:] data):
        cdef const unsigned char* first = &data[0] if data.shape[0] else NULL
        cdef int64_t key = <int64_t>self.sip.hash(<uint64_t>kind, first, <size_t>data.shape[0])
        return key if key else 1

    cdef int64_t* set_of_rates(self, uint64_t key) noexcept:
        return self.rates + <size_t>(key % RATE_SETS) * CACHE_LINE

    cdef int64_t* find_rate(self, uint64_t key) noexcept:
        cdef int64_t* found = self.set_of_rates(key)
        cdef uint64_t tag = tag_of(key)
        cdef int way
        for way in range(1, RATE_WAYS + 1):
            if <uint64_t>slot_get(found + way) & ~TIME == tag:
                return found + way
        return NULL

    cdef bint bring_rate(self, uint64_t key, uint64_t rate, uint64_t now) noexcept:
        """Puts a new key into its set, instead of the one that owes least. False: another process has the set."""
        cdef int64_t* found = self.set_of_rates(key)
        cdef int64_t* best = NULL
        cdef uint64_t old = 0, word, least = 0
        cdef int way
        if not hold(found):
            return False
        if self.find_rate(key) == NULL:
            for way in range(1, RATE_WAYS + 1):
                word = <uint64_t>slot_get(found + way)
                if best == NULL or debt_of(word, now) < least:
                    best = found + way
                    old = word
                    least = debt_of(word, now)
                if word == 0 or least == 0:
                    break
            slot_swap(best, <int64_t>old, <int64_t>rate)
        slot_set(found, 0)
        return True

    cdef double charge(self, uint64_t key, double interval, double burst, double now, int n, bint spends) except -1:
        if not (interval > 0 and 0 < burst * interval <= LONGEST and n != 0):
            raise ValueError("a rate is of a positive interval and burst, and owes a day at most")
        cdef uint64_t cost = <uint64_t>ceil(interval * UNITS)
        cdef uint64_t time = <uint64_t>(now * UNITS) & TIME
        cdef uint64_t most = <uint64_t>(burst * <double>cost)
        cdef uint64_t rate, owed
        cdef int64_t* place
        cdef bint gives = n < 0
        cdef uint64_t change = cost * <uint64_t>(-<int64_t>n if gives else n)
        while True:
            place = self.find_rate(key)
            rate = 0 if place == NULL else <uint64_t>slot_get(place)
            if place != NULL and rate & ~TIME != tag_of(key):
                continue
            owed = 0 if place == NULL else debt_of(rate, time)
            if gives:
                owed -= min(owed, change)
            elif owed + change > most:
                return <double>(owed + change - most) / UNITS
            else:
                owed += change
            if not spends or gives and place == NULL:
                return 0.0
            if place != NULL:
                if slot_swap(place, <int64_t>rate, <int64_t>(tag_of(key) | (time + owed & TIME))):
                    return 0.0
            elif not self.bring_rate(key, tag_of(key) | time, time):
                return interval

    def spend(self, int64_t key, double interval, double burst, double now, int n=1):
        return self.charge(<uint64_t>key, interval, burst, now, n, True)

    def owes(self, int64_t key, double interval, double burst, double now, int n=1):
        return self.charge(<uint64_t>key, interval, burst, now, n, False)

    def forgive(self, int64_t key):
        cdef int64_t* place = self.find_rate(<uint64_t>key)
        cdef int64_t rate
        while place != NULL:
            rate = slot_get(place)
            if <uint64_t>rate & ~TIME == tag_of(<uint64_t>key):
                slot_swap(place, rate, 0)
            place = self.find_rate(<uint64_t>key)

    cdef int64_t count_at(self, size_t place) noexcept:
        cdef int64_t total = 0
        cdef int worker
        for worker in range(self.workers):
            total += slot_get(self.open_counts + <size_t>worker * OPEN_SETS * OPEN_LINE + place)
        return total

    cdef size_t find_open(self, int64_t key) noexcept:
        """The place of a key; 0, which is a lock, when it has none."""
        cdef size_t first = <size_t>(<uint64_t>key % OPEN_SETS) * OPEN_LINE
        cdef size_t place
        for place in range(first + 1, first + OPEN_LINE):
            if slot_get(self.open_keys + place) == key:
                return place
        return 0

    cdef size_t bring_open(self, int64_t key) noexcept:
        """A place for a key: its own, or one of which nothing is open. 0: there is none, or another has the set."""
        cdef size_t first = <size_t>(<uint64_t>key % OPEN_SETS) * OPEN_LINE
        cdef size_t place
        cdef size_t found
        cdef int64_t old
        if not hold(self.open_keys + first):
            return 0
        found = self.find_open(key)
        if found == 0:
            for place in range(first + 1, first + OPEN_LINE):
                if self.count_at(place) != 0:
                    continue
                # Who counts itself in now sees that the key is gone; who did it before is seen here.
                old = slot_get(self.open_keys + place)
                slot_set(self.open_keys + place, 0)
                if self.count_at(place) != 0:
                    slot_set(self.open_keys + place, old)
                    continue
                slot_set(self.open_keys + place, key)
                found = place
                break
        slot_set(self.open_keys + first, 0)
        return found

    def enter(self, int worker, int64_t key, int64_t cap):
        self.slot(worker, 0)
        cdef int64_t* own = self.open_counts + <size_t>worker * OPEN_SETS * OPEN_LINE
        cdef size_t place
        while True:
            place = self.find_open(key)
            if place == 0:
                place = self.bring_open(key)
                if place == 0:
                    return False
            slot_add(own + place, 1)
            if slot_get(self.open_keys + place) != key:
                slot_add(own + place, -1)
                continue
            if self.count_at(place) <= cap:
                return True
            slot_add(own + place, -1)
            return False

    def leave(self, int worker, int64_t key):
        self.slot(worker, 0)
        cdef size_t place = self.find_open(key)
        cdef int64_t* own = self.open_counts + <size_t>worker * OPEN_SETS * OPEN_LINE + place
        if place != 0 and slot_get(own) > 0:
            slot_add(own, -1)

    def entered(self, int64_t key):
        cdef size_t place = self.find_open(key)
        return 0 if place == 0 else self.count_at(place)


def die_with_parent(int signal):
    if prctl(PR_SET_PDEATHSIG, <unsigned long>signal) != 0:
        PyErr_SetFromErrno(OSError)
