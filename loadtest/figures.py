"""Which figures of a race are drawn, in which order and unit, the same in the page and in the charts.

In: a Comparison. Out: its lines by race, which is one scenario with one end, and for each figure its title, unit and
Spread. Lines keep their order: those that sync first, the faster first. Not here: drawing (race_page, charts).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .comparison import CLAIMS, Comparison, Line, Spread

PERCENTILES = {"p50": "p50", "p90": "p90", "p99": "p99", "p999": "p99.9"}
BROKEN = "syncs less than it claims"


@dataclass(frozen=True)
class Figure:
    title: str
    unit: str
    of: Callable[[Line], Spread | None]
    better: str  # "more" or "less"


FIGURES = {
    "accepted": Figure("Accepted", "messages/s", lambda line: line.accepted, "more"),
    "drained": Figure("Delivered", "messages/s", lambda line: line.drained, "more"),
    "cpu": Figure("Server's CPU", "µs/message", lambda line: line.cpu_us, "less"),
    "memory": Figure("Server's memory", "MB", lambda line: _scaled(line.memory, 1e-6), "less"),
}
LATENCY = Figure("End of data to its reply", "ms", lambda line: line.end_of_data_ms.get("p99"), "less")


def by_race(comparison: Comparison) -> dict[tuple[str, str], list[Line]]:
    """(scenario, end): its lines."""
    races: dict[tuple[str, str], list[Line]] = {}
    for line in comparison.lines:
        races.setdefault((line.scenario, line.end), []).append(line)
    return races


def kept(line: Line) -> str:
    """A key of CLAIMS, or BROKEN when the count of calls says otherwise."""
    return BROKEN if line.claim_holds is False else line.claim


# What a colour means: places in the palettes of page and charts.
KEPT = {**CLAIMS, BROKEN: "claims stable storage, but waits for the disk less than once a message"}


def _scaled(spread: Spread | None, by: float) -> Spread | None:
    if spread is None:
        return None
    return Spread(spread.median * by, spread.low * by, spread.high * by, tuple(one * by for one in spread.rounds))
