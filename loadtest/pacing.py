"""When sessions are opened and when they send: the closed loop, the crowd, and the open loop.

In: sessions that are ready, done or gone; Mail from a source; for the open loop a rate. Out: calls of `Session.send`,
connections that are opened. Always: a session that ended in an error is opened again after a pause that doubles, so
that a dead server does not make the generator spin. In the open loop arrivals are drawn ahead from the seed alone
(Poisson), and latency counts from the drawn time: a server that stands still can hide nothing, for the mail that is due
meanwhile waits for a session and goes on waiting on its account. By how much the generator was late by itself is noted.
Not here: what a session says (dialogue), processes (worker). On failure: `failure` says what makes the run pointless.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from math import inf
from random import Random
from time import perf_counter
from typing import TypeAlias

from . import LoadError
from .connecting import AT_ONCE
from .content import Mail
from .dialogue import Dialogue
from .options import Options
from .session import Session
from .steps import Role

Source: TypeAlias = Callable[[], Mail]

FIRST_PAUSE = 0.05  # seconds before a session that failed is opened again
LONGEST_PAUSE = 1.0
TICK = 0.001  # seconds between two looks at what is due
HOPELESS = 3  # attempts to connect without a success: the server is not there


class Pacer:
    """`count` sessions of one role. `budget` is how many messages may be sent, inf for any number."""

    def __init__(self, options: Options, source: Source, count: int, budget: float) -> None:
        self.role: Role
        self.failure: LoadError | None = None
        self._loop = asyncio.get_running_loop()
        self._count = count
        self._source = source
        self._budget = budget
        self._per_connection = options.per_connection or inf
        self._beforehand = not options.per_connection  # sessions are open before the run begins
        self._unopened = 0  # of those that are to be open beforehand
        self._opening = 0  # sessions that are not ready yet, or wait for their next attempt
        self._ready = 0
        self._failed = 0  # attempts to connect
        self._running = False
        self._stopped = False

    # What the worker says.

    def prepare(self) -> None:
        """Opens the sessions that are to be open when the run begins."""
        if self._beforehand:
            self._unopened = self._count
            for _ in range(AT_ONCE):
                self._open_next()

    def _open_next(self) -> None:
        """Not all at once: those that the server has not greeted yet stand in its listen queue."""
        if self._unopened and not self._stopped:
            self._unopened -= 1
            self.open()

    @property
    def prepared(self) -> bool:
        """All sessions are open, or failed once."""
        return not self._beforehand or self._ready + self._failed >= self._count

    def start(self, at: float) -> None:
        """Begins to send; `at` is the beginning of the run."""
        self._running = True
        if not self._beforehand:
            for _ in range(self._count):
                self.open()

    def stop(self) -> None:
        """No new message; what is under way goes on."""
        self._running = False
        self._stopped = True

    def end(self) -> None:
        """What was not sent by now will not be."""

    @property
    def exhausted(self) -> bool:
        """There is nothing more to send."""
        return self._budget <= 0

    @property
    def busy(self) -> bool:
        """A message is under way."""
        return any(session.busy for session in self.role.sessions)

    def check_time(self, now: float, timeout: float) -> None:
        for session in list(self.role.sessions):
            session.check_time(now, timeout)

    def give_up(self, error: LoadError) -> None:
        """The run is pointless."""
        self.failure = self.failure or error

    # What sessions say.

    def on_ready(self, session: Dialogue, now: float) -> None:
        """It is open and idle."""
        raise NotImplementedError

    def _count_ready(self) -> None:
        self._ready += 1
        self._opening -= 1
        if self._unopened:
            self._open_next()

    def on_done(self, session: Dialogue, now: float) -> None:
        """Its message has its answer; it is idle."""
        raise NotImplementedError

    def on_closed(self, session: Dialogue) -> None:
        """It is gone."""
        if not session.ready:
            self._opening -= 1
            self._failed += 1
            self._open_next()
        self._open_again(session.failures)

    # Connections.

    def open(self, failures: int = 0) -> None:
        role = self.role
        self._opening += 1

        def on_failed(why: str) -> None:
            role.tally.errors["connect"] += 1
            self._opening -= 1
            self._failed += 1
            self._open_next()
            if not role.tally.ever and self._failed >= min(HOPELESS, self._count):
                self.give_up(LoadError(f"{role.options.target} cannot be reached: {why}"))
            self._open_again(failures + 1)

        role.connector.open(lambda born: Session(role, born, failures), on_failed)

    @property
    def _reopens(self) -> bool:
        return not self._stopped and self._budget > 0

    def _open_again(self, failures: int) -> None:
        if not failures:
            if self._reopens:
                self.open()
            return
        self._opening += 1
        self._loop.call_later(min(FIRST_PAUSE * 2 ** (failures - 1), LONGEST_PAUSE), self._after_pause, failures)

    def _after_pause(self, failures: int) -> None:
        self._opening -= 1
        if self._reopens:
            self.open(failures)

    def _take(self) -> Mail | None:
        """The next message, while there are any."""
        if self._stopped or self._budget <= 0:
            return None
        self._budget -= 1
        return self._source()


class Closed(Pacer):
    """Each session sends its next message when the one before was answered."""

    def __init__(self, options: Options, source: Source, count: int, budget: float) -> None:
        super().__init__(options, source, count, budget)
        self._think = options.think
        self._early: list[Dialogue] = []  # ready before the run begins

    def start(self, at: float) -> None:
        super().start(at)
        now = perf_counter()
        for session in self._early:
            self._send(session, now)
        self._early.clear()

    def on_ready(self, session: Dialogue, now: float) -> None:
        self._count_ready()
        if self._running:
            self._send(session, now)
        else:
            self._early.append(session)

    def on_done(self, session: Dialogue, now: float) -> None:
        if session.sent >= self._per_connection:
            session.quit()
        elif self._think:
            self._loop.call_later(self._think, self._think_over, session)
        else:
            self._send(session, now)

    def _think_over(self, session: Dialogue) -> None:
        self._send(session, perf_counter())

    def _send(self, session: Dialogue, now: float) -> None:
        if not session.over and (mail := self._take()) is not None:
            session.send(mail, now, now)


class Pool(Pacer):
    """Sessions that take turns: the one that has been idle for longest is the next that sends."""

    def __init__(self, options: Options, source: Source, count: int, budget: float) -> None:
        super().__init__(options, source, count, budget)
        self._free: deque[Dialogue] = deque()

    def on_ready(self, session: Dialogue, now: float) -> None:
        self._count_ready()
        self._free.append(session)
        self._hand_out()

    def on_done(self, session: Dialogue, now: float) -> None:
        if session.sent >= self._per_connection:
            session.quit()
        else:
            self._free.append(session)
        self._hand_out()

    def on_closed(self, session: Dialogue) -> None:
        super().on_closed(session)
        self._hand_out()

    def _hand_out(self) -> None:
        """Sends what can be sent."""
        raise NotImplementedError

    def _pop(self) -> Dialogue | None:
        """A session that is free and still there."""
        while self._free:
            session = self._free.popleft()
            if not session.over:
                return session
        return None


class Crowd(Pool):
    """A closed loop of many sessions, of which `active` send at a time."""

    def __init__(self, options: Options, source: Source, count: int, budget: float, active: int) -> None:
        super().__init__(options, source, count, budget)
        self._active = active
        self._sending: set[Dialogue] = set()

    def start(self, at: float) -> None:
        super().start(at)
        self._hand_out()

    def on_done(self, session: Dialogue, now: float) -> None:
        self._sending.discard(session)
        super().on_done(session, now)

    def on_closed(self, session: Dialogue) -> None:
        self._sending.discard(session)
        super().on_closed(session)

    def _hand_out(self) -> None:
        while self._running and len(self._sending) < self._active and (session := self._pop()) is not None:
            mail = self._take()
            if mail is None:
                self._free.append(session)
                return
            self._sending.add(session)
            now = perf_counter()
            session.send(mail, now, now)


class Open(Pool):
    """The open loop: `rate` messages a second in this process, through `most` sessions at most."""

    def __init__(
        self, options: Options, source: Source, count: int, budget: float, rate: float, most: int, rng: Random
    ) -> None:
        super().__init__(options, source, count, budget)
        self._most = most
        self._arrivals = draw_arrivals(rate, rng)
        self._start = 0.0
        self._next = 0.0  # when the next message is due
        self._waiting: deque[float] = deque()  # when those were due that have no session yet

    def start(self, at: float) -> None:
        self._running = True
        self._start = at
        self._next = at + next(self._arrivals)
        self._tick()

    @property
    def busy(self) -> bool:
        return bool(self._waiting) or super().busy

    def check_time(self, now: float, timeout: float) -> None:
        super().check_time(now, timeout)
        while self._waiting and now - self._waiting[0] > timeout:
            self._waiting.popleft()
            self.role.tally.errors["overrun"] += 1

    def end(self) -> None:
        self.role.tally.errors["overrun"] += len(self._waiting)
        self._waiting.clear()

    def _tick(self) -> None:
        if not self._running:
            return
        now = perf_counter()
        lags = self.role.tally.lags
        while self._next <= now and self._budget > 0:
            self._budget -= 1
            self._waiting.append(self._next)
            lags.append(now - self._next)
            self._next = self._start + next(self._arrivals)
        self._hand_out()
        self._loop.call_later(TICK, self._tick)

    def _hand_out(self) -> None:
        while self._waiting and (session := self._pop()) is not None:
            session.send(self._source(), self._waiting.popleft(), perf_counter())
        missing = len(self._waiting) - self._opening
        for _ in range(min(missing, self._most - len(self.role.sessions) - self._opening)):
            self.open()

    @property
    def _reopens(self) -> bool:
        """A session that is gone is missed where it was opened beforehand; otherwise the next message opens one."""
        missed = len(self.role.sessions) + self._opening < self._count
        return (self._beforehand and missed and not self._stopped) or len(self._waiting) > self._opening


def draw_arrivals(rate: float, rng: Random) -> Iterator[float]:
    """Seconds since the beginning at which something is due, `rate` times a second on average, without memory."""
    at = 0.0
    while True:
        at += rng.expovariate(rate)
        yield at
