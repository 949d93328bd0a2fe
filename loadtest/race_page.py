"""The report of a race, as one HTML file with plots that opens without a network.

In: a Comparison. Out: HTML as text. For each scenario and end: bars by server with the spread of their rounds, latency
percentiles as dots, and a table; colours say what a server has done before its 250, and one that syncs less than it
claims stands out. What went wrong is said, never left out. Not here: PNG (charts), Markdown and JSON (compare).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .comparison import ENDS, Comparison, Line, Spread
from .document import (
    render_details,
    render_document,
    render_facts,
    render_figure,
    render_heading,
    render_keys,
    render_table,
    render_warnings,
)
from .figures import FIGURES, KEPT, LATENCY, PERCENTILES, Figure, by_race, kept
from .plot import Axis, Mark, Row, kind_for, render_rows
from .show import NONE, count, number

COLOUR = dict(zip(KEPT, (0, 4, 6), strict=True))
HEAD = (
    "server",
    "kept before 250",
    "syncs/message before 250, in all",
    *(f"{one.title}, {one.unit}" for one in FIGURES.values()),
    "p50 ms",
    "p99 ms",
)
RATES = ("accepted/s", "delivered/s", "CPU µs", "generator's CPU µs")
ROUNDS_HEAD = ("server", "round", "accepted", "refused", "unknown", "errors", "delivered", *RATES)


def render_comparison(comparison: Comparison, title: str) -> str:
    facts = [
        ("started", comparison.started),
        ("rounds", f"{count(comparison.rounds)} of {number(comparison.seconds)} s, interleaved"),
        ("CPU", comparison.accounting),
    ]
    body = [render_facts(facts), render_facts([("command", comparison.command)])]
    if comparison.interrupted:
        body += render_warnings(["interrupted: not all rounds were run"])
    body += render_warnings(f"{server} took no part: {why}" for server, why in comparison.missing.items())
    for (scenario, end), lines in by_race(comparison).items():
        body += _race(comparison, scenario, end, lines)
    machine = [(str(name), str(value)) for name, value in comparison.machine.items()]
    versions = list(comparison.versions.items())
    body.append(render_details("Machine", render_table(("machine", "value"), machine, (1,))))
    body.append(render_details("Versions", render_table(("server", "version"), versions, (1,))))
    return render_document(title, body)


def _race(comparison: Comparison, scenario: str, end: str, lines: Sequence[Line]) -> Iterator[str]:
    yield render_heading(f"{scenario}, {ENDS.get(end, end)}")
    yield from render_warnings(f"{line.server}: {problem}" for line in lines for problem in line.problems)
    keys = [(words, COLOUR[claim]) for claim, words in KEPT.items() if any(kept(line) == claim for line in lines)]
    yield render_keys(keys)
    figures = [_bars(figure, lines) for figure in FIGURES.values() if any(map(figure.of, lines))]
    figures.append(_latencies(lines))
    yield f'<div class="figures">{"".join(figures)}</div>'
    yield render_table(HEAD, map(_row, lines), (1,))
    rounds = [row for line in lines for row in _rounds(line)]
    yield render_details(f"Rounds of {scenario}, {end}", render_table(ROUNDS_HEAD, rounds))


def _bars(figure: Figure, lines: Sequence[Line]) -> str:
    rows = []
    for line in lines:
        spread = figure.of(line)
        rows.append(Row(line.server, COLOUR[kept(line)], [_mark("median", spread)] if spread else []))
    axis = _axis(figure.unit, rows)
    note = f"{figure.unit}, {figure.better} is better; median, and from the smallest to the largest round"
    return render_figure(figure.title, note, (), render_rows(figure.title, rows, axis))


def _latencies(lines: Sequence[Line]) -> str:
    rows = []
    for line in lines:
        found = line.end_of_data_ms
        marks = [_mark(shown, found[name]) for name, shown in PERCENTILES.items() if name in found]
        rows.append(Row(line.server, COLOUR[kept(line)], marks))
    note = f"ms, less is better; from the left {', '.join(PERCENTILES.values())}, medians of the rounds"
    return render_figure(LATENCY.title, note, (), render_rows(LATENCY.title, rows, _axis("ms", rows), bars=False))


def _axis(unit: str, rows: Sequence[Row]) -> Axis:
    kind = kind_for([mark.value for row in rows for mark in row.marks])
    return Axis(f"{unit}, logarithmic" if kind == "log" else unit, kind)


def _mark(name: str, spread: Spread) -> Mark:
    return Mark(name, spread.median, spread.low, spread.high)


def show_spread(spread: Spread | None) -> str:
    """The median, with the smallest and largest of several rounds: 42.0 (40.1–44.9)."""
    if spread is None:
        return NONE
    if len(spread.rounds) < 2:
        return number(spread.median)
    return f"{number(spread.median)} ({number(spread.low)}–{number(spread.high)})"


def _row(line: Line) -> tuple[str, ...]:
    syncs = f"{number(line.syncs.before_250)}, {number(line.syncs.in_all)}" if line.syncs else NONE
    ended = line.end_of_data_ms
    figures = [show_spread(figure.of(line)) for figure in FIGURES.values()]
    latencies = [show_spread(ended.get(name)) for name in ("p50", "p99")]
    return (f"{line.server} {line.version}", kept(line), syncs, *figures, *latencies)


def _rounds(line: Line) -> Iterator[tuple[str, ...]]:
    for one in line.rounds:
        yield (
            line.server,
            str(one.number),
            *(count(value) for value in (one.accepted, one.refused, one.unknown, one.errors)),
            NONE if one.delivered is None else count(one.delivered),
            number(one.accepted_rate),
            NONE if one.drained_rate is None else number(one.drained_rate),
            number(one.cpu_us),
            number(one.client_cpu_us),
        )
