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
from collections.abc import Callable, Coroutine, Mapping
from typing import NamedTuple

from . import log as logs
from .address import Address
from .delivery import Delivery, Outcome, Result, Scope, Transport
from .job import Backlog, Job, Mark
from .metrics import Counter

CLAIM = 500  # jobs claimed at once
IN_MEMORY = 5_000  # waiting jobs above which none are claimed
BATCH = 1_000  # deliveries handed to a transport at once

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

    def __init__(self, name: str, transport: Transport | None) -> None:
        self.name = name
        self.transport = transport
        self.waiting: list[tuple[Job, Delivery]] = []
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
        """Called once a second: claims what is due, and wakes what rested."""
        if self._closing or not self._backlog.healthy:
            return
        for lane in self._lanes.values():
            self._start(lane)
        due = self._backlog.next_due()
        if due is not None and due <= self._now() and not self._claiming and self._waiting < IN_MEMORY:
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
        groups: dict[str, list[int]] = {}
        marks = []
        for number in job.pending:
            recipient = recipients[number]
            if recipient.fault:
                marks.append(self._mark(job, number, Outcome(Result.FAILED, "5.4.6", recipient.fault), ""))
                continue
            name, recipient.address = self._route(recipient.address)
            if name in self._lanes:
                groups.setdefault(name, []).append(number)
            else:
                marks.append(self._mark(job, number, NO_ROUTE, name))
        if groups:
            self._waiting += len(groups)
            if self._backlog.over_budget:
                self._backlog.drop(job)
            for name, numbers in groups.items():
                chosen = [recipients[number] for number in numbers]
                self._lanes[name].waiting.append((job, Delivery(message, chosen, numbers)))
        if marks:
            self._backlog.finish(marks)

    async def _claim(self) -> None:
        try:
            self.offer(await self._backlog.claim(self._now(), CLAIM))
        finally:
            self._claiming = False

    # Lanes

    def _start(self, lane: Lane) -> None:
        if lane.waiting and not (lane.working or self._closing) and self._backlog.healthy:
            lane.working = True
            self._run(self._work(lane))

    def _run(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _work(self, lane: Lane) -> None:
        transport = lane.transport
        assert transport is not None
        try:
            while lane.waiting and not self._closing and self._backlog.healthy:
                batch = lane.waiting[:BATCH]
                del lane.waiting[:BATCH]
                if transport.needs_body:
                    batch = await self._with_bodies(batch)
                self._settle(lane, batch, await self._attempt(transport, batch))
        finally:
            lane.working = False

    async def _attempt(self, transport: Transport, batch: list[tuple[Job, Delivery]]) -> list[list[Outcome]]:
        try:
            return [list(outcomes) for outcomes in await transport.deliver([delivery for _, delivery in batch])]
        except Exception as error:
            self._log.write(logs.BUG, "transport", repr(error), logs.trace(error))
            return [[BROKEN_TRANSPORT] * len(delivery.numbers) for _, delivery in batch]

    async def _with_bodies(self, batch: list[tuple[Job, Delivery]]) -> list[tuple[Job, Delivery]]:
        """Reads back the bodies that are not in memory. What is broken has been set aside by the spool."""
        whole = []
        for job, delivery in batch:
            message = job.message
            if message.parts is not None or await self._backlog.read(job):
                whole.append((job, delivery))
            else:
                self._waiting -= 1
        return whole

    def _settle(self, lane: Lane, batch: list[tuple[Job, Delivery]], results: list[list[Outcome]]) -> None:
        self._waiting -= len(batch)
        marks = []
        delivered = 0
        now = self._now()
        log = self._log
        for (job, delivery), outcomes in zip(batch, results, strict=True):
            for number, recipient, outcome in zip(delivery.numbers, delivery.recipients, outcomes, strict=True):
                if outcome.result is Result.DELIVERED:
                    delivered += 1
                    marks.append(Mark(job.key, number))
                    log.write(
                        logs.DELIVERED, job.message.id, str(recipient.address), lane.name, now - job.message.arrived
                    )
                else:
                    marks.append(self._mark(job, number, outcome, lane.name))
        if delivered:
            self._count(Counter.RECIPIENTS_DELIVERED, delivered)
        self._backlog.finish(marks)

    def _mark(self, job: Job, number: int, outcome: Outcome, transport: str) -> Mark:
        """What the spool is told of an attempt that did not deliver."""
        attempts = job.attempts.get(number, 0) + 1
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
