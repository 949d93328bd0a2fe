"""The sessions of a process that misbehave: opened, counted by kind, and opened again.

In: how many of each kind. Out: counts by outcome in the Tally. Always: the number of each kind stays what it was asked
to be while the run goes on, and none outlives it: its end is every session's deadline. A session that cannot connect,
or that the server ended at once, is followed by the next after a pause.
Not here: what the kinds do (misbehave). Nothing raises once they are made. On failure: LoadError for an unknown kind.
"""

from __future__ import annotations

import asyncio
from random import Random
from time import perf_counter

from . import LoadError
from .connecting import Connector
from .misbehave import KINDS, Context, Kind
from .options import Options
from .pacing import Source
from .tally import Tally

PAUSE = 0.05  # seconds between two sessions in a place: twenty hang-ups a second are hostile enough


class Misbehaving:
    """`counts` has sessions by kind; other names in it are ignored."""

    def __init__(
        self,
        options: Options,
        tally: Tally,
        connector: Connector,
        counts: dict[str, int],
        source: Source,
        rng: Random,
    ) -> None:
        self._options = options
        self._tally = tally
        self._connector = connector
        self._counts = {name: count for name, count in counts.items() if name in KINDS}
        self._source = source
        self._loop = asyncio.get_running_loop()
        self._rng = rng
        self._end = 0.0
        self.open = 0  # sessions
        self._stopped = False

    def start(self, end: float) -> None:
        """`end` is when the run is over."""
        self._end = end
        for name, count in self._counts.items():
            for _ in range(count):
                self._open(KINDS[name])

    def stop(self) -> None:
        self._stopped = True

    def _open(self, kind: Kind) -> None:
        left = self._end - perf_counter()
        if self._stopped or left <= 0:
            return

        def opened() -> None:
            self._tally.ever = True
            self._tally.on_open()
            self.open += 1

        def done(outcome: str, detail: str) -> None:
            self._tally.on_close()
            self.open -= 1
            self._tally.count_outcome(kind.name, outcome)
            self._loop.call_later(PAUSE, self._open, kind)

        def failed(why: str) -> None:
            self._tally.errors["connect"] += 1
            self._loop.call_later(PAUSE * 10, self._open, kind)

        options = self._options
        context = Context(
            mail=self._source,
            rng=self._rng,
            loop=self._loop,
            done=done,
            deadline=min(left, options.timeout),
            ehlo=f"EHLO {options.helo}\r\n".encode(),
            preface=self._connector.preface,
        )
        self._connector.open(lambda born: kind.factory(context), failed, opened, tls=options.tls == "implicit")


def check_kinds(options: Options) -> None:
    """Raises LoadError."""
    for name in options.misbehave:
        if name not in KINDS:
            raise LoadError(f"no misbehaviour is called {name}; there are {', '.join(KINDS)}")
