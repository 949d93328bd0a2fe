"""What one process has counted since it was asked last, and what all of them counted together.

In: counts, as the sessions make them, and the latencies that each Step of the dialogue holds. Out: a Part each second,
which goes to the parent process and is merged there into Totals. Always: a reply is counted once, under its code: a
step's latencies are as many replies of the code that was expected, and `odd` holds what deviates from that.
Not here: what a phase or an error means (result). Nothing fails.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Protocol

from .histogram import Histogram


class Timed(Protocol):
    """A step of the dialogue: what it waited, and the code that it waited for."""

    phase: str  # "" is not shown
    code: int
    values: list[float]


@dataclass
class Part:
    """Counts since the part before; `sessions` is how many are open now, `peak` how many were at most."""

    seconds: float = 0.0  # since the beginning of the run
    sessions: int = 0
    peak: int = 0
    opened: int = 0
    accepted: int = 0
    refused: int = 0
    unknown: int = 0
    lost: int = 0
    recipients_refused: int = 0
    resumed: int = 0
    octets: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    replies: Counter[int] = field(default_factory=Counter)
    misbehaviour: dict[str, Counter[str]] = field(default_factory=dict)
    phases: dict[str, Histogram] = field(default_factory=dict)
    lag: Histogram = field(default_factory=Histogram)

    def merge(self, other: Part) -> None:
        """Adds another's counts; what is a state (seconds, sessions, peak) stays."""
        for name in _COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.errors.update(other.errors)
        self.replies.update(other.replies)
        for kind, outcomes in other.misbehaviour.items():
            self.misbehaviour.setdefault(kind, Counter()).update(outcomes)
        for phase, histogram in other.phases.items():
            self.phases.setdefault(phase, Histogram()).merge(histogram)
        self.lag.merge(other.lag)


_COUNTS = ("opened", "accepted", "refused", "unknown", "lost", "recipients_refused", "resumed", "octets")


class Tally:
    """The counters of a process. Sessions add to the attributes; `take` empties them."""

    def __init__(self) -> None:
        self.ever = False  # could it connect
        self.sessions = 0
        self.peak = 0
        self.opened = 0
        self.accepted = 0
        self.refused = 0
        self.unknown = 0
        self.lost = 0
        self.recipients_refused = 0
        self.resumed = 0
        self.octets = 0
        self.answered_at = 0.0  # when the last message got its answer
        self.errors: Counter[str] = Counter()
        self.odd: Counter[int] = Counter()  # replies by code, where it is not the one that was expected
        self.misbehaviour: dict[str, Counter[str]] = {}
        self.lags: list[float] = []
        self._values: dict[str, list[float]] = {}
        self._steps: list[Timed] = []

    def values(self, phase: str) -> list[float]:
        """A list of seconds that belong to no step; what is appended is counted."""
        return self._values.setdefault(phase, [])

    def watch(self, step: Timed) -> None:
        self._steps.append(step)

    def on_open(self) -> None:
        """A session was greeted."""
        self.opened += 1
        self.sessions += 1
        if self.sessions > self.peak:
            self.peak = self.sessions

    def on_close(self) -> None:
        self.sessions -= 1

    def count_outcome(self, kind: str, outcome: str) -> None:
        """Of a session that misbehaves."""
        self.misbehaviour.setdefault(kind, Counter())[outcome] += 1

    def take(self, seconds: float) -> Part:
        """All counts since the last call."""
        part = Part(seconds=seconds, sessions=self.sessions, peak=self.peak)
        for name in _COUNTS:
            setattr(part, name, getattr(self, name))
            setattr(self, name, 0)
        self.peak = self.sessions
        part.errors, self.errors = self.errors, Counter()
        part.replies, self.odd = self.odd, Counter()
        part.misbehaviour, self.misbehaviour = self.misbehaviour, {}
        for phase, values in self._values.items():
            self._move(part, phase, values)
        for step in self._steps:
            part.replies[step.code] += len(step.values)
            self._move(part, step.phase, step.values)
        part.lag.add(self.lags)
        self.lags.clear()
        return part

    def _move(self, part: Part, phase: str, values: list[float]) -> None:
        if phase and values:
            part.phases.setdefault(phase, Histogram()).add(values)
        values.clear()  # the list itself stays: its append is bound in many places
