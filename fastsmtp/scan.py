"""Finds in the spool what the queue has not in memory and should have: two scans, each with a place it has reached.

New mail (of an earlier run, or released untried) is found in the order of its keys; what was deferred, in the
order of its due times. Both scans only move on, so that a thousand held jobs are not looked at again by each claim;
a job that is given back puts them back. A key that is held, or was while the claim ran, is never claimed: what
the reader saw of it may be older than its marks. The statements run in the file thread, each under 100 ms.
Not here: the marks and their commit. Errors of the reader end a claim early and are logged; nothing is skipped by
them. A message that cannot be read back is given to `set_aside`. What is on hold is not found.
"""

from __future__ import annotations

import json
from asyncio import Event
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import apsw

from .job import HELD, Job
from .reader import Reader, parse_messages
from .record import Loaded, parse_job
from .thread import OneThread

SCAN = 1024  # recipients in one statement, and parsed on the loop at once: 1 ms
LOAD = 128  # messages, likewise
RETRY_SECONDS = 5.0  # after an error

_NEW_START = (-1, -1)
_NEW_END = (1 << 63) - 1, 0
_DUE_START = (-(1 << 62), -1, -1)


class Scan:
    """`held` are the jobs in memory by key; the spool adds and, through `let_go`, removes them."""

    def __init__(
        self,
        reader: Reader,
        thread: OneThread,
        bodies: Path,
        set_aside: Callable[[int, str], None],
        warn: Callable[[str, str], None],
    ) -> None:
        self.held: dict[int, Job] = {}
        self._reader = reader
        self._reading = thread
        self._bodies = bodies
        self._set_aside = set_aside
        self._warn = warn
        self._new = _NEW_START
        self._due = _DUE_START
        self._next: float | None = None
        self._not_before = 0.0
        self._claiming = False
        self._gone: set[int] = set()  # let go since the claim began
        self._returned: list[Job] = []  # put back since then
        self._changed: set[int] = set()  # held, and their rows are no longer what they were when they were read
        self._overtaken: set[int] = set()  # rows changed since the claim began
        self._skipped: list[int] = []  # found by the claim, and overtaken
        self._woken = False  # something was made due since then
        self._ended = Event()  # of the claim

    def next_due(self) -> float | None:
        """When a claim may find something (0.0: now); None: not before something is released or deferred."""
        due = 0.0 if self._new != _NEW_END else self._next
        return None if due is None else max(due, self._not_before)

    def let_go(self, key: int) -> int:
        """A job leaves memory: its marks are durable. The octets it held."""
        if self._claiming:
            self._gone.add(key)
        self._changed.discard(key)
        job = self.held.pop(key, None)
        return job.held if job is not None else 0

    def put_back(self, job: Job) -> None:
        """What is pending of a job that is about to be let go is to be found again."""
        if job.key in self._changed:
            self.wake(())
        if self._claiming:  # this claim passes it over, and goes on behind it
            self._returned.append(job)
            return
        for number in job.pending:
            mark = job.tried.get(number)
            due = None if mark is None else mark.due
            if due is None:
                self._new = min(self._new, (job.key, -1))
            elif due != HELD:
                self._due = min(self._due, (int(due * 1000), -1, -1))
                self._next = due if self._next is None else min(self._next, due)

    def overtake(self, keys: Iterable[int]) -> None:
        """Recipients of these messages were put on hold, or made due; that is durable. A claim that runs may have
        read them before: it passes them over, and they are looked for again."""
        if self._claiming:
            self._overtaken.update(keys)

    def wake(self, keys: Iterable[int]) -> None:
        """Recipients of these messages were made due; that is durable. Jobs in memory do not know it: what is to be
        tried of them is found when they are put back."""
        self._changed.update(self.held.keys() & keys)
        self._woken = True
        if not self._claiming:
            self._look_again()

    def _look_again(self) -> None:
        """From the start of what is due; what is held there is passed over."""
        self._woken = False
        self._due = _DUE_START
        self._next = 0.0

    async def take(self, keys: Sequence[int]) -> list[Job]:
        """The jobs of these messages, those in memory excepted; now held. Raises apsw.Error."""
        while self._claiming:
            await self._ended.wait()
        self._begin_claim()
        jobs: list[Job] = []
        left = list(keys)
        try:
            while left:
                jobs += await self._load([key for key in left if key not in self.held])
                # Given back, or changed, while they were read: read once more.
                left = [key for key in left if key in self._gone or key in self._overtaken]
                self._gone.clear()
                self._overtaken.clear()
                self._skipped.clear()
        finally:
            self._end_claim()
        return jobs

    def _begin_claim(self) -> None:
        self._claiming = True
        self._ended.clear()

    def _end_claim(self) -> None:
        self._claiming = False
        self._gone.clear()
        returned, self._returned = self._returned, []
        for job in returned:
            self.put_back(job)
        self._overtaken.clear()
        if self._skipped:
            self._new = min(self._new, (min(self._skipped), -1))
            self._skipped.clear()
            self._woken = True
        if self._woken:
            self._look_again()
        self._ended.set()

    async def claim(self, now: float, n: int) -> list[Job]:
        """Up to about `n` jobs; one claim at a time, a second gets nothing."""
        jobs: list[Job] = []
        if self._claiming:
            return jobs
        self._begin_claim()
        try:
            while len(jobs) < n and self._new != _NEW_END:
                jobs += await self._claim_new(n - len(jobs))
            while len(jobs) < n:
                found, more = await self._claim_due(int(now * 1000), n - len(jobs))
                jobs += found
                if not more:
                    break
            self._not_before = 0.0
        except apsw.Error as error:
            self._warn("claim", str(error))
            self._not_before = now + RETRY_SECONDS
        finally:
            self._end_claim()
        return jobs

    async def _claim_new(self, n: int) -> list[Job]:
        behind = self._new
        rows: list[tuple[int, int, int]] = json.loads(await self._reading.call(lambda: self._reader.new(behind, SCAN)))
        keys: dict[int, None] = {}
        reached = _NEW_END
        for key, number, untried in rows:
            if untried and key not in keys:
                if len(keys) == n:
                    break
                if key not in self.held:
                    keys[key] = None
            reached = (key, number)
        else:
            if len(rows) < SCAN:
                reached = _NEW_END
        jobs = await self._load(list(keys))
        self._new = reached
        return jobs

    async def _claim_due(self, now_ms: int, n: int) -> tuple[list[Job], bool]:
        behind = self._due
        limit = min(SCAN, n)
        rows: list[tuple[int, int, int]] = json.loads(
            await self._reading.call(lambda: self._reader.due(behind, now_ms, limit))
        )
        reached = behind
        if rows:
            due, last, number = rows[-1]
            reached = (due, last, number)
        more = len(rows) == limit
        following = now_ms if more else await self._reading.call(lambda: self._reader.next_due(reached))
        jobs = await self._load(list({key: None for _, key, _ in rows if key not in self.held}))
        self._due = reached
        self._next = None if following is None else following / 1000
        return jobs, more

    async def _load(self, keys: list[int]) -> list[Job]:
        """The jobs of these keys, now held; all or, on an error, none."""
        rows: list[Loaded] = []
        for start in range(0, len(keys), LOAD):
            chunk = keys[start : start + LOAD]
            try:
                rows += parse_messages(await self._reading.call(partial(self._reader.messages, chunk)))
            except (ValueError, apsw.CorruptError):
                rows += await self._load_each(chunk)
        jobs: list[Job] = []
        found = {row[0]: row for row in rows}
        for key in keys:
            try:
                job = parse_job(found[key], self._bodies)
            except KeyError:
                continue  # finished meanwhile, or set aside just now
            except ValueError as error:
                self._set_aside(key, f"its record cannot be read: {error}")
                continue
            if key in self._overtaken:
                self._skipped.append(key)
            elif job.pending and key not in self._gone:
                self.held[key] = job
                jobs.append(job)
        return jobs

    async def _load_each(self, keys: list[int]) -> list[Loaded]:
        """One by one, when one of them spoils the answer for all."""
        rows: list[Loaded] = []
        for key in keys:
            try:
                rows += parse_messages(await self._reading.call(partial(self._reader.messages, [key])))
            except (ValueError, apsw.CorruptError) as error:
                self._set_aside(key, f"its record cannot be read: {error}")
        return rows
