"""Types and documentation of `_shared.pyx`. Workers and counters are numbered from 0."""

from typing import final

@final
class Shared:
    """The memory: zeros at first, shared with every process forked afterwards.

    Every method raises IndexError for a worker, counter or place that does not exist. OSError: no memory.

    The table of destinations has 16,384 places of which a destination uses one while a slot is taken, and until another
    needs it. `key` is a number of 64 bits other than 0; times are those of the machine's monotonic clock, in seconds.

    Rates: each `key` may spend `burst` at once, and one more each `interval` seconds; of 458,752 keys in sets of 7 the
    one that owes least is forgotten for a new one in its set. What is open: 126,976 keys in sets of 31, each kept as
    long as something of it is open. Their keys are made by `key`.
    """

    workers: int
    counters: int

    def __init__(self, workers: int, counters: int) -> None: ...
    def beat(self, worker: int, monotonic_seconds: float) -> None:
        """The worker's event loop went round at this time of the machine's monotonic clock."""

    def heartbeat(self, worker: int) -> float:
        """The time of the worker's last beat, to the nanosecond; 0.0: none yet."""

    def open_session(self, worker: int) -> int:
        """Counts a session in; the sessions now open in all workers, this one included."""

    def close_session(self, worker: int) -> None:
        """Counts a session out."""

    def open_sessions(self) -> int:
        """The sessions open in all workers."""

    def clear(self, worker: int) -> int:
        """Takes a dead worker's heartbeat, open sessions, slots and all it has open off; how many sessions these
        were. Its counters stay."""

    def add(self, worker: int, counter: int, n: int) -> None:
        """Adds n to a counter in the worker's column."""

    def total(self, counter: int) -> int:
        """A counter summed over all workers since the server started."""

    def take(self, worker: int, key: int, cap: int, now: float) -> int:
        """Takes one of a destination's `cap` slots; its place, for the methods below. Negative: there is none.
        -1: all are taken, or other workers wait for theirs and this one has its share, or the table is busy or full.
        -2: the destination is dead. One that was dead has one slot until it is known to be well."""

    def give(self, worker: int, place: int) -> None:
        """Gives a slot back."""

    def taken(self, key: int) -> int:
        """The slots of a destination that all workers have taken."""

    def failures(self, place: int) -> int:
        """How often in a row a destination was found dead. With a slot of it, like the next two."""

    def fail(self, place: int, failures: int, until: float) -> bool:
        """Makes a destination dead. False: not done, its failures are not `failures` any more: another worker was
        quicker."""

    def well(self, place: int) -> None:
        """The destination is well: no failures, not dead."""

    def dead_until(self, key: int) -> float:
        """0.0: it was never dead, or is known to be well."""

    def forget(self, key: int) -> None:
        """The destination may be tried at once, as if it had never failed."""

    def forget_all(self) -> None:
        """The same for every destination."""

    def key(self, kind: int, data: bytes) -> int:
        """The key of something: a hash of 64 bits under a secret that lives as long as this memory (SipHash-1-3)."""

    def spend(self, key: int, interval: float, burst: float, now: float, n: int = 1) -> float:
        """0.0: there were n, and they are spent. Else nothing is spent: seconds until there will be n. Exact over all
        processes. A negative n gives back, down to nothing owed. ValueError: `burst * interval` is no time up to a day,
        or n is 0."""

    def owes(self, key: int, interval: float, burst: float, now: float, n: int = 1) -> float:
        """The same, with nothing spent."""

    def forgive(self, key: int) -> None:
        """The key may spend as if it never had."""

    def enter(self, worker: int, key: int, cap: int) -> bool:
        """Opens one more under a key. False: `cap` are open, or there is no place for the key now. Never more than
        `cap` are open; when workers come at the same instant, one may be refused although one is free."""

    def leave(self, worker: int, key: int) -> None:
        """Closes one that this worker opened."""

    def entered(self, key: int) -> int:
        """How many all workers have open."""

def die_with_parent(signal: int) -> None:
    """The kernel sends this process `signal` when the thread that forked it ends (PR_SET_PDEATHSIG).

    To be called after setuid, which forgets it; a parent that died before is not noticed: compare getppid.
    """
