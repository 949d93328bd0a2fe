"""Types and documentation of `_shared.pyx`. Workers and counters are numbered from 0."""

from typing import final

@final
class Shared:
    """The memory: zeros at first, shared with every process forked afterwards.

    Every method raises IndexError for a worker or counter that does not exist. OSError: no memory.
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
        """Takes a dead worker's heartbeat and open sessions off; how many these were. Its counters stay."""

    def add(self, worker: int, counter: int, n: int) -> None:
        """Adds n to a counter in the worker's column."""

    def total(self, counter: int) -> int:
        """A counter summed over all workers since the server started."""

def die_with_parent(signal: int) -> None:
    """The kernel sends this process `signal` when the thread that forked it ends (PR_SET_PDEATHSIG).

    To be called after setuid, which forgets it; a parent that died before is not noticed: compare getppid.
    """
