"""One process of the generator: its sessions, from the first connection to the last count.

In: an Order through a socket that the parent holds the other end of, and its words GO and STOP. Out: through the same
socket, in this order: an Opening now and then while sessions are opened, a Ready, a Part each second, and at the end a
Closing; or a LoadError in their place. Always: it ends when the parent is gone, and when its time is over, whatever
the server does; nothing it prints reaches anyone. Not here: merging (generator), when a session sends (pacing).
On failure: the LoadError goes to the parent; what is a mistake of ours goes there too, in one line.
"""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import sys
from dataclasses import dataclass, field, replace
from enum import Enum
from math import inf
from multiprocessing.connection import Connection
from random import Random
from time import perf_counter
from typing import Any

import uvloop

from . import LoadError
from .connecting import Connector
from .content import Mail, make_source
from .ledger import Ledger, Outcome
from .misbehaving import Misbehaving
from .options import Options
from .pacing import Closed, Crowd, Open, Pacer, Source
from .session import make_steps
from .steps import Role
from .tally import Part, Tally

LARGE_FROM = 10**9  # messages of a process
STALLED = 10.0  # seconds without one more session that is open; then the run begins without the rest
QUIT_SECONDS = 2.0  # for QUIT and its reply, when all is done
INTERRUPTED_GRACE = 2.0
LOOK = 0.01  # seconds between two looks at whether something is done
LONGEST_LOOK = 1.0  # seconds between two looks at who owes an answer for too long
COLLECTION = 50_000  # objects that are new between two collections of the youngest; each shows as a lag


class Word(Enum):
    """Said to a worker, with a time: when the run begins."""

    GO = "go"
    STOP = "stop"


@dataclass(frozen=True)
class Order:
    """What one of the processes does. `roles` has one entry per session: "mail", "large" or a kind of misbehaviour."""

    options: Options
    index: int
    address: tuple[str, int]  # numeric
    sources: tuple[str, ...]
    roles: tuple[str, ...]
    most: int  # sessions of the open loop
    budget: float  # messages


@dataclass(frozen=True)
class Opening:
    sessions: int


@dataclass(frozen=True)
class Ready:
    """All sessions are open that can be; the counts of the opening."""

    part: Part


@dataclass(frozen=True)
class Closing:
    """The last counts; `seconds` from the beginning to the last answer, `cpu` seconds of user and system meanwhile."""

    part: Part
    seconds: float
    cpu: float
    limits: list[str] = field(default_factory=list)


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


class Worker:
    """All of it; `run` is the whole life."""

    def __init__(self, order: Order, parent: Connection) -> None:
        self._order = order
        self._options = options = order.options
        self._parent = parent
        self._loop = asyncio.get_running_loop()
        self._tally = Tally()
        self._connector = Connector(options, self._tally, order.address, order.sources)
        self._ledger = Ledger(options.ledger) if options.ledger else None
        self._go: asyncio.Future[float] = self._loop.create_future()
        self._interrupted = False
        source = make_source(options, order.index, options.seed)
        self._pacers = self._make_pacers(source)
        counts = {role: order.roles.count(role) for role in dict.fromkeys(order.roles)}
        rng = Random(f"misbehave {options.seed} {order.index}")
        self._misbehaving = Misbehaving(options, self._tally, self._connector, counts, self._recorded(source), rng)
        self._start = 0.0
        self._ticks = 0
        self._failure: LoadError | None = None
        self._limits: list[str] = []

    def _recorded(self, source: Source) -> Source:
        """For those that misbehave: nobody reads what becomes of their messages."""
        ledger = self._ledger
        if ledger is None:
            return source

        def take() -> Mail:
            mail = source()
            ledger.write(mail, Outcome.UNKNOWN, 0)
            return mail

        return take

    def _make_pacers(self, source: Source) -> list[Pacer]:
        options, order = self._options, self._order
        count = order.roles.count("mail")
        pacers: list[Pacer] = []
        if options.rate:
            rate = options.rate / options.processes
            rng = Random(f"arrivals {options.seed} {order.index}")
            pacers.append(Open(options, source, count, order.budget, rate, order.most, rng))
        elif options.active < 1:
            active = max(round(count * options.active), 1)
            pacers.append(Crowd(options, source, count, order.budget, active))
        else:
            pacers.append(Closed(options, source, count, order.budget))
        if large := order.roles.count("large"):
            chosen = replace(options, size=options.large_size, sizes="", corpus="", think=0.0)
            # Far behind the numbers of the other messages: no `{n}` comes twice.
            place = order.index + LARGE_FROM * options.processes
            pacers.append(Closed(chosen, make_source(chosen, place, options.seed), large, inf))
        for pacer, is_large in zip(pacers, (False, True), strict=False):
            steps = make_steps(options, is_large)
            pacer.role = Role(options, self._tally, self._connector, steps, self._ledger, pacer)
            if is_large:
                pacer.role.note_message = pacer.role.note_session = _forget
        return pacers

    async def run(self) -> None:
        """Raises LoadError."""
        self._loop.add_reader(self._parent.fileno(), self._on_word)
        self._loop.set_exception_handler(self._on_mistake)
        self._check_time()
        await self._open()
        self._parent.send(Ready(self._tally.take(0)))
        self._start = await self._go
        await asyncio.sleep(max(self._start - perf_counter(), 0))
        used = cpu_seconds()
        for pacer in self._pacers:
            pacer.start(self._start)
        self._misbehaving.start(self._start + self._options.duration)
        self._loop.call_at(self._loop.time() + self._start + 1 - perf_counter(), self._tick)
        ended = await self._send()
        used = cpu_seconds() - used
        seconds = max(ended - self._start, 0.0)
        self._loop.set_exception_handler(lambda loop, context: None)  # what is cut off now has nothing to say
        await self._close()
        part = self._tally.take(seconds)
        self._parent.send(Closing(part, seconds, used, [*self._limits, *self._connector.limits]))

    async def _open(self) -> None:
        for pacer in self._pacers:
            pacer.prepare()
        told = grown = perf_counter()
        open_before = 0
        while not self._interrupted and not all(pacer.prepared for pacer in self._pacers):
            await asyncio.sleep(LOOK)
            now = perf_counter()
            self._check()
            if self._tally.sessions > open_before:
                open_before, grown = self._tally.sessions, now
            if now - told > 0.5:
                told = now
                self._parent.send(Opening(open_before))
            if now - grown > STALLED:
                self._limits.append(f"the run began with {open_before:,} sessions: the server greeted no more")
                return

    async def _send(self) -> float:
        """Until the time is over, or there is nothing more to send, or the parent says stop; then what is left. When
        the last answer came, and not before the time was over."""
        end = self._start + self._options.duration
        # Not every pacer has a budget: the large messages end with the others.
        while not self._interrupted and perf_counter() < end and not self._pacers[0].exhausted:
            await asyncio.sleep(min(LOOK, max(end - perf_counter(), 0)))
            self._check()
        stopped = self._start if self._pacers[0].exhausted else perf_counter()
        for pacer in self._pacers:
            pacer.stop()
        grace = min(self._options.grace, INTERRUPTED_GRACE) if self._interrupted else self._options.grace
        end = perf_counter() + grace
        while any(pacer.busy for pacer in self._pacers) and perf_counter() < end:
            await asyncio.sleep(LOOK)
            self._check()
            if self._interrupted:
                end = min(end, perf_counter() + INTERRUPTED_GRACE)
        busy = any(pacer.busy for pacer in self._pacers)
        return perf_counter() if busy else max(stopped, self._tally.answered_at)

    async def _close(self) -> None:
        """What is still under way has no answer; the others quit."""
        self._connector.close()
        self._misbehaving.stop()
        sessions = [session for pacer in self._pacers for session in pacer.role.sessions]
        for pacer in self._pacers:
            pacer.end()
        for session in sessions:
            if session.busy:
                session.fail("timeout")
            else:
                session.dismiss()
        end = perf_counter() + QUIT_SECONDS
        while self._has_sessions() and perf_counter() < end:
            await asyncio.sleep(LOOK)
        for session in sessions:
            session.abandon()

    def _has_sessions(self) -> bool:
        """Those that misbehave have the end of the run as their deadline, which an interruption does not move."""
        misbehaving = self._misbehaving.open > 0 and not self._interrupted
        return misbehaving or any(pacer.role.sessions for pacer in self._pacers)

    def _tick(self) -> None:
        self._ticks += 1
        self._parent.send(self._tally.take(perf_counter() - self._start))
        self._loop.call_at(self._loop.time() + self._start + self._ticks + 1 - perf_counter(), self._tick)

    def _check_time(self) -> None:
        now = perf_counter()
        self._connector.check_time(now)
        for pacer in self._pacers:
            pacer.check_time(now, self._options.timeout)
        shortest = min(self._options.timeout, self._options.connect_timeout)
        self._loop.call_later(min(shortest / 4, LONGEST_LOOK), self._check_time)

    def _check(self) -> None:
        failure = self._failure or next((pacer.failure for pacer in self._pacers if pacer.failure), None)
        if failure:
            raise failure

    def _on_word(self) -> None:
        try:
            word, at = self._parent.recv()
        except (EOFError, OSError):
            os._exit(1)  # the parent is gone
        if word is Word.STOP:
            self._interrupted = True
            at = perf_counter()
        if not self._go.done():
            self._go.set_result(at)

    def _on_mistake(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self._failure = LoadError(f"the generator erred: {context.get('message')}: {context.get('exception')!r}")


def _forget(seconds: float) -> None:
    """Large messages would hide the small ones beside them."""


async def work(order: Order, parent: Connection) -> None:
    worker = Worker(order, parent)
    await worker.run()


def main(descriptor: int) -> int:
    parent = Connection(descriptor)
    order: Order = parent.recv()
    gc.freeze()
    gc.set_threshold(COLLECTION, 50, 100)
    try:
        uvloop.run(work(order, parent))
    except LoadError as error:
        parent.send(error)
    except Exception as error:
        parent.send(LoadError(f"the generator erred: {error!r}"))
        return 1
    return 0


if __name__ == "__main__":
    # Under its own name, so that what is pickled here is known there.
    from loadtest import worker

    sys.exit(worker.main(int(sys.argv[1])))
