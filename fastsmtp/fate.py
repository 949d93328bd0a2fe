"""What becomes of a recipient: the mark that the spool is told, and the event that its sender is told.

In: a recipient of a job and the outcome of an attempt, or that none was made. Out: a Fate. Each way has its method:
delivered, failed, deferred (an attempt was made), postponed (none was). A recipient is given up when its transport said
so, or when its message is older than its lifetime and this server has tried its destination since it was started;
never with `soft_bounce`, and never where nobody could be told (no Reports). An event is there only where the sender
wants it; a delay is told once. Each fate is logged and counted here.
Not here: when an attempt is made (queue), how a report reads (dsn) and is kept (reporting).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from . import log as logs
from .delivery import DELIVERED, Outcome, Result, Scope
from .dsn import Action, Event, is_report
from .job import Job, Mark
from .message import Message, Recipient
from .metrics import Counter
from .reporting import Reports
from .schedule import Schedule

BAD = (Action.FAILED, Action.DELAYED)
NOWHERE = Outcome(Result.FAILED, "5.4.4", "no way leads to the sender: [relay] has no transport", Scope.HOST)
UNTOLD = Outcome(Result.DEFERRED, "4.3.0", "the sender could not be told; see the log", Scope.MESSAGE)


class Fate(NamedTuple):
    """`event`: to be told with the mark; None: nothing."""

    mark: Mark
    event: Event | None

    @property
    def is_bad(self) -> bool:
        """Whether a failure or a delay is to be told."""
        return self.event is not None and self.event.action in BAD


class Fates:
    """Without `reports` nobody is told anything, and so nothing is given up. `now` is in seconds since the epoch,
    `chance` uniform in [0, 1)."""

    def __init__(
        self,
        schedule: Schedule,
        reports: Reports | None,
        *,
        log: logs.Log,
        count: Callable[[Counter, int], None],
        now: Callable[[], float],
        chance: Callable[[], float],
    ) -> None:
        self.use(schedule, reports)
        self._log = log
        self._count = count
        self._now = now
        self._chance = chance
        self._drawn_for = -1  # a job's key
        self._drawn = 0.0

    def use(self, schedule: Schedule, reports: Reports | None) -> None:
        """Goes on by another schedule."""
        self._schedule = schedule
        self._reports = reports
        self._final = reports is not None and not schedule.soft_bounce

    def attempted(self, job: Job, number: int, outcome: Outcome, transport: str, rest: float) -> Fate:
        """An attempt was made. `rest`: for so many seconds its destination is dead."""
        if outcome.result is Result.DELIVERED:
            return self._delivered(job, number, outcome, transport)
        if outcome.result is Result.FAILED and self._final:
            return self._given_up(job, number, outcome, transport, 1)
        if outcome.result is Result.FAILED:
            wait = self._schedule.retry_max
        else:
            wait = max(self._wait(job, number), self._after(job, rest))
        return self._later(job, number, outcome, transport, wait, 1, may_end=True)

    def unrouted(self, job: Job, number: int, outcome: Outcome, transport: str) -> Fate:
        """The configuration has no way for it: repeated like an attempt, but nobody has tried anything. Only a report
        waits for nobody to mend that: where all mail is for our own domains, nothing is ever sent out."""
        if not transport and self._final and is_report(job.message):
            return self._given_up(job, number, NOWHERE, transport, 0)
        return self._later(job, number, outcome, transport, self._wait(job, number), 1, may_end=False)

    def busy(self, job: Job, number: int, outcome: Outcome, transport: str, wait: float) -> Fate:
        """So much waits for its destination that no attempt is made now."""
        return self._later(job, number, outcome, transport, wait, 0, may_end=False)

    def postponed(self, job: Job, number: int, outcome: Outcome, transport: str, rest: float) -> Fate:
        """No attempt is made: for `rest` seconds its destination is dead."""
        return self._later(job, number, outcome, transport, self._after(job, rest), 0, may_end=True)

    def untold(self, job: Job, event: Event, mark: Mark) -> Mark:
        """What is marked instead where nobody could be told: what has failed or is late is tried again, and told then.
        What was delivered is done, for it would be delivered twice."""
        if event.action not in BAD:
            return mark
        due = self._now() + self._schedule.retry_max if mark.due is None else mark.due
        attempts = mark.attempts or _attempts(job, mark.number) + 1
        self._log.write(
            logs.DEFERRED, job.message.id, str(event.recipient.address), "", UNTOLD.status, UNTOLD.text, attempts,
            round(due - self._now()),
        )  # fmt: skip
        return Mark(job.key, mark.number, due, attempts, f"{event.status} {event.text}")

    def _wait(self, job: Job, number: int) -> float:
        return self._schedule.wait(_attempts(job, number) + 1, lambda: self._draw(job))

    def _after(self, job: Job, rest: float) -> float:
        """Mail for a dead destination comes back when that may be tried again, but not all of it at once."""
        return max(rest, 1.0) * (1 + 0.2 * self._draw(job)) if rest else 0.0

    def _draw(self, job: Job) -> float:
        """The recipients of a message that fail together come back together: in one transaction, one report."""
        if job.key != self._drawn_for:
            self._drawn_for = job.key
            self._drawn = self._chance()
        return self._drawn

    def log_delivery(
        self, message: Message, recipient: Recipient, outcome: Outcome, transport: str, now: float
    ) -> None:
        address = recipient.address.wire
        seconds = now - message.arrived
        if outcome is DELIVERED:
            self._log.write(logs.DELIVERED, message.id, address, transport, seconds)
        else:
            self._log.write(logs.RELAYED, message.id, address, transport, outcome.host, outcome.reply, seconds)

    def _delivered(self, job: Job, number: int, outcome: Outcome, transport: str) -> Fate:
        recipient = job.message.envelope.recipients[number]
        self.log_delivery(job.message, recipient, outcome, transport, self._now())
        self._count(Counter.RECIPIENTS_DELIVERED, 1)
        event = None
        if recipient.notify and not outcome.reports:
            action = Action.RELAYED if outcome.relayed else Action.DELIVERED
            event = self._event(job, number, action, outcome)
        return Fate(Mark(job.key, number), event)

    def _given_up(self, job: Job, number: int, outcome: Outcome, transport: str, attempts: int) -> Fate:
        message = job.message
        address = str(message.envelope.recipients[number].address)
        self._count(Counter.RECIPIENTS_FAILED, 1)
        self._log.write(
            logs.FAILED, message.id, address, transport, outcome.status, outcome.text, _attempts(job, number) + attempts
        )
        event = self._event(job, number, Action.FAILED, outcome)
        if not message.envelope.reverse_path and event is None:
            self._log.write(logs.UNREPORTED, message.id, address, outcome.status, outcome.text)
        return Fate(Mark(job.key, number), event)

    def _later(
        self, job: Job, number: int, outcome: Outcome, transport: str, wait: float, made: int, *, may_end: bool
    ) -> Fate:
        now = self._now()
        message = job.message
        if may_end and self._final and now >= self._schedule.end(message):
            return self._given_up(job, number, outcome, transport, made)
        last = job.tried.get(number)
        attempts = _attempts(job, number) + made
        if made:
            self._count(Counter.RECIPIENTS_DEFERRED, 1)
        if made or last is None:  # a thousand messages that wait for one host are not logged each time
            self._log.write(
                logs.DEFERRED, message.id, str(message.envelope.recipients[number].address), transport, outcome.status,
                outcome.text, attempts, round(wait),
            )  # fmt: skip
        event = None
        reported = last is not None and last.reported
        if not reported and self._schedule.is_delayed(message, now):
            event = self._event(job, number, Action.DELAYED, outcome)
            reported = event is not None
        reason = f"{outcome.status} {outcome.text}"
        return Fate(Mark(job.key, number, now + wait, attempts, reason, reported), event)

    def _event(self, job: Job, number: int, action: Action, outcome: Outcome) -> Event | None:
        message = job.message
        recipient = message.envelope.recipients[number]
        if self._reports is None or not self._reports.is_wanted(message, recipient, action):
            return None
        return Event(
            recipient, action, outcome.status, outcome.text, self._now(), outcome.reply, outcome.host,
            self._schedule.end(message),
        )  # fmt: skip


def _attempts(job: Job, number: int) -> int:
    """How often a recipient was tried."""
    last = job.tried.get(number)
    return last.attempts if last is not None else 0
