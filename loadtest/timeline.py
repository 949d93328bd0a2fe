"""A run's seconds as series that can be drawn: few enough points, and none that a last instant has spoilt.

In: the snapshots of a Result. Out: Steps, each of one or several seconds. Counts are added and become rates; of
latencies the worst second counts, for an average of percentiles is no percentile; sessions are those at the step's end.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from .result import Latency, Snapshot

MOST = 300  # steps: more than a plot's pixels can tell apart
LEAST = 0.5  # seconds of a step that stands alone; a shorter rest joins the one before


@dataclass(frozen=True)
class Step:
    end: float  # seconds since the start
    length: float
    sessions: int
    accepted: int
    refused: int
    octets: int
    errors: Counter[str]
    replies: Counter[str]
    latency_ms: dict[str, Latency]
    lag_ms: float

    def per_second(self, count: float) -> float:
        return count / self.length


def make_steps(timeline: Sequence[Snapshot], most: int = MOST) -> list[Step]:
    """At most so many; empty when no time passed."""
    together = max(1, math.ceil(len(timeline) / most))
    steps: list[Step] = []
    start = 0.0
    for group in _groups(timeline, together):
        end = group[-1].seconds
        if end <= start:
            continue
        steps.append(_step(group, end, end - start))
        start = end
    return steps


def _groups(timeline: Sequence[Snapshot], together: int) -> Iterator[Sequence[Snapshot]]:
    starts = list(range(0, len(timeline), together))
    if len(starts) > 1:
        before = timeline[starts[-1] - 1].seconds
        if timeline[-1].seconds - before < LEAST:
            starts.pop()
    for start, stop in pairwise([*starts, len(timeline)]):
        yield timeline[start:stop]


def _step(group: Sequence[Snapshot], end: float, length: float) -> Step:
    errors: Counter[str] = Counter()
    replies: Counter[str] = Counter()
    latency: dict[str, Latency] = {}
    for snapshot in group:
        errors.update(snapshot.errors)
        replies.update(snapshot.replies)
        for phase, value in snapshot.latency_ms.items():
            latency[phase] = _worse(latency[phase], value) if phase in latency else value
    return Step(
        end=end,
        length=length,
        sessions=group[-1].sessions,
        accepted=sum(one.accepted for one in group),
        refused=sum(one.refused for one in group),
        octets=sum(one.octets for one in group),
        errors=errors,
        replies=replies,
        latency_ms=latency,
        lag_ms=max(one.lag_ms for one in group),
    )


def _worse(one: Latency, other: Latency) -> Latency:
    return Latency(
        count=one.count + other.count,
        p50=max(one.p50, other.p50),
        p90=max(one.p90, other.p90),
        p99=max(one.p99, other.p99),
        p999=max(one.p999, other.p999),
        max=max(one.max, other.max),
    )
