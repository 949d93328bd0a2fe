"""How much may still be taken: octets in memory, free space of the spool's file system, and the ballast.

`drafts` are octets received and not yet on the disk, `jobs` those of messages that wait for delivery; together
they stand against the memory budget, and drafts count as used space too. Free space is asked once a second. On a
full disk SQLite can neither update nor delete, so a preallocated file is given up for it then; while that is
missing nothing is accepted, and it is made anew (in a thread) when there is room for it twice over.
A file system that cannot be asked has no room. Quotas are not seen here: they show as errors of a commit.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from .thread import OneThread

BALLAST_OCTETS = 2 << 20
LOOK_SECONDS = 1.0


class Ballast:
    """The file that is given up when the disk is full."""

    __slots__ = ("_path", "there")

    def __init__(self, path: Path) -> None:
        self._path = path
        self.there = False

    def make(self) -> None:
        """Allocates it, for `there` to tell; what is left of an earlier one is used. Does not raise."""
        try:
            fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(fd, 0, BALLAST_OCTETS)
            finally:
                os.close(fd)
            self.there = True
        except OSError:
            self.give_up()

    def give_up(self) -> None:
        """Removes it."""
        self.there = False
        try:
            os.unlink(self._path)
        except OSError:
            pass  # it is not there, or the file system takes no change at all: the next commit says so


class Room:
    """Answers whether a message may be taken, in less than a microsecond."""

    __slots__ = ("_directory", "_free", "_look_at", "_min_free", "_monotonic", "ballast", "drafts", "jobs", "limit")

    def __init__(self, directory: Path, min_free: int, memory: int, monotonic: Callable[[], float]) -> None:
        self._directory = directory
        self._min_free = min_free
        self._monotonic = monotonic
        self._free = 0
        self._look_at = float("-inf")
        self.ballast = Ballast(directory / "ballast")
        self.limit = memory
        self.drafts = 0
        self.jobs = 0

    def fits(self, size: int, thread: OneThread) -> bool:
        """Whether a message of `size` octets may be taken. `thread` makes the ballast when it is missing."""
        if self._monotonic() >= self._look_at:
            self._look()
            if not self.ballast.there and self._free >= self._min_free + 2 * BALLAST_OCTETS:
                thread.run(self.ballast.make, lambda _: self.look_again())
        return (
            self.ballast.there
            and self.drafts + self.jobs < self.limit
            and self._free - self.drafts - size >= self._min_free
        )

    def look_again(self) -> None:
        """What was known of the free space is no longer true."""
        self._look_at = float("-inf")

    def _look(self) -> None:
        self._look_at = self._monotonic() + LOOK_SECONDS
        try:
            state = os.statvfs(self._directory)
            self._free = state.f_bavail * state.f_frsize
        except OSError:
            self._free = -1  # less than any size
