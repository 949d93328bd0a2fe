"""The report of one run or several, as one HTML file with plots that opens without a network.

In: Results. Out: HTML as text. Each run has its headline, what must be known before it is believed, plots over time,
its percentiles, and its tables; several runs are compared first, and when their offered rates differ the page shows at
which of them latency grows. A plot without values is left out.
Not here: the race (race_page, whose page `render_comparison` makes), SVG (plot), HTML and escaping (document).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from .caveats import caveats
from .document import (
    render_details,
    render_document,
    render_facts,
    render_figure,
    render_heading,
    render_table,
    render_warnings,
)
from .plot import COLOURS, Axis, Series, kind_for, render_lines, seconds
from .race_page import render_comparison
from .result import PHASES, Latency, Result
from .show import clock, count, number
from .table import LATENCY_HEAD, error_rows, headline, latency_rows, misbehaviour_rows, reply_rows
from .timeline import Step, make_steps

__all__ = ["render_comparison", "render_page"]

TIME = Axis("time", "time", seconds, seconds)
QUANTILES = (2.0, 10.0, 100.0, 1e3, 1e4, 1e5, 1e6, 1e7)  # as 1 / (1 - quantile)
AT_A_RATE = {"p50": "p50", "p99": "p99", "p999": "p99.9"}
OVER_TIME = {"p50": "p50", "p90": "p90", "p99": "p99", "max": "max"}


def whole(value: float) -> str:
    """For an axis of what is counted."""
    return count(round(value))


def quantile(value: float) -> str:
    """100 as 99 %."""
    return f"{100 - 100 / value:.10g} %"


PERCENTILE = Axis("percentile", "log", quantile, quantile, ticks=QUANTILES)


def render_page(results: Sequence[Result], title: str) -> str:
    body = list(_overview(results)) if len(results) > 1 else []
    for result in results:
        body += _section(result)
    return render_document(title, body)


def _names(results: Sequence[Result]) -> list[str]:
    """By which they are told apart: what several are called has more said, or is numbered at last."""
    names = [_name(one) for one in results]
    if len(set(names)) < len(names):
        names = [f"{name} to {one.target}" for name, one in zip(names, results, strict=True)]
    if len(set(names)) < len(names):
        names = [f"{name}, run {place}" for place, name in enumerate(names, 1)]
    return names


def _name(result: Result) -> str:
    rate = result.options.get("rate")
    return f"{result.scenario}, {number(rate)}/s offered" if isinstance(rate, float | int) and rate else result.scenario


def _section(result: Result) -> Iterator[str]:
    yield render_heading(f"{_name(result)} to {result.target}")
    ended = "interrupted after" if result.interrupted else "took"
    yield render_facts([("started", result.started), (ended, clock(result.seconds)), *_named(headline(result))])
    yield from render_warnings(caveats(result))
    steps = make_steps(result.timeline)
    yield f'<div class="figures">{"".join(_figures(result, steps))}</div>'
    head, rows = misbehaviour_rows(result)
    yield render_table(LATENCY_HEAD, latency_rows(result))
    yield render_table(("errors", "count", "meaning"), error_rows(result), (2,))
    yield render_table(("reply", "count", "share"), reply_rows(result))
    yield render_table(head, rows)
    yield render_details("Options", _mapping("option", result.options))
    yield render_details("Machine", _mapping("machine", result.machine))


def _named(rows: Sequence[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """A figure below another one has no word of its own."""
    before = ""
    for name, figure in rows:
        yield name or before, figure
        before = name or before


def _mapping(what: str, values: Mapping[str, object]) -> str:
    return render_table((what, "value"), [(str(name), str(value)) for name, value in values.items()], (1,))


def _figures(result: Result, steps: Sequence[Step]) -> Iterator[str]:
    long = f"each point is {number(steps[0].length)} s" if steps and steps[0].length > 1.5 else ""
    worst = f"{long}, the worst of its seconds" if long else ""
    rates = _over(steps, {"accepted": lambda s: s.per_second(s.accepted), "refused": lambda s: s.per_second(s.refused)})
    yield from _lines("Throughput", long, rates, TIME, Axis("messages/s"))
    open_now = _over(steps, {"open sessions": lambda step: step.sessions})
    yield from _lines("Sessions", "", open_now, TIME, Axis("sessions", show=whole, step=1), always=True)
    for phase in ("message", "end_of_data") if result.lag_ms else ("end_of_data",):
        latencies = _latencies(steps, phase)
        title = f"Latency, {PHASES[phase]}"
        yield from _lines(title, worst, latencies, TIME, _milliseconds(latencies))
    by_phase = [
        Series(PHASES.get(phase, phase), distribution(result.latency_ms[phase]), place % COLOURS)
        for place, phase in enumerate([*PHASES, *sorted(result.latency_ms.keys() - PHASES.keys())])
        if phase in result.latency_ms
    ]
    note = "within which time so large a share of all was done, over the whole run"
    yield from _lines("Percentiles by phase", note, by_phase, PERCENTILE, _milliseconds(by_phase), dots=True)
    failed = _counters([step.errors for step in steps], steps)
    yield from _lines("Errors by kind", long, failed, TIME, Axis("errors/s"))
    refused = _counters(
        [{code: times for code, times in step.replies.items() if code[:1] in ("4", "5")} for step in steps], steps
    )
    yield from _lines("Refusing replies by code", long, refused, TIME, Axis("replies/s"))
    if result.lag_ms:
        late = _over(steps, {"late at most": lambda step: step.lag_ms})
        yield from _lines("Lateness of the generator itself", worst, late, TIME, _milliseconds(late))


def _latencies(steps: Sequence[Step], phase: str) -> list[Series]:
    """Percentiles of one phase over time; where nothing was timed there is no point."""
    timed = [(step.end, step.latency_ms[phase]) for step in steps if phase in step.latency_ms]
    return [
        Series(name, [(end, getattr(latency, key)) for end, latency in timed], place)
        for place, (key, name) in enumerate(OVER_TIME.items())
    ]


def _overview(results: Sequence[Result]) -> Iterator[str]:
    """All runs in one table and over each other."""
    yield render_heading("All runs")
    head = ("run", "target", "accepted/s", "accepted", "refused", "errors", "end of data p50 ms", "p99 ms", "p99.9 ms")
    names = _names(results)
    yield render_table(head, map(_overview_row, names, results), (1,))
    rates = [
        Series(name, [(s.end, s.per_second(s.accepted)) for s in make_steps(one.timeline)], place % COLOURS)
        for place, (name, one) in enumerate(zip(names, results, strict=True))
    ]
    ended = [
        Series(name, distribution(one.latency_ms["end_of_data"]), place % COLOURS)
        for place, (name, one) in enumerate(zip(names, results, strict=True))
        if "end_of_data" in one.latency_ms
    ]
    figures = [
        *_lines("Throughput", "", rates, TIME, Axis("messages/s")),
        *_lines("End of data to its reply", "", ended, PERCENTILE, _milliseconds(ended), dots=True),
        *_knee(results),
    ]
    yield f'<div class="figures">{"".join(figures)}</div>'


def _overview_row(name: str, result: Result) -> tuple[str, ...]:
    end = result.latency_ms.get("end_of_data")
    figures = [number(value) for value in (end.p50, end.p99, end.p999)] if end else ["", "", ""]
    counted = (result.messages_accepted, result.messages_refused, sum(result.errors.values()))
    return (name, result.target, number(result.rate), *(count(value) for value in counted), *figures)


def _knee(results: Sequence[Result]) -> Iterator[str]:
    """Latency and what was accepted, by the rate that was offered."""
    offered = sorted(
        ((float(one.options["rate"]), one) for one in results if one.options.get("rate")), key=lambda pair: pair[0]
    )
    if len({rate for rate, _ in offered}) < 2:
        return
    # From when a message was due: a server that stalls cannot hide there.
    waited = [(rate, found) for rate, one in offered if (found := one.latency_ms.get("message"))]
    series = [
        Series(name, [(rate, getattr(latency, key)) for rate, latency in waited], place)
        for place, (key, name) in enumerate(AT_A_RATE.items())
    ]
    rate_axis = Axis("offered messages/s")
    yield from _lines("Latency by offered rate", PHASES["message"], series, rate_axis, _milliseconds(series), dots=True)
    taken = [Series("accepted", [(rate, one.rate) for rate, one in offered], 0)]
    yield from _lines("Accepted by offered rate", "", taken, rate_axis, Axis("messages/s"), dots=True)


def distribution(latency: Latency) -> list[tuple[float, float]]:
    """Points (1 / (1 - quantile), ms), as far as there were enough samples for the quantile; the largest at its end."""
    known = zip((2.0, 10.0, 100.0, 1000.0), (latency.p50, latency.p90, latency.p99, latency.p999), strict=True)
    points = [(at, value) for at, value in known if at <= max(latency.count, 2)]
    if latency.count > points[-1][0]:
        points.append((float(latency.count), latency.max))
    return points


def _over(steps: Sequence[Step], figures: Mapping[str, Callable[[Step], float]]) -> list[Series]:
    return [
        Series(name, [(step.end, figure(step)) for step in steps], place)
        for place, (name, figure) in enumerate(figures.items())
    ]


def _counters(counters: Sequence[Mapping[str, int]], steps: Sequence[Step]) -> list[Series]:
    """A series for each name that occurs at all."""
    names = dict.fromkeys(name for counter in counters for name, times in counter.items() if times)
    return [
        Series(
            name,
            [(step.end, step.per_second(counter.get(name, 0))) for step, counter in zip(steps, counters, strict=True)],
            place % COLOURS,
        )
        for place, name in enumerate(names)
    ]


def _milliseconds(series: Sequence[Series]) -> Axis:
    return Axis("ms", kind_for([point[1] for one in series for point in one.points]))


def _lines(
    title: str, note: str, series: Sequence[Series], x: Axis, y: Axis, always: bool = False, dots: bool = False
) -> Iterator[str]:
    """A figure of those that are anywhere above zero; none when none is."""
    drawn = [one for one in series if one.points and (always or any(value for _, value in one.points))]
    if drawn:
        keys = [(one.name, one.colour) for one in drawn]
        yield render_figure(title, note, keys, render_lines(title, drawn, x, y, dots))
