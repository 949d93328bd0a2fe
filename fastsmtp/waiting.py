"""What waits for the next commit, and the round that is made of it: a batch of bounded size, and who waits for it.

In: messages with their answers, marks of the queue, orders of an operator. Out: a `Round`; when its commit has failed,
it is given back, in front of what came meanwhile. A job is let go only behind the last of its marks. A report brings
the marks that it tells of into the batch that it is in itself, so that both are there, or neither.
Nothing is written, answered or waited for here; commit.py does that.
"""

from __future__ import annotations

from asyncio import Future
from collections.abc import Callable, Sequence

from .bodies import FileDraft
from .job import Job, Mark
from .record import Row
from .store import ROWS, Batch
from .verdict import Refused, Stored

BATCH_OCTETS = 2 << 20  # of bodies in one transaction: some milliseconds of copying on the loop


class Entry:
    """A message that waits for its commit. `marks`: of other messages, to be made with it."""

    __slots__ = ("answer", "draft", "job", "marks", "row")

    def __init__(
        self,
        row: Row,
        job: Job,
        draft: FileDraft,
        answer: Callable[[Stored | Refused], None],
        marks: Sequence[Mark] = (),
    ) -> None:
        self.row = row
        self.job = job
        self.draft = draft
        self.answer = answer
        self.marks = marks


class Round:
    """One batch, with those who wait for it. `told` are the marks that its reports bring, which stand behind the first
    `later` and `partly` rows of the batch, and `over` the jobs that end with them."""

    __slots__ = ("batch", "done", "entries", "later", "over", "partly", "released", "reports", "told", "watchers")

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.reports: list[Entry] = []  # of `entries`, taken out when the batch has failed
        self.told: list[Mark] = []
        self.over: list[Job] = []
        self.later = 0
        self.partly = 0
        self.done: list[Job] = []
        self.released: list[Job] = []
        self.watchers: list[Future[bool]] = []
        self.batch = Batch()


class Waiting:
    """What waits. `rows` is all that is in no list of its own; `asides` are the keys of what is being set aside."""

    __slots__ = ("asides", "done", "entries", "released", "rows", "watchers")

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.done: list[Job] = []
        self.released: list[Job] = []
        self.watchers: list[Future[bool]] = []
        self.rows = Batch()
        self.asides: set[int] = set()

    def __bool__(self) -> bool:
        return bool(self.entries or self.done or self.rows or self.released or self.watchers)

    def finish(self, job: Job, mark: Mark) -> bool:
        """Takes what became of a recipient of a held job. Whether the job is over."""
        if mark.due is not None:
            job.tried[mark.number] = mark
            self.rows.later.append(_later_row(mark, mark.due))
            return False
        job.pending.remove(mark.number)
        if job.pending:
            self.rows.partly.append((mark.key, mark.number))
            return False
        self.done.append(job)
        return True

    def take(self, held: dict[int, Job]) -> Round:
        """The next round. Its messages are in `held` from here on: a claim may see them in the database before the loop
        hears of their commit."""
        work = Round()
        batch = work.batch
        rows = octets = 0
        for entry in self.entries:
            job = entry.job
            body = entry.row[-1]
            recipients = job.message.envelope.recipients
            rows += 1 + len(recipients)
            octets += len(body) if body is not None else 0
            if work.entries and (rows > ROWS or octets > BATCH_OCTETS):
                break
            work.entries.append(entry)
            if entry.marks:
                work.told.extend(entry.marks)
                rows += len(entry.marks)
            batch.messages.append(entry.row)
            arrived = int(job.message.arrived)
            for number, recipient in enumerate(recipients):
                batch.recipients.append((job.key, number, recipient.address.domain, arrived))
            held[job.key] = job
        del self.entries[: len(work.entries)]
        work.done, self.done = self.done[:ROWS], self.done[ROWS:]
        batch.done = [job.key for job in work.done]
        left = self.rows
        if left:
            batch.later, left.later = left.later[:ROWS], left.later[ROWS:]
            batch.partly, left.partly = left.partly[:ROWS], left.partly[ROWS:]
            batch.aside, left.aside = left.aside[:ROWS], left.aside[ROWS:]
            batch.hold, left.hold = left.hold[:ROWS], left.hold[ROWS:]
            batch.wake, left.wake = left.wake[:ROWS], left.wake[ROWS:]
            batch.erased, left.erased = left.erased[:ROWS], left.erased[ROWS:]
        work.later, work.partly = len(batch.later), len(batch.partly)
        if work.told:
            self._add_told(work, held)
        if not left and not self.done:
            work.released, self.released = self.released, []
            work.watchers, self.watchers = self.watchers, []
        return work

    def _add_told(self, work: Round, held: dict[int, Job]) -> None:
        """The marks of reports. What was set aside meanwhile stays as it is: its sender is told all the same."""
        batch = work.batch
        work.told = [mark for mark in work.told if mark.key in held and mark.key not in self.asides]
        finished: dict[int, set[int]] = {}
        for mark in work.told:
            if mark.due is not None:
                batch.later.append(_later_row(mark, mark.due))
            else:
                finished.setdefault(mark.key, set()).add(mark.number)
        for key, numbers in finished.items():
            if numbers.issuperset(held[key].pending):
                work.over.append(held[key])
                batch.done.append(key)
            else:
                batch.partly.extend([(key, number) for number in numbers])

    def give_back(self, work: Round) -> None:
        """A round whose commit has failed; its messages and their marks excepted, which are answered for."""
        rows, batch = self.rows, work.batch
        self.done[:0] = work.done
        self.released[:0] = work.released
        self.watchers[:0] = work.watchers
        rows.later[:0] = batch.later[: work.later]
        rows.partly[:0] = batch.partly[: work.partly]
        rows.aside[:0] = batch.aside
        rows.hold[:0] = batch.hold
        rows.wake[:0] = batch.wake
        rows.erased[:0] = batch.erased


def _later_row(mark: Mark, due: float) -> tuple[int, int, str, bool, int, int]:
    return int(due * 1000), mark.attempts, mark.reason, mark.reported, mark.key, mark.number
