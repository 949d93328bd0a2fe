"""What is counted and when things are due: histograms, tallies, arrivals. The loops run in test_load_generator."""

from __future__ import annotations

import math
import pickle
from itertools import islice
from random import Random

import pytest
from hdrh.histogram import HdrHistogram

from loadtest.histogram import Histogram
from loadtest.options import Options
from loadtest.pacing import draw_arrivals
from loadtest.session import make_steps
from loadtest.tally import Part, Tally


def values(count: int, seed: int = 1) -> list[float]:
    """From microseconds to minutes."""
    rng = Random(seed)
    return [rng.lognormvariate(-6, 2) for _ in range(count)]


@pytest.mark.parametrize("count", [1, 2, 10, 1000, 30_000])
def test_percentiles_are_those_of_the_values(count: int) -> None:
    found = Histogram()
    drawn = values(count)
    for start in range(0, count, 700):
        found.add(drawn[start : start + 700])
    latency = found.latency()
    assert latency is not None
    drawn.sort()
    for share, shown in ((0.5, latency.p50), (0.9, latency.p90), (0.99, latency.p99), (0.999, latency.p999)):
        exact = drawn[math.ceil(share * count) - 1]
        assert shown / 1000 == pytest.approx(exact, rel=0.004)
    assert latency.max == 1000 * drawn[-1]
    assert latency.count == count


def test_percentiles_are_those_of_hdrhistogram() -> None:
    """Two significant digits, of nanoseconds."""
    other = HdrHistogram(1, 3_600_000_000_000, 2)
    found = Histogram()
    drawn = values(20_000)
    found.add(drawn)
    for value in drawn:
        other.record_value(int(value * 1e9))
    latency = found.latency()
    assert latency is not None
    for percentile, shown in ((50, latency.p50), (90, latency.p90), (99, latency.p99), (99.9, latency.p999)):
        assert shown == pytest.approx(other.get_value_at_percentile(percentile) / 1e6, rel=0.012)


def test_nothing_has_no_percentiles() -> None:
    found = Histogram()
    found.add([])
    assert found.latency() is None
    found.add([0.0])
    latency = found.latency()
    assert latency is not None
    assert (latency.p50, latency.max) == (0.0, 0.0)


def test_histograms_are_merged_and_sent() -> None:
    parts = [Histogram(), Histogram(), Histogram()]
    for seed, part in enumerate(parts):
        part.add(values(100, seed))
    merged = Histogram()
    for part in parts:
        merged.merge(pickle.loads(pickle.dumps(part)))
    together = Histogram()
    together.add([value for seed in range(3) for value in values(100, seed)])
    assert merged.latency() == together.latency()


def test_a_tally_is_empty_when_it_was_taken() -> None:
    tally = Tally()
    steps = make_steps(Options(), large=False)
    for step in steps:
        tally.watch(step)
    tally.on_open()
    tally.on_open()
    tally.on_close()
    tally.accepted += 3
    tally.errors["reset"] += 1
    tally.count_outcome("idle", "closed")
    tally.lags.append(0.002)
    tally.values("connect").append(0.001)
    steps.rcpt.note(0.1)
    steps.rcpt.note(0.2)
    tally.odd[550] += 1  # the second of them
    tally.odd[250] -= 1
    part = tally.take(1.0)
    assert (part.sessions, part.peak, part.opened, part.accepted) == (1, 2, 2, 3)
    assert {code: count for code, count in part.replies.items() if count} == {250: 1, 550: 1}
    assert {phase: histogram.counts.total() for phase, histogram in part.phases.items()} == {"connect": 1, "rcpt": 2}
    assert part.misbehaviour == {"idle": {"closed": 1}}
    assert part.lag.most == 0.002
    again = tally.take(2.0)
    assert (again.sessions, again.peak, again.opened, again.accepted) == (1, 1, 0, 0)
    assert not again.phases
    assert not again.errors
    assert not any(again.replies.values())
    steps.rcpt.note(0.3)  # what is bound still counts
    assert tally.take(3.0).phases["rcpt"].counts.total() == 1


def test_parts_are_added_up() -> None:
    whole = Part()
    for number in (1, 2):
        part = Part(accepted=number, octets=10 * number, sessions=5)
        part.errors["reset"] = number
        part.replies[250] = number
        part.misbehaviour["idle"] = part.errors.copy()
        part.phases["mail"] = Histogram()
        part.phases["mail"].add([0.1] * number)
        whole.merge(part)
    assert (whole.accepted, whole.octets, whole.sessions) == (3, 30, 0)
    assert whole.errors == {"reset": 3}
    assert whole.replies == {250: 3}
    assert whole.misbehaviour == {"idle": {"reset": 3}}
    assert whole.phases["mail"].counts.total() == 3


def test_arrivals_are_poisson_and_repeat() -> None:
    drawn = list(islice(draw_arrivals(500.0, Random("x")), 50_000))
    assert drawn == list(islice(draw_arrivals(500.0, Random("x")), 50_000))
    gaps = [after - before for before, after in zip([0.0, *drawn], drawn, strict=False)]
    mean = sum(gaps) / len(gaps)
    deviation = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps))
    assert min(gaps) > 0
    # Both are 2 ms; of 50,000 exponential gaps five standard errors are 2.2 % of the mean, 4.5 % of the deviation.
    assert mean == pytest.approx(0.002, rel=0.022)
    assert deviation == pytest.approx(0.002, rel=0.045)
