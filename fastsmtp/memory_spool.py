"""The store that keeps nothing on the disk, for tests and benchmarks (`durability = "none"`).

The same faces as the Spool: messages with their drafts and marks in, STORED or Refused and jobs out. `append`
answers before it returns; jobs are handed over once for each round of the loop. What the queue gives back waits
here until it is due. Over the memory budget messages are refused, for there is nowhere else to put them. Every
message is lost with the process.
"""

from __future__ import annotations

import time
from asyncio import AbstractEventLoop
from collections.abc import Callable, Sequence
from heapq import heappop, heappush

from .ids import Ids
from .job import JOB_OCTETS, Draft, Job, Mark
from .message import Message
from .reply import R452_NO_ROOM
from .verdict import STORED, Refused, Stored

NO_MEMORY = "memory-full"
_FULL = Refused(NO_MEMORY, R452_NO_ROOM)
SMALL = 512  # shorter chunks are joined, as in bodies.py


class MemoryDraft:
    """A Draft (see job.py) that never leaves memory. `parts` is None when it did not fit there."""

    __slots__ = ("_spool", "_taken", "id", "parts", "size")

    def __init__(self, message_id: str, spool: MemorySpool) -> None:
        self.id = message_id
        self.size = 0
        self.parts: list[bytes] | None = []
        self._spool = spool
        self._taken = False

    @property
    def head(self) -> bytes:
        parts = self.parts
        if not parts:
            return b""
        if len(parts) > 1:
            parts[:] = [b"".join(parts)]
        return parts[0]

    def write(self, chunk: bytes) -> bool:
        parts = self.parts
        if parts is None:
            return True
        length = len(chunk)
        self.size += length
        spool = self._spool
        spool.used += length
        if spool.used > spool.limit:
            spool.used -= self.size
            self.parts = None
        elif parts and length < SMALL and len(parts[-1]) < SMALL:
            parts[-1] += chunk
        else:
            parts.append(chunk)
        return True

    def header_done(self) -> None:
        pass

    def take(self) -> list[bytes] | None:
        """The body, for the spool."""
        self._taken = True
        return self.parts

    def abandon(self) -> None:
        if not self._taken and self.parts is not None:
            self._spool.used -= self.size
            self.parts = None


class MemorySpool:
    """A Keeper and a Backlog (see job.py) in memory; `memory` is its limit in octets."""

    def __init__(
        self, worker: int, *, loop: AbstractEventLoop, memory: int, wall: Callable[[], float] = time.time
    ) -> None:
        self.on_stored: Callable[[list[Job]], None] = lambda _: None
        self.healthy = True
        self.over_budget = False  # a body that was dropped could not be read back
        self.limit = memory
        self.used = 0
        self._loop = loop
        self._ids = Ids(worker, 0, wall)
        self._key = 0  # of the newest job
        self._jobs: dict[int, Job] = {}
        self._stored: list[Job] = []
        self._due: list[tuple[float, int]] = []  # a heap: when, key

    @property
    def backlog(self) -> int:
        return len(self._jobs)

    def open(self) -> None:
        """Nothing has to be opened."""

    async def close(self) -> None:
        """What is not finished is lost."""
        self.healthy = False

    def next_id(self) -> str:
        return self._ids.next()

    def room(self, size: int = 0) -> bool:
        return self.healthy and self.used + size < self.limit

    def draft(self, message_id: str, drained: Callable[[], None]) -> MemoryDraft:
        """`drained` is never called: `write` always takes more."""
        return MemoryDraft(message_id, self)

    def append(
        self, message: Message, draft: Draft, answer: Callable[[Stored | Refused], None], marks: Sequence[Mark] = ()
    ) -> None:
        if not isinstance(draft, MemoryDraft):
            raise TypeError(f"a draft of another keeper: {draft!r}")
        parts = draft.take()
        if parts is None:
            answer(_FULL)
            return
        message.parts = parts
        self._key = key = self._key + 1
        job = Job(key, message, list(range(len(message.envelope.recipients))), checked=True)
        job.held = JOB_OCTETS + draft.size
        self.used += JOB_OCTETS
        self._jobs[key] = job
        if not self._stored:
            self._loop.call_soon(self._hand_over)
        self._stored.append(job)
        if marks:
            self.finish(marks)
        answer(STORED)

    def _hand_over(self) -> None:
        jobs, self._stored = self._stored, []
        self.on_stored(jobs)

    def finish(self, marks: Sequence[Mark]) -> None:
        for mark in marks:
            job = self._jobs[mark.key]
            if mark.due is not None:
                job.tried[mark.number] = mark
                continue
            job.pending.remove(mark.number)
            if not job.pending:
                del self._jobs[mark.key]
                self.used -= job.held

    def next_due(self) -> float | None:
        return self._due[0][0] if self._due else None

    async def claim(self, now: float, n: int) -> list[Job]:
        jobs: list[Job] = []
        while self._due and self._due[0][0] <= now and len(jobs) < n:
            _, key = heappop(self._due)
            jobs.append(self._jobs[key])
        return jobs

    async def read(self, job: Job) -> bool:
        return True

    def drop(self, job: Job) -> None:
        """The body stays: there is no other copy."""

    def release(self, job: Job) -> None:
        if job.pending:
            due = [mark.due or 0.0 if (mark := job.tried.get(number)) else 0.0 for number in job.pending]
            heappush(self._due, (min(due), job.key))
