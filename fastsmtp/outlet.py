"""Where the lines of a log go: a descriptor that nobody waits for.

In: chunks of whole lines. Out: octets on the descriptor, in their order, a chunk at a time, so that what several
processes write to one pipe never mixes. Either a thread writes, or, in a process that will fork, the caller does, what
there is room for. `outstanding` says how much waits, so that the caller can stop in time; an error of the descriptor is
not raised, its lines are counted as lost. Not here: lines (log.py).
"""

from __future__ import annotations

import os
import select
import stat
import time
from collections import deque
from queue import SimpleQueue
from threading import Thread


def is_file(fd: int) -> bool:
    """Whether a write of any length is whole. To a pipe it is up to PIPE_BUF."""
    try:
        return stat.S_ISREG(os.fstat(fd).st_mode)
    except OSError:
        return False


class Outlet:
    """Writes without a thread, and without waiting: what there is no room for is kept for the next time.

    A pipe that can be written to takes PIPE_BUF octets. Another process may be quicker: then this one waits.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._kept: deque[tuple[bytes, int]] = deque()
        self._octets = 0
        self._lost = 0

    def outstanding(self) -> int:
        """Octets not yet written."""
        self._push(0)
        return self._octets

    def take_lost(self) -> int:
        """Lines lost to errors since the last call."""
        lost, self._lost = self._lost, 0
        return lost

    def put(self, chunk: bytes, lines: int) -> None:
        self._kept.append((chunk, lines))
        self._octets += len(chunk)
        self._push(0)

    def close(self, seconds: float) -> None:
        self._push(seconds)

    def _push(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while self._kept and _wait_writable(self._fd, end - time.monotonic()):
            chunk, lines = self._kept.popleft()
            self._octets -= len(chunk)
            try:
                written = os.write(self._fd, chunk)
            except BlockingIOError:
                written = 0
            except OSError:
                self._lost += lines
                continue
            if written < len(chunk):
                self._kept.appendleft((chunk[written:], lines))
                self._octets += len(chunk) - written


class ThreadOutlet:
    """Writes in a thread: `os.write` waits without the GIL. Each counter has one writer and needs no lock."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._queue: SimpleQueue[tuple[bytes, int] | None] = SimpleQueue()
        self._put = 0  # octets; the loop's
        self._done = 0  # octets; the thread's
        self._lost = 0  # lines; the thread's
        self._taken = 0  # lines; the loop's
        # A daemon: a reader that reads nothing must not keep the process alive.
        self._writer = Thread(target=self._run, name="log", daemon=True)
        self._writer.start()

    def outstanding(self) -> int:
        """Octets not yet written."""
        return self._put - self._done

    def take_lost(self) -> int:
        """Lines lost to errors since the last call."""
        lost = self._lost - self._taken
        self._taken += lost
        return lost

    def put(self, chunk: bytes, lines: int) -> None:
        self._put += len(chunk)
        self._queue.put((chunk, lines))

    def close(self, seconds: float) -> None:
        self._queue.put(None)
        self._writer.join(seconds)

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            chunk, lines = item
            rest = chunk
            try:
                while rest:
                    try:
                        rest = rest[os.write(self._fd, rest) :]
                    except BlockingIOError:  # somebody made the shared descriptor non-blocking
                        _wait_writable(self._fd, None)
            except OSError:
                self._lost += lines
            self._done += len(chunk)


def _wait_writable(fd: int, seconds: float | None) -> bool:
    """Whether a write will not wait; also true where it will fail."""
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return bool(poll.poll(None if seconds is None else max(0, seconds) * 1000))
