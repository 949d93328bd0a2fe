"""Destinations: what waits for each, how much may be under way to it at once, and which are dead.

A lane is one destination of one transport, in this worker: its queue and its window. The window starts small, grows by
one with each call that reached the destination, is halved by each that did not, and starts at one after a death.
Slots, and the times until which a destination is dead, are the machine's (_shared): caps hold over all workers, and
one attempt by one of them finds out whether a dead destination is well again. Dead is one that nothing reached, of all
that was under way or of as many calls in a row as the window allows; the next attempt waits with back-off.
Not here: what becomes of the mail that waits (queue). A killed worker's slots are given back by the supervisor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from typing import NamedTuple, TypeAlias

from . import log as logs
from ._shared import Shared
from .address import Address
from .delivery import Delivery, Outcome, Result, Scope, Transport
from .job import Job
from .metrics import Counter
from .schedule import Schedule

BATCH = 1_000  # deliveries handed at once to a transport without concurrency
FEW = 10  # the same for any other: what one connection takes in a row
FIRST_WINDOW = 2
NO_CAP = 1 << 40
SLOWEST = 1.0  # deliveries a second that a busy destination is thought to take at least

Batch: TypeAlias = list[tuple[Job, Delivery]]

# Answers of `enter`, as _shared gives them
NOT_NOW = -1
DEAD = -2

ELSEWHERE = Outcome(Result.DEFERRED, "4.4.1", "the destination was not reached when it was last tried", Scope.HOST)


class Lane:
    """What waits for one destination. `running` are the calls under way."""

    __slots__ = (
        "booked", "cap", "destination", "done", "failure", "hungry", "key", "misses", "name", "numbers", "queued",
        "running", "since", "transport", "used", "waiting", "window",
    )  # fmt: skip

    def __init__(self, name: str, transport: Transport, destination: str, key: int) -> None:
        self.name = name
        self.transport = transport
        self.cap = transport.concurrency
        self.destination = destination
        self.key = key
        self.waiting: Batch = []
        self.running = 0
        self.window = min(FIRST_WINDOW, max(self.cap, 1))
        self.misses = 0  # calls in a row that did not reach it
        self.failure = ELSEWHERE  # why it was last found dead
        # Since it has something to do (monotonic; 0.0: it has not): deliveries done, and when the last put off is due
        self.since = 0.0
        self.done = 0
        self.booked = 0.0
        # The queue's notes: it is to be started, it waits for a slot, recipients of the job that is being dispatched
        self.queued = False
        self.hungry = False
        self.numbers: list[int] | None = None
        self.used = True  # since the last sweep

    def take(self) -> Batch:
        """What the call that was entered last gets. Few are spread over the calls that are allowed."""
        most = BATCH
        if self.cap:
            calls = self.window - self.running + 1
            most = min(-(-len(self.waiting) // calls), FEW)
        batch = self.waiting[:most]
        del self.waiting[:most]
        return batch


class LaneState(NamedTuple):
    """A lane, for people. `dead`: for so many seconds; `why` is empty when it is well."""

    transport: str
    destination: str
    waiting: int
    running: int
    window: int
    dead: float
    why: str


class Destinations:
    """The lanes of a worker. `total` is the cap over all destinations, of the machine; `monotonic` is the machine's
    clock, the same in all workers."""

    def __init__(
        self,
        transports: Mapping[str, Transport],
        schedule: Schedule,
        shared: Shared,
        worker: int,
        total: int,
        *,
        log: logs.Log,
        count: Callable[[Counter, int], None],
        monotonic: Callable[[], float],
        chance: Callable[[], float],
    ) -> None:
        self._ways: dict[str, tuple[Transport, dict[str, Lane]]] = {}
        self._former: list[tuple[Transport, dict[str, Lane]]] = []  # replaced, with what still waits for them
        self.use(transports, schedule, total)
        self._shared = shared
        self._worker = worker
        self._total_key = _key("", "")
        self._total_place = 0
        self._log = log
        self._count = count
        self._monotonic = monotonic
        self._chance = chance

    def use(self, transports: Mapping[str, Transport], schedule: Schedule, total: int) -> None:
        """New mail goes by these; lanes of transports that stay are kept."""
        before = self._ways
        self._ways = {}
        for name, transport in transports.items():
            way = before.get(name)
            self._ways[name] = way if way is not None and way[0] is transport else (transport, {})
        for name, way in before.items():
            after = self._ways.get(name)
            if after is None or after[0] is not way[0]:
                self._former.append(way)
        self._schedule = schedule
        self._total = total

    def uses(self, transport: Transport) -> bool:
        """Whether a transport is in use, or a replaced one has something left to do."""
        self._former = [way for way in self._former if any(lane.waiting or lane.running for lane in way[1].values())]
        return any(way[0] is transport for way in (*self._ways.values(), *self._former))

    def lane(self, name: str, address: Address) -> Lane | None:
        """The lane for a recipient; None: there is no such transport."""
        way = self._ways.get(name)
        if way is None:
            return None
        transport, lanes = way
        destination = transport.destination(address)
        lane = lanes.get(destination)
        if lane is None:
            lanes[destination] = lane = Lane(name, transport, destination, _key(name, destination))
        return lane

    # A call of deliver: enter, then reached or missed, then leave

    def enter(self, lane: Lane) -> int:
        """A slot for one call: its place, for the methods below; or NOT_NOW, DEAD."""
        now = self._monotonic()
        lane.used = True
        shared = self._shared
        place = shared.take(self._worker, lane.key, lane.cap or NO_CAP, now)
        if place < 0:
            return place
        if lane.cap:
            total_place = shared.take(self._worker, self._total_key, self._total, now)
            if total_place < 0:
                shared.give(self._worker, place)
                return NOT_NOW
            self._total_place = total_place  # the same as long as one slot is taken
            if shared.failures(place):
                lane.window = 1
        if not lane.since:
            lane.since = now
            lane.done = 0
            lane.booked = 0.0
        lane.running += 1
        return place

    def reached(self, lane: Lane, place: int) -> None:
        """The destination answered, whatever it said."""
        lane.misses = 0
        lane.window = min(lane.window + 1, max(lane.cap, 1))
        if self._shared.failures(place):
            self._shared.well(place)
            self._log.write(logs.REACHABLE, lane.name, lane.destination)

    def missed(self, lane: Lane, place: int, failure: Outcome) -> float:
        """Nothing of a call reached the destination. For how many seconds it is dead: 0.0 when others may still."""
        shared = self._shared
        rest = self.rest(lane)
        lane.failure = failure
        lane.misses += 1
        lane.window = max(1, lane.window // 2)
        failures = shared.failures(place)
        if not rest and (failures or lane.running == 1 or lane.misses > lane.window):
            lane.misses = 0
            wait = self._schedule.wait(failures + 1, self._chance)
            if shared.fail(place, failures, self._monotonic() + wait):
                self._count(Counter.DESTINATIONS_DEAD, 1)
                self._log.write(
                    logs.UNREACHABLE, lane.name, lane.destination, failure.status, failure.text, failures + 1,
                    round(wait),
                )  # fmt: skip
            rest = self.rest(lane)
        return rest

    def leave(self, lane: Lane, place: int, deliveries: int) -> None:
        """A call is over. Behind `missed`: whoever gets the slot sees that the destination is dead."""
        self._shared.give(self._worker, place)
        if lane.cap:
            self._shared.give(self._worker, self._total_place)
        lane.running -= 1
        lane.done += deliveries
        if not lane.waiting and not lane.running:
            lane.since = 0.0

    # Waiting

    def rest(self, lane: Lane) -> float:
        """For how many seconds a destination is dead."""
        until = self._shared.dead_until(lane.key)
        return max(0.0, until - self._monotonic()) if until else 0.0

    def book(self, lane: Lane) -> float:
        """In how many seconds a busy destination will be ready for a delivery more, at the pace that it has. Each one
        that is put off gets a time of its own, behind those before it."""
        now = self._monotonic()
        pace = max(lane.done / max(now - lane.since, 1.0), SLOWEST)
        lane.booked = max(lane.booked, now + len(lane.waiting) / pace) + 1 / pace
        return min(lane.booked - now, self._schedule.retry_max)

    def forget(self, lane: Lane) -> None:
        """Lets a destination be tried at once, however it failed."""
        self._shared.forget(lane.key)

    def forget_domain(self, domain: str) -> None:
        """The same for wherever the mail of a domain may go."""
        address = Address("postmaster", domain)
        for name, (transport, _) in self._ways.items():
            self._shared.forget(_key(name, transport.destination(address)))

    def forget_all(self) -> None:
        self._shared.forget_all()

    def sweep(self) -> None:
        """Forgets lanes that had nothing to do since the last time: a million domains must not need a million lanes."""
        for _, lanes in self._ways.values():
            idle = [lane for lane in lanes.values() if not (lane.used or lane.waiting or lane.running)]
            for lane in idle:
                del lanes[lane.destination]
            for lane in lanes.values():
                lane.used = False

    def states(self) -> list[LaneState]:
        """All lanes that there are."""
        found = []
        for name, (_, lanes) in self._ways.items():
            for lane in lanes.values():
                rest = self.rest(lane)
                why = f"{lane.failure.status} {lane.failure.text}" if rest else ""
                state = LaneState(name, lane.destination, len(lane.waiting), lane.running, lane.window, rest, why)
                found.append(state)
        return found


def unreached(results: Sequence[Sequence[Outcome]]) -> Outcome | None:
    """Why no recipient of a call reached its destination; None when one did."""
    found = None
    for outcomes in results:
        for outcome in outcomes:
            scope = outcome.scope
            if outcome.result is not Result.DEFERRED or not (scope is Scope.HOST or scope is Scope.SESSION):
                return None
            found = outcome
    return found


def _key(name: str, destination: str) -> int:
    """The same in all workers; not 0."""
    digest = blake2b(f"{name}\0{destination}".encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True) or 1
