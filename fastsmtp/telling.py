"""What is told, and the marks that stand for it: from the fates of a job's recipients to the spool.

In: fates. Out: marks; those with something to tell are kept together with the report that tells it. Failures and delays
of a message are told together; a success is not kept waiting, for it would be delivered again after a crash.
A report waits until the rest of its message is through, not for ever, and is offered to the spool until it is kept;
meanwhile the job counts it as one of its deliveries. When the server ends before, its recipients are tried again after
the next start; when it cannot be made, that is logged, and what has failed is tried again later and told then.
Not here: who is told (fate), how a report is written and kept (dsn, reporting), when a delivery is made (queue).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from pathlib import Path

from . import log as logs
from .bodies import read_beginning
from .fate import Fate, Fates
from .job import Backlog, Job
from .message import Message
from .reporting import Reports

TOGETHER = 60.0  # seconds that a failure waits for the message's other recipients, to be told with theirs


class Telling:
    """`let_go` is called with a job of which a report less is under way. Without `reports` there are no events."""

    def __init__(
        self, backlog: Backlog, fates: Fates, reports: Reports | None, log: logs.Log, let_go: Callable[[Job], None]
    ) -> None:
        self._backlog = backlog
        self._fates = fates
        self._reports = reports
        self._log = log
        self._let_go = let_go
        self._untold: dict[int, list[Fate]] = {}  # by the job's key: failures and delays that wait to be told
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = False

    def use(self, reports: Reports | None) -> None:
        """Goes on with others."""
        self._reports = reports

    @property
    def under_way(self) -> int:
        """Reports that are not kept yet."""
        return len(self._tasks)

    def settle(self, job: Job, fates: list[Fate]) -> None:
        """Makes the marks, at once or with what is told."""
        good = [fate for fate in fates if fate.event is not None and not fate.is_bad]
        bad = [fate for fate in fates if fate.is_bad]
        if good:
            self._begin(job, good, patience=0.0)
        if bad:
            untold = self._untold.get(job.key)
            if untold is not None:
                untold += bad
            else:
                self._untold[job.key] = bad
                self._begin(job, bad, patience=TOGETHER)
        self._backlog.finish([fate.mark for fate in fates if fate.event is None])

    def end(self) -> None:
        """Waits for nothing any more: the server ends."""
        self._closing = True

    async def close(self) -> None:
        """Returns when nothing is under way, behind `end`."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _begin(self, job: Job, fates: list[Fate], patience: float) -> None:
        job.deliveries += 1
        task = asyncio.create_task(self._tell(job, fates, patience))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _tell(self, job: Job, fates: list[Fate], patience: float) -> None:
        """`patience`: seconds to wait for what else of the message is under way."""
        assert self._reports is not None
        pause = 0.01
        while patience > 0 and job.deliveries > 1 and not self._closing:
            await asyncio.sleep(pause)
            patience -= pause
            pause = min(2 * pause, 1.0)
        if self._untold.get(job.key) is fates:
            del self._untold[job.key]
        left = [(fate.event, fate.mark) for fate in fates if fate.event is not None]
        try:
            head = await self._head(job, self._reports.head_size(job.message))
            await self._reports.keep(job.message, left, head, lambda: self._closing)
        except Exception as error:
            self._log.write(logs.BUG, "report", repr(error), logs.trace(error))
        if left:
            if self._closing:
                return
            self._backlog.finish([self._fates.untold(job, event, mark) for event, mark in left])
        job.deliveries -= 1
        self._let_go(job)

    async def _head(self, job: Job, size: int) -> bytes:
        """The first octets of the body, fewer when they cannot be read: a report goes without them."""
        message = job.message
        if message.file:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(None, partial(_read_head, Path(message.file), size))
        if message.parts is None:
            await self._backlog.read(job)
        return _head_of(message, size)


def _head_of(message: Message, size: int) -> bytes:
    return b"".join(message.parts or ())[:size]


def _read_head(path: Path, size: int) -> bytes:
    try:
        return read_beginning(path, size)
    except OSError:
        return b""
