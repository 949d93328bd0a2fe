"""The queue: hands kept messages to transports, and tells the spool and the senders what became of each recipient.

In: jobs, from the spool's commits while they are in memory, and claimed from the spool when they are due. Out: one
mark for each recipient tried, and reports. The life of a delivery:
    offer -> dispatch: recipients are routed, anew at each attempt, into lanes, one for each destination
          -> start: as many calls of `deliver` as the lane's window and the machine's slots allow
          -> settle: outcomes become fates, and fates marks in the spool
What waits in a lane is bounded: behind that, and where the destination is dead, mail goes back to the spool with a time
at which it is due. Bodies of waiting jobs are dropped from memory when the spool says that it has too much of them, and
read back. Nothing is delivered that could not be marked: while the spool is not well, lanes rest.
Not here: windows and dead destinations (destinations), what an outcome means (fate), what is told with which mark
(telling), times (schedule), transports, SQL. Knows only delivery/__init__ and the spool's Backlog.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import TypeAlias

from . import log as logs
from ._shared import Shared
from .address import Address
from .delivery import DELIVERED as TAKEN
from .delivery import Delivery, Outcome, Result, Scope, Transport
from .destinations import DEAD, Batch, Destinations, Lane, LaneState, unreached
from .fate import Fate, Fates
from .job import Backlog, Job, Mark
from .message import LIST, Recipient, sent_by_owner
from .metrics import Counter
from .reporting import Reports
from .schedule import Schedule
from .selection import Selection
from .telling import Telling

CLAIM = 500  # jobs claimed at once
FEW = 50  # the same while memory is short; so many may wait then. One alone: 90 messages a second, not 5,000
WAITING_LIMIT = 5_000  # deliveries that wait for one destination beyond this machine
CROWDED = 6_000  # the same for all of them, above which no more than FEW may wait for each
IN_MEMORY = 10_000  # deliveries in all lanes, above which none are claimed
POLL_SECONDS = 0.05  # to ask again for a slot that another worker has
POLLED = 100  # lanes asked for at once
SWEEP_TICKS = 60

Outcomes: TypeAlias = Sequence[Sequence[Outcome]]

# Names of this module: looking up an Enum's member costs 0.05 µs each time on Python 3.11.
DELIVERED = Result.DELIVERED
RECIPIENTS_DELIVERED = Counter.RECIPIENTS_DELIVERED

NO_ROUTE = Outcome(Result.DEFERRED, "4.3.5", "no transport is configured for this domain", Scope.HOST)
BROKEN_TRANSPORT = Outcome(Result.DEFERRED, "4.3.0", "the transport failed; see the log", Scope.MESSAGE)
BUSY = Outcome(Result.DEFERRED, "4.4.5", "much other mail waits for the same destination", Scope.HOST)


class Queue:
    """`route` gives the name of the transport for an address, and the mailbox there. `now` is in seconds since the
    epoch and never jumps; `monotonic` is the machine's clock, the same in all workers; `chance` is uniform in [0, 1).
    `shared` is the memory of all workers, of which this is number `worker`; `total` caps the calls of `deliver` that
    are under way in all of them. Without `reports` nobody is told anything, and nothing is given up."""

    def __init__(
        self,
        backlog: Backlog,
        transports: Mapping[str, Transport],
        route: Callable[[Address], tuple[str, Address]],
        *,
        log: logs.Log,
        count: Callable[[Counter, int], None],
        now: Callable[[], float],
        schedule: Schedule | None = None,
        reports: Reports | None = None,
        shared: Shared | None = None,
        worker: int = 0,
        total: int = 500,
        monotonic: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._backlog = backlog
        self._route = route
        self._log = log
        self._count = count
        self._now = now
        schedule = schedule or Schedule()
        self._fates = Fates(schedule, reports, log=log, count=count, now=now, chance=chance)
        self._telling = Telling(backlog, self._fates, reports, log, self._let_go)
        self._destinations = Destinations(
            transports, schedule, shared or Shared(1, 0), worker, total,
            log=log, count=count, monotonic=monotonic, chance=chance,
        )  # fmt: skip
        self._wanted: dict[int, int] = {}  # keys of jobs that were asked for by id, and the tick then
        self._waiting = 0  # deliveries in lanes and under way
        self._beyond = 0  # those of them that leave this machine
        self._queued: list[Lane] = []  # to be started
        self._hungry: deque[Lane] = deque()  # refused a slot
        self._polling = False
        self._claiming = False
        self._closing = False
        self._ticks = 0
        self._tasks: set[asyncio.Task[None]] = set()
        backlog.on_stored = self.offer

    def use(
        self,
        transports: Mapping[str, Transport],
        route: Callable[[Address], tuple[str, Address]],
        schedule: Schedule,
        reports: Reports | None,
        total: int,
    ) -> None:
        """Goes on with another configuration. What waits for a transport that is none any more is still handed to it,
        until it is through or put off; then it takes the new way."""
        self._route = route
        self._fates.use(schedule, reports)
        self._telling.use(reports)
        self._destinations.use(transports, schedule, total)

    def uses(self, transport: Transport) -> bool:
        """Whether something goes by a transport, or may at any time."""
        return self._destinations.uses(transport)

    def offer(self, jobs: list[Job]) -> None:
        """Takes jobs that were kept just now, or claimed."""
        for job in jobs:
            self._dispatch(job)
        self._start_queued()

    def tick(self) -> None:
        """Called once a second: wakes what rested, and claims what is due."""
        if self._closing or not self._backlog.healthy:
            return
        self._start_queued()
        self._look_for_more()
        self._ticks += 1
        if self._ticks % SWEEP_TICKS == 0:
            self._destinations.sweep()
            recent = self._ticks - SWEEP_TICKS
            self._wanted = {key: tick for key, tick in self._wanted.items() if tick > recent}

    def wake(self, selection: Selection) -> None:
        """What is about to be made due (Backlog) will be tried, also where the destination is dead."""
        if selection.everything:
            self._destinations.forget_all()
        elif selection.domain:
            self._destinations.forget_domain(selection.domain)
        else:
            self._wanted.update(dict.fromkeys(selection.keys, self._ticks))

    def lanes(self) -> list[LaneState]:
        """The destinations that mail waits for, or did a minute ago."""
        return self._destinations.states()

    async def close(self) -> None:
        """Finishes what transports have in hand; what waits stays in the spool."""
        self._closing = True
        self._telling.end()
        while self._tasks:
            await asyncio.wait(self._tasks)
        await self._telling.close()

    @property
    def idle(self) -> bool:
        """Whether nothing waits and nothing is under way."""
        return not self._in_hand and not self._tasks

    @property
    def _in_hand(self) -> int:
        """Deliveries and reports."""
        return self._waiting + self._telling.under_way

    def _look_for_more(self) -> None:
        """Claims what is due, as long as what waits already is little."""
        in_hand = self._in_hand
        if self._claiming or self._closing or in_hand >= IN_MEMORY or (in_hand and self._backlog.over_budget):
            return
        due = self._backlog.next_due()
        if due is not None and due <= self._now():
            self._claiming = True
            self._run(self._claim())

    async def _claim(self) -> None:
        jobs: list[Job] = []
        try:
            n = FEW if self._backlog.over_budget else CLAIM
            jobs = await self._backlog.claim(self._now(), n)
            self.offer(jobs)
        finally:
            self._claiming = False
        if jobs:  # a thousand that only had to be put off hold nobody up who was due behind them
            self._look_for_more()

    def _run(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # Jobs into lanes

    def _dispatch(self, job: Job) -> None:
        recipients = job.message.envelope.recipients
        lanes: list[Lane] = []
        fates: list[Fate] = []
        by_list = False
        tried = job.tried
        now = self._now() if tried else 0.0
        most = WAITING_LIMIT if self._beyond < CROWDED else FEW
        for number in job.pending:
            if tried and number in tried and (tried[number].due or 0.0) > now:
                continue
            lane = self._find_lane(job, number, most, fates)
            if lane is None:
                continue
            if lane.numbers is None:
                lane.numbers = []
                lanes.append(lane)
            lane.numbers.append(number)
            if recipients[number].sender is not None:
                by_list = True
        if self._wanted and self._wanted.pop(job.key, None) is not None:
            for lane in lanes:
                self._destinations.forget(lane)
        room = not lanes or self._make_room(job)
        for lane in lanes:
            numbers, lane.numbers = lane.numbers, None
            if room and numbers is not None:
                for part in _by_sender(recipients, numbers) if by_list else (numbers,):
                    self._put(lane, job, Delivery(job.message, [recipients[number] for number in part], part))
        if fates:
            self._telling.settle(job, fates)
        self._let_go(job)

    def _find_lane(self, job: Job, number: int, most: int, fates: list[Fate]) -> Lane | None:
        """Where a recipient goes; None when it cannot be tried now, and its fate is decided."""
        recipient = job.message.envelope.recipients[number]
        if recipient.fault:
            is_list = recipient.fault == LIST
            outcome = TAKEN if is_list else Outcome(Result.FAILED, "5.4.6", recipient.fault)
            fates.append(self._fates.attempted(job, number, outcome, LIST if is_list else "", 0.0))
            return None
        name, recipient.address = self._route(recipient.address)
        lane = self._destinations.lane(name, recipient.address)
        if lane is None:
            fates.append(self._fates.unrouted(job, number, NO_ROUTE, name))
            return None
        if lane.cap and len(lane.waiting) >= most:  # local ones take whole batches: the memory budget is their bound
            wait = self._destinations.book(lane)
            fates.append(self._fates.busy(job, number, BUSY, name, wait))
            return None
        return lane

    def _make_room(self, job: Job) -> bool:
        """Over the budget a job waits without its body; False: not even what is known about it has room, the spool
        gives it back when others are done."""
        if not self._backlog.over_budget:
            return True
        self._backlog.drop(job)
        return not self._backlog.over_budget or self._in_hand < FEW

    def _put(self, lane: Lane, job: Job, delivery: Delivery) -> None:
        lane.waiting.append((job, delivery))
        job.deliveries += 1
        self._waiting += 1
        if lane.cap:
            self._beyond += 1
        if not lane.queued:
            lane.queued = True
            self._queued.append(lane)

    def _let_go(self, job: Job) -> None:
        """A job with recipients left for later goes back to the spool once nothing of it is under way."""
        if not job.deliveries and job.pending:
            self._backlog.release(job)

    def _take_off(self, lane: Lane, batch: Batch) -> None:
        """Deliveries that are decided, or cannot be made."""
        self._waiting -= len(batch)
        if lane.cap:
            self._beyond -= len(batch)
        for job, _ in batch:
            job.deliveries -= 1
            if job.pending:
                self._let_go(job)

    # Lanes

    def _start_queued(self) -> None:
        queued, self._queued = self._queued, []
        for lane in queued:
            lane.queued = False
            self._start(lane)

    def _start(self, lane: Lane) -> None:
        transport = lane.transport
        while lane.waiting and lane.running < lane.window and not self._closing:
            if not self._backlog.healthy:
                self._queue_again(lane)
                return
            place = self._destinations.enter(lane)
            if place == DEAD:
                self._postpone(lane)
                return
            if place < 0:
                self._await_slot(lane)
                return
            batch = lane.take()
            if transport.needs_body and any(job.message.parts is None for job, _ in batch):
                self._run(self._read_and_deliver(lane, place, batch))
                continue
            outcomes = self._deliver(transport, batch)
            if isinstance(outcomes, Sequence):
                self._settle(lane, place, batch, outcomes)
            else:
                self._run(self._await(lane, place, batch, outcomes))

    def _queue_again(self, lane: Lane) -> None:
        """The next tick starts it."""
        if not lane.queued:
            lane.queued = True
            self._queued.append(lane)

    def _postpone(self, lane: Lane) -> None:
        """Nothing that waits for a dead destination is tried."""
        rest = self._destinations.rest(lane)
        batch, lane.waiting = lane.waiting, []
        for job, delivery in batch:
            fates = [self._fates.postponed(job, number, lane.failure, lane.name, rest) for number in delivery.numbers]
            self._telling.settle(job, fates)
        self._take_off(lane, batch)

    def _await_slot(self, lane: Lane) -> None:
        """Slots that this worker gives back are offered to it at once; for those of others it asks again."""
        if not lane.hungry:
            lane.hungry = True
            self._hungry.append(lane)
        if not self._polling:
            self._polling = True
            asyncio.get_running_loop().call_later(POLL_SECONDS, self._poll)

    def _poll(self) -> None:
        self._polling = False
        self._feed(POLLED)

    def _feed(self, most: int) -> None:
        for _ in range(min(most, len(self._hungry))):
            lane = self._hungry.popleft()
            lane.hungry = False
            self._start(lane)
        if self._hungry and not self._polling and not self._closing:
            self._polling = True
            asyncio.get_running_loop().call_later(POLL_SECONDS, self._poll)

    def _deliver(self, transport: Transport, batch: Batch) -> Outcomes | Awaitable[Outcomes]:
        try:
            return transport.deliver(
                [delivery if delivery.sender is None else _of_list(delivery) for _, delivery in batch]
            )
        except Exception as error:
            return self._broken(batch, error)

    async def _await(self, lane: Lane, place: int, batch: Batch, waiting: Awaitable[Outcomes]) -> None:
        try:
            outcomes = await waiting
        except Exception as error:
            outcomes = self._broken(batch, error)
        self._settle(lane, place, batch, outcomes)
        self._start(lane)
        if self._hungry:
            self._feed(2)

    async def _read_and_deliver(self, lane: Lane, place: int, batch: Batch) -> None:
        """Reads back the bodies that are not in memory. What is broken has been set aside by the spool."""
        whole: Batch = []
        for job, delivery in batch:
            if job.message.parts is not None or await self._backlog.read(job):
                whole.append((job, delivery))
            else:
                job.deliveries -= 1
                self._waiting -= 1
                if lane.cap:
                    self._beyond -= 1
        outcomes = self._deliver(lane.transport, whole) if whole else []
        if isinstance(outcomes, Sequence):
            self._settle(lane, place, whole, outcomes)
            self._start(lane)
        else:
            await self._await(lane, place, whole, outcomes)

    def _broken(self, batch: Batch, error: Exception) -> Outcomes:
        self._log.write(logs.BUG, "transport", repr(error), logs.trace(error))
        return [[BROKEN_TRANSPORT] * len(delivery.numbers) for _, delivery in batch]

    # Outcomes into marks

    def _settle(self, lane: Lane, place: int, batch: Batch, results: Outcomes) -> None:
        rest = 0.0
        if batch:
            failure = unreached(results)
            if failure is None:
                self._destinations.reached(lane, place)
            else:
                rest = self._destinations.missed(lane, place, failure)
        self._destinations.leave(lane, place, len(batch))
        marks: list[Mark] = []
        delivered = 0
        now = self._now()
        log_delivery = self._fates.log_delivery
        assert len(results) == len(batch)
        for nth, (job, delivery) in enumerate(batch):  # zip(strict=True) takes 0.4 µs
            message = job.message
            outcomes = results[nth]
            assert len(outcomes) == len(delivery.numbers)
            fates: list[Fate] | None = None
            for at, number in enumerate(delivery.numbers):
                recipient, outcome = delivery.recipients[at], outcomes[at]
                if outcome.result is DELIVERED and not recipient.notify:  # most mail: as Fates does, without a Fate
                    delivered += 1
                    marks.append(Mark(job.key, number))
                    log_delivery(message, recipient, outcome, lane.name, now)
                else:
                    fates = fates or []
                    fates.append(self._fates.attempted(job, number, outcome, lane.name, rest))
            if fates:
                self._telling.settle(job, fates)
        if delivered:
            self._count(RECIPIENTS_DELIVERED, delivered)
        self._backlog.finish(marks)
        self._take_off(lane, batch)
        if self._waiting < CLAIM:
            self._look_for_more()


def _by_sender(recipients: Sequence[Recipient], numbers: Sequence[int]) -> list[list[int]]:
    """What goes to one destination, apart by the owners of the lists that it comes by."""
    parts: dict[str, list[int]] = {}
    for number in numbers:
        sender = recipients[number].sender
        parts.setdefault("" if sender is None else sender.wire, []).append(number)
    return list(parts.values())


def _of_list(delivery: Delivery) -> Delivery:
    """As a transport is to send it; made when its message is in memory."""
    assert delivery.sender is not None
    return Delivery(sent_by_owner(delivery.message, delivery.sender), delivery.recipients, delivery.numbers)
