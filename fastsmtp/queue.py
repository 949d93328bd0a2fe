"""The queue: hands kept messages to transports, and decides when a recipient is tried again.

In: jobs, from the spool's commits while they are in memory, and claimed from the spool when they are due. Out: marks
for the spool, one for each recipient tried. Each transport has a lane; a lane hands over all that waits in it at once,
so that one flush serves many, and a slow lane delays no other. The route is looked up at each attempt; a transport
that is gone from the configuration defers. A failed attempt is repeated with back-off (doubling, with jitter); nothing
is given up: what failed for good waits for the longest interval. Bodies of waiting jobs are dropped from memory when
the spool says that it has too much of them, and read back. Nothing is delivered that could not be marked: while the
spool is not well, lanes rest.
Not here: transports, SQL, how a claim is made. Knows only delivery/__init__ and the spool's Backlog.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from . import log as logs
from .address import Address
from .delivery import DELIVERED, Delivery, Outcome, Result, Scope, Transport
from .job import Backlog, Job, Mark
from .metrics import Counter

CLAIM = 500  # jobs claimed at once
FEW = 50  # the same while memory is short; so many may wait then. One alone: 90 messages a second, not 5,000
IN_MEMORY = 5_000  # waiting jobs above which none are claimed
BATCH = 1_000  # deliveries handed to a transport at once

Batch: TypeAlias = list[tuple[Job, Delivery]]
Outcomes: TypeAlias = Sequence[Sequence[Outcome]]

RECIPIENTS_DELIVERED = Counter.RECIPIENTS_DELIVERED

NO_ROUTE = Outcome(Result.DEFERRED, "4.3.5", "no transport is configured for this domain", Scope.HOST)
BROKEN_TRANSPORT = Outcome(Result.DEFERRED, "4.3.0", "the transport failed; see the log", Scope.HOST)


class Backoff(NamedTuple):
    """Waits in seconds: the first, doubling up to the longest."""

    first: float = 300.0
    longest: float = 4 * 3600.0

    def wait(self, attempts: int, chance: Callable[[], float]) -> float:
        """Before the next attempt, after `attempts` of them: within a tenth of the plain figure, so that what failed
        together does not come back together."""
        plain = min(self.first * 2.0 ** min(attempts - 1, 60), self.longest)
        return plain * (0.9 + 0.2 * chance())


class Lane:
    """What waits for one transport."""

    __slots__ = ("name", "transport", "waiting", "working")

    def __init__(self, name: str, transport: Transport) -> None:
        self.name = name
        self.transport = transport
        self.waiting: Batch = []
        self.working = False


class Queue:
    """`route` gives the name of the transport for an address, and the mailbox there. `now` is in seconds since the
    epoch and never jumps; `chance` is uniform in [0, 1)."""

    def __init__(
        self,
        backlog: Backlog,
        transports: Mapping[str, Transport],
        route: Callable[[Address], tuple[str, Address]],
        *,
        log: logs.Log,
        count: Callable[[Counter, int], None],
        now: Callable[[], float],
        backoff: Backoff | None = None,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._backlog = backlog
        self._route = route
        self._log = log
        self._count = count
        self._now = now
        self._backoff = backoff or Backoff()
        self._chance = chance
        self._lanes = {name: Lane(name, transport) for name, transport in transports.items()}
        self._waiting = 0  # jobs in lanes
        self._claiming = False
        self._closing = False
        self._tasks: set[asyncio.Task[None]] = set()
        backlog.on_stored = self.offer

    def offer(self, jobs: list[Job]) -> None:
        """Takes jobs that were kept just now, or claimed."""
        for job in jobs:
            self._dispatch(job)
        for lane in self._lanes.values():
            self._start(lane)

    def tick(self) -> None:
        """Called once a second: wakes what rested, and claims what is due."""
        if self._closing or not self._backlog.healthy:
            return
        for lane in self._lanes.values():
            self._start(lane)
        self._look_for_more()

    def _look_for_more(self) -> None:
        """Claims what is due, as long as what waits already is little."""
        if self._claiming or self._closing or self._waiting >= IN_MEMORY:
            return
        if self._waiting and self._backlog.over_budget:
            return
        due = self._backlog.next_due()
        if due is not None and due <= self._now():
            self._claiming = True
            self._run(self._claim())

    async def close(self) -> None:
        """Finishes what transports have in hand; what waits stays in the spool."""
        self._closing = True
        while self._tasks:
            await asyncio.wait(self._tasks)

    @property
    def idle(self) -> bool:
        """Whether nothing waits and nothing is under way."""
        return not self._waiting and not self._tasks

    # Jobs into lanes

    def _dispatch(self, job: Job) -> None:
        message = job.message
        recipients = message.envelope.recipients
        lanes: dict[str, list[int]] = {}
        marks = []
        tried = job.tried
        if tried:
            now = self._now()
        for number in job.pending:
            recipient = recipients[number]
            if tried and number in tried and (tried[number].due or 0.0) > now:
                continue
            if recipient.fault:
                marks.append(self._mark(job, number, Outcome(Result.FAILED, "5.4.6", recipient.fault), ""))
                continue
            name, recipient.address = self._route(recipient.address)
            if name not in self._lanes:
                marks.append(self._mark(job, number, NO_ROUTE, name))
            elif name in lanes:
                lanes[name].append(number)
            else:
                lanes[name] = [number]
        if self._backlog.over_budget and lanes:
            self._backlog.drop(job)
            if self._backlog.over_budget and self._waiting >= FEW:
                # Not even what is known about it has room: the spool gives it back when others are done.
                lanes.clear()
        for name, numbers in lanes.items():
            chosen = [recipients[number] for number in numbers]
            self._lanes[name].waiting.append((job, Delivery(message, chosen, numbers)))
            job.deliveries += 1
            self._waiting += 1
        if marks:
            self._backlog.finish(marks)
        if not lanes:
            self._let_go(job)

    def _let_go(self, job: Job) -> None:
        """A job with recipients left for later goes back to the spool once nothing of it is under way."""
        if not job.deliveries and job.pending:
            self._backlog.release(job)

    async def _claim(self) -> None:
        try:
            n = FEW if self._backlog.over_budget else CLAIM
            self.offer(await self._backlog.claim(self._now(), n))
        finally:
            self._claiming = False

    # Lanes

    def _start(self, lane: Lane) -> None:
        transport = lane.transport
        while lane.waiting and not (lane.working or self._closing) and self._backlog.healthy:
            batch = lane.waiting[:BATCH]
            del lane.waiting[:BATCH]
            if transport.needs_body and any(job.message.parts is None for job, _ in batch):
                lane.working = True
                self._run(self._read_and_deliver(lane, batch))
                continue
            outcomes = self._deliver(transport, batch)
            if isinstance(outcomes, Sequence):
                self._settle(lane, batch, outcomes)
            else:
                lane.working = True
                self._run(self._await(lane, batch, outcomes))

    def _run(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _deliver(self, transport: Transport, batch: Batch) -> Outcomes | Awaitable[Outcomes]:
        try:
            return transport.deliver([delivery for _, delivery in batch])
        except Exception as error:
            return self._broken(batch, error)

    async def _await(self, lane: Lane, batch: Batch, waiting: Awaitable[Outcomes]) -> None:
        try:
            outcomes = await waiting
        except Exception as error:
            outcomes = self._broken(batch, error)
        lane.working = False
        self._settle(lane, batch, outcomes)
        self._start(lane)

    async def _read_and_deliver(self, lane: Lane, batch: Batch) -> None:
        """Reads back the bodies that are not in memory. What is broken has been set aside by the spool."""
        whole = []
        for job, delivery in batch:
            if job.message.parts is not None or await self._backlog.read(job):
                whole.append((job, delivery))
            else:
                job.deliveries -= 1
                self._waiting -= 1
        outcomes = self._deliver(lane.transport, whole)
        if isinstance(outcomes, Sequence):
            lane.working = False
            self._settle(lane, whole, outcomes)
            self._start(lane)
        else:
            await self._await(lane, whole, outcomes)

    def _broken(self, batch: Batch, error: Exception) -> Outcomes:
        self._log.write(logs.BUG, "transport", repr(error), logs.trace(error))
        return [[BROKEN_TRANSPORT] * len(delivery.numbers) for _, delivery in batch]

    def _settle(self, lane: Lane, batch: Batch, results: Outcomes) -> None:
        self._waiting -= len(batch)
        marks = []
        delivered = 0
        now = self._now()
        log = self._log
        for (job, delivery), outcomes in zip(batch, results, strict=True):
            message = job.message
            for number, recipient, outcome in zip(delivery.numbers, delivery.recipients, outcomes, strict=True):
                if outcome is DELIVERED:
                    delivered += 1
                    marks.append(Mark(job.key, number))
                    log.write(logs.DELIVERED, message.id, recipient.address.wire, lane.name, now - message.arrived)
                else:
                    marks.append(self._mark(job, number, outcome, lane.name))
        if delivered:
            self._count(RECIPIENTS_DELIVERED, delivered)
        self._backlog.finish(marks)
        for job, _ in batch:
            job.deliveries -= 1
            if job.pending:
                self._let_go(job)
        if self._waiting < CLAIM:
            self._look_for_more()

    def _mark(self, job: Job, number: int, outcome: Outcome, transport: str) -> Mark:
        """What the spool is told of an attempt that did not deliver."""
        attempts = (job.tried[number].attempts if number in job.tried else 0) + 1
        if outcome.result is Result.FAILED:
            wait = self._backoff.longest
            self._count(Counter.RECIPIENTS_FAILED, 1)
        else:
            wait = self._backoff.wait(attempts, self._chance)
            self._count(Counter.RECIPIENTS_DEFERRED, 1)
        reason = f"{outcome.status} {outcome.text}"
        self._log.write(
            logs.DEFERRED, job.message.id, str(job.message.envelope.recipients[number].address), transport,
            outcome.status, outcome.text, attempts, round(wait),
        )  # fmt: skip
        return Mark(job.key, number, self._now() + wait, attempts, reason)
