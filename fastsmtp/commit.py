"""Group commit: all that came while one commit ran goes into the next, and is answered when that is durable.

In: messages that wait for their answer, recipients finished or deferred, jobs given back. Out: STORED or Refused
for each message, then the jobs of a batch in its order. When nothing runs a batch begins at the end of the same
round of the loop: there is no timer. Statements run on the loop, COMMIT and checkpoints in the writer thread;
from handing one over until its answer nothing touches that connection, what comes waits (waiting.py).
A commit that failed leaves its batch undecided. Its senders hear a 4xx only when their messages have been
deleted and that is on the disk; else they hear nothing. Its marks go into the next batch. Until the store works
again no message is taken, and nothing may be sent: what cannot be marked would be sent twice.
A batch that a report came with is decided by looking: where the report is found it was durable, and nothing of it is
taken back.
"""

from __future__ import annotations

from asyncio import AbstractEventLoop, Future, Task, sleep, wait
from collections.abc import Callable
from functools import partial
from pathlib import Path

from .bodies import remove
from .job import JOB_OCTETS, Job, Mark
from .reader import Reader
from .reply import R451_LOCAL_ERROR, R452_NO_ROOM
from .room import Room
from .scan import RETRY_SECONDS, Scan
from .store import PAGE, SPARE_PAGES, Store
from .thread import OneThread
from .trouble import Trouble
from .verdict import STORED, Refused, Stored
from .waiting import Entry, Round, Waiting

CLOSE_SECONDS = 5.0  # for a store that does not work
LONG_LOG_PAGES = (64 << 20) // PAGE  # a write-ahead log of this length is worth a line

# Reasons of a Refused, the same words in log and metrics
NO_ROOM = "spool-no-room"
FAILED = "spool-failed"
UNDECIDED = "spool-undecided"
UNHEALTHY = "spool-unhealthy"


def refusal(full: bool) -> Refused:
    """What the sender hears: for lack of space, or for any other error."""
    return Refused(NO_ROOM, R452_NO_ROOM) if full else Refused(FAILED, R451_LOCAL_ERROR)


class GroupCommit:
    """The one user of a Store while it runs. Used on the loop's thread only.

    `stored` is called with the jobs of each batch, after its messages were answered.
    """

    def __init__(
        self,
        loop: AbstractEventLoop,
        store: Store,
        reader: Reader,
        writer: OneThread,
        files: OneThread,
        room: Room,
        scan: Scan,
        trouble: Trouble,
        stored: Callable[[list[Job]], None],
        backlog: int,
        broken: int,
    ) -> None:
        self.backlog = backlog  # messages not finished
        self.broken = broken  # messages set aside
        self.commits = 0
        self.commits_failed = 0
        self.healthy = True
        self._loop = loop
        self._store = store
        self._reader = reader
        self._writer = writer
        self._files = files
        self._room = room
        self._scan = scan
        self._trouble = trouble
        self._stored = stored
        self._closing = False
        self._busy = False  # a batch is being made, or the connection is the writer thread's
        self._quiet: Future[None] | None = None
        self._recovery: Task[None] | None = None
        self._refused = Refused(UNHEALTHY, R451_LOCAL_ERROR)  # the answer while it is not healthy
        self._failures = 0  # commits that failed since the last that did not
        self._freed = 0  # octets of bodies deleted since free pages were last given back
        self._round = Round()  # of the commit that runs
        self._waiting = Waiting()  # for the next

    def enter(self, entry: Entry) -> None:
        """Takes a message whose body is in the row or durable in its file."""
        if self.healthy and not self._closing:
            self._waiting.entries.append(entry)
            self._schedule()
        else:
            entry.draft.discard()
            entry.answer(self._refused)

    def finish(self, job: Job, mark: Mark) -> None:
        """Takes what became of a recipient of a held job."""
        if self._waiting.finish(job, mark):
            self._forget_octets(job)
        self._schedule()

    def _forget_octets(self, job: Job) -> None:
        """Of a job that is over."""
        self._freed += job.message.size
        self._room.jobs -= job.held
        job.held = 0

    def release(self, job: Job) -> None:
        """Lets a job go, behind the marks that came before."""
        self._waiting.released.append(job)
        self._schedule()

    def hold(self, rows: list[tuple[int, int]]) -> None:
        """Puts recipients (key, number) on hold."""
        self._waiting.rows.hold += rows
        self._schedule()

    def wake(self, rows: list[tuple[int, int]], due: float) -> None:
        """Makes recipients (key, number) due, also those on hold."""
        self._waiting.rows.wake += [(int(due * 1000), key, number) for key, number in rows]
        self._schedule()

    def erase(self, keys: list[int]) -> None:
        """Deletes messages that were set aside."""
        self._waiting.rows.erased += keys
        self._schedule()

    async def flushed(self) -> bool:
        """Returns when all that was handed over before is durable; False: the spool was closed before."""
        if self._closing:
            return False
        watcher: Future[bool] = self._loop.create_future()
        self._waiting.watchers.append(watcher)
        self._schedule()
        return await watcher

    def set_aside(self, key: int, why: str, since: float) -> bool:
        """Takes a message out of delivery. False: that is under way."""
        waiting = self._waiting
        if key in waiting.asides:
            return False
        waiting.asides.add(key)
        waiting.rows.aside.append((key, why, since))
        self._schedule()
        return True

    async def close(self) -> None:
        """Commits what waits, unless the store does not work."""
        self._closing = True
        while self._busy:
            if self._recovery is None:
                self._quiet = self._loop.create_future()
                await self._quiet
                continue
            await wait({self._recovery}, timeout=CLOSE_SECONDS)
            if self._recovery is not None:
                self._recovery.cancel()
                self._answer([*self._round.entries, *self._round.reports], Refused(UNDECIDED, None))
                break
        self.healthy = False
        self._busy = True  # for good: a mark that comes later would open the database anew
        for watcher in (*self._waiting.watchers, *self._round.watchers):
            if not watcher.done():
                watcher.set_result(False)

    def _schedule(self) -> None:
        if not self._busy:
            self._busy = True
            self._loop.call_soon(self._next)

    def _next(self) -> None:
        """Begins the next batch; the connection is the loop's."""
        if self._waiting:
            self._begin()
        elif self._freed > SPARE_PAGES * PAGE and not self._closing:
            self._round = Round()
            self._writer.run(self._store.vacuum, self._vacuumed)
        else:
            self._busy = False
            self._tell_quiet()

    def _begin(self) -> None:
        work = self._round = self._waiting.take(self._scan.held)
        if not work.batch:
            self._settle(work)
            self._next()
            return
        try:
            self._store.write(work.batch)
        except Exception as error:
            self._fail(error)
            return
        self._writer.run(self._store.commit, self._committed)

    def _apply_told(self, work: Round) -> None:
        """They are durable. Others of the same job may have been made meanwhile."""
        held = self._scan.held
        for mark in work.told:
            job = held[mark.key]
            if mark.due is not None:
                job.tried[mark.number] = mark
                continue
            job.pending.remove(mark.number)
            if not job.pending:
                self._forget_octets(job)
                if job not in work.over:
                    # Not behind its last `partly`: a message without recipients would stay.
                    self._waiting.done.insert(0, job)

    def _committed(self, answer: bool | Exception) -> None:
        if isinstance(answer, Exception):
            self._fail(answer)
            return
        self.commits += 1
        self._failures = 0
        work = self._round
        if work.told:
            self._apply_told(work)
        self._answer(work.entries, STORED)
        self._settle(work)
        if answer:  # the answers are out before the checkpoint starts
            self._round = Round()
            self._writer.run(self._store.checkpoint, self._checkpointed)
        else:
            self._next()

    def _answer(self, entries: list[Entry], answer: Stored | Refused) -> None:
        for entry in entries:
            try:
                entry.answer(answer)
            except Exception as error:  # a bug of one connection must not cost the others their answers
                self._report(error)

    def _settle(self, work: Round) -> None:
        """What follows from a batch that is durable."""
        room = self._room
        scan = self._scan
        jobs: list[Job] = []
        for entry in work.entries:
            room.drafts -= entry.draft.held
            job = entry.job
            job.held = JOB_OCTETS + (job.message.size if job.message.parts is not None else 0)
            room.jobs += job.held
            jobs.append(job)
        over = [*work.done, *work.over] if work.over else work.done
        for job in over:
            scan.let_go(job.key)
            if job.message.file:
                self._files.run(partial(remove, Path(job.message.file)), self._removed)
        for key, *_ in work.batch.aside:
            self._waiting.asides.discard(key)
            room.jobs -= scan.let_go(key)
        if work.batch.hold:
            scan.overtake({key for key, _ in work.batch.hold})
        if work.batch.wake:
            woken = {key for _, key, _ in work.batch.wake}
            scan.overtake(woken)
            scan.wake(woken)
        for job in work.released:
            if job.pending and scan.held.get(job.key) is job:
                scan.put_back(job)
                room.jobs -= scan.let_go(job.key)
        for watcher in work.watchers:
            if not watcher.done():
                watcher.set_result(True)
        self.backlog += len(jobs) - len(over) - len(work.batch.aside)
        self.broken += len(work.batch.aside) - len(work.batch.erased)
        if jobs:
            try:
                self._stored(jobs)
            except Exception as error:
                self._report(error)

    def _checkpointed(self, answer: int | Exception) -> None:
        if isinstance(answer, OSError):
            self._fail(answer)
            return
        if isinstance(answer, Exception):
            self._trouble.warn("checkpoint", str(answer))
        elif answer > LONG_LOG_PAGES:
            self._trouble.warn("checkpoint", f"a reader keeps {answer >> 8} MB of the write-ahead log")
        self._next()

    def _vacuumed(self, answer: bool | Exception) -> None:
        if isinstance(answer, Exception):
            self._fail(answer)
            return
        if not answer:
            self._freed = 0
        self._next()

    def _removed(self, answer: Exception | None) -> None:
        if answer is not None:  # the next start tries again
            self._trouble.warn("body", str(answer))

    def _tell_quiet(self) -> None:
        if self._quiet is not None and not self._quiet.done():
            self._quiet.set_result(None)

    # --- trouble ---

    def _fail(self, error: Exception) -> None:
        """A batch is undecided. The connection stays the recovery's until that has worked."""
        self.healthy = False
        self.commits_failed += 1
        self._failures += 1
        self._refused = refusal(self._store.is_full(error))
        self._trouble.begins("commit", str(error))
        self._recovery = self._loop.create_task(self._recover(self._refused))
        self._tell_quiet()

    async def _recover(self, refused: Refused) -> None:
        """Makes sure that nothing of the batch is there, then tells. Until it has worked nothing else is done."""
        work = self._round
        work.reports = [entry for entry in work.entries if entry.marks]
        undecided = work.entries = [entry for entry in work.entries if not entry.marks]
        keys = [entry.job.key for entry in undecided]
        told = [entry.job.key for entry in work.reports]
        delay = 1.0
        # For what the disk is full of, or so that SQLite does not meet a full one while it opens
        self._room.ballast.give_up()
        self._room.look_again()
        while (durable := await self._try_recovery(keys, told, refused)) is None:
            self._answer(work.entries, Refused(UNDECIDED, None))
            work.entries = []
            self._refuse_waiting(refused)
            await sleep(delay)
            delay = min(2 * delay, RETRY_SECONDS)
        for entry in undecided:
            self._scan.let_go(entry.job.key)
            entry.draft.discard()
        self._answer(work.entries, refused)
        work.entries = []
        self._waiting.give_back(work)
        if self._failures > 1:  # it can be opened, but no commit works: not at full speed
            self._refuse_waiting(refused)
            await sleep(min(2.0 ** (self._failures - 2), RETRY_SECONDS))
        self._recovery = None
        self.healthy = True
        self._trouble.ends()
        self._decide_reports(work, durable)
        self._next()

    def _decide_reports(self, work: Round, durable: bool) -> None:
        """The reports of a batch that failed are there with all of it, or with nothing."""
        reports, work.reports = work.reports, []
        if durable:
            self._apply_told(work)
            kept = Round()
            kept.entries, kept.over = reports, work.over
            self._answer(reports, STORED)
            self._settle(kept)
            return
        for entry in reports:
            self._scan.let_go(entry.job.key)
            entry.draft.discard()
        self._answer(reports, self._refused)

    async def _try_recovery(self, keys: list[int], told: list[int], refused: Refused) -> bool | None:
        """Whether the messages `told` are there; None: it is not known yet."""
        try:
            await self._files.call(self._reader.close)
            durable = await self._writer.call(partial(self._store.recover, keys, told))
            await self._files.call(self._reader.open)
        except Exception as error:  # whatever it is, clients wait for an answer and mail for the next attempt
            self._trouble.begins("recovery", str(error))
            return None
        if refused.reason != NO_ROOM:  # else when there is room
            await self._files.call(self._room.ballast.make)
        return durable

    def _refuse_waiting(self, refused: Refused) -> None:
        """Refuses what was in no transaction yet."""
        entries, self._waiting.entries = self._waiting.entries, []
        for entry in entries:
            entry.draft.discard()
        self._answer(entries, refused)

    def _report(self, error: Exception) -> None:
        self._loop.call_exception_handler({"message": "a callback of the spool failed", "exception": error})
