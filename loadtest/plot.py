"""Plots as SVG for a page: lines over a common x, and rows of bars or dots with their spread.

In: series or rows of numbers, and what the axes mean. Out: one <svg> element as text that needs no script, no file:
colours are classes c0 ... c9 of the page that it stands in (document), and what a mark means is its <title>, which a
browser shows under the pointer. Always: every coordinate is finite; a number that is none, or not above zero on a
logarithmic axis, is left out and makes a gap in its line; text is escaped and printable.
Not here: which figures are drawn (page), PNG (charts).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

from .show import clock, number, plain, tick

WIDTH, HEIGHT = 640.0, 240.0
LEFT, RIGHT, TOP, BOTTOM = 56.0, 24.0, 10.0, 36.0  # of the drawing's inside
NAMES = 130.0  # where rows begin, behind their names
ROW = 22.0
COLOURS = 10
TIME_STEPS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 43200, 86400)
FAR_APART = 100.0  # largest by smallest: from here on a linear axis would hide the small ones


@dataclass(frozen=True)
class Axis:
    """`kind` is a key of TICKS; `step` is the smallest distance of ticks, 1 for what is counted."""

    label: str
    kind: str = "linear"
    show: Callable[[float], str] = number  # a value
    mark: Callable[[float], str] = tick  # a tick
    step: float = 0.0
    ticks: tuple[float, ...] = ()  # instead of those that would be chosen


@dataclass(frozen=True)
class Series:
    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 0


@dataclass(frozen=True)
class Mark:
    """A value, and the smallest and largest round behind it."""

    name: str
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Row:
    name: str
    colour: int
    marks: Sequence[Mark]


def linear_step(span: float, axis: Axis) -> float:
    """1, 2 or 5 times a power of ten, so that there are about five."""
    rough = max(span / 5, axis.step, 1e-6)
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)


def linear_ticks(low: float, high: float, axis: Axis) -> list[float]:
    step = linear_step(high - low, axis)
    return [index * step for index in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float, axis: Axis) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1,) if len(powers) > 4 else (1, 2, 5)
    ticks = [factor * 10.0**power for power in powers for factor in factors]
    return [tick for tick in ticks if low * 0.999 <= tick <= high * 1.001]


def time_ticks(low: float, high: float, axis: Axis) -> list[float]:
    step = next((step for step in TIME_STEPS if (high - low) / step <= 8), TIME_STEPS[-1])
    return [float(second) for second in range(math.ceil(low / step) * step, math.floor(high) + 1, step)]


TICKS = {"linear": linear_ticks, "log": log_ticks, "time": time_ticks}


class Scale:
    """Where the values of an axis stand between two places of the drawing."""

    def __init__(self, axis: Axis, values: Sequence[float], start: float, end: float) -> None:
        self.axis = axis
        self._log = axis.kind == "log"
        usable = [value for value in values if self.shows(value)]
        self.low, self.high = _log_ends(usable) if self._log else (min([0.0, *usable]), max([0.0, *usable]))
        if self.high <= self.low:
            self.high = self.low * 10 if self._log else self.low + 1
        if axis.kind == "linear":
            step = linear_step(self.high - self.low, axis)
            self.high = math.ceil(self.high / step - 1e-9) * step
        self._start, self._end = start, end

    def shows(self, value: float) -> bool:
        return math.isfinite(value) and (value > 0 or not self._log)

    def __call__(self, value: float) -> float:
        if self._log:
            share = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self._start + share * (self._end - self._start)

    def ticks(self) -> list[float]:
        if self.axis.ticks:
            return [tick for tick in self.axis.ticks if self.low <= tick <= self.high]
        return TICKS[self.axis.kind](self.low, self.high, self.axis)


def _log_ends(values: Sequence[float]) -> tuple[float, float]:
    """From a 1, 2 or 5 below the smallest to one above the largest."""
    if not values:
        return 1.0, 10.0
    steps = [factor * 10.0**power for power in range(-9, 16) for factor in (1, 2, 5)]
    low = max((step for step in steps if step <= min(values) * 1.001), default=steps[0])
    return low, min((step for step in steps if step >= max(values) * 0.999), default=steps[-1])


def kind_for(values: Sequence[float]) -> str:
    """Of an axis that shows these."""
    usable = [value for value in values if math.isfinite(value) and value > 0]
    return "log" if usable and max(usable) >= FAR_APART * min(usable) else "linear"


def render_lines(title: str, series: Sequence[Series], x: Axis, y: Axis, dots: bool = False) -> str:
    """Lines over one x. `dots` marks each point, for those that are few."""
    xs = sorted({point[0] for one in series for point in one.points})
    across = Scale(x, xs, LEFT, WIDTH - RIGHT)
    up = Scale(y, [point[1] for one in series for point in one.points], HEIGHT - BOTTOM, TOP)
    parts = [*_grid(across, up), *_labels(x, y)]
    for one in series:
        parts += _line(one, across, up, dots)
    parts += _strips(series, xs, across, up)
    return _svg(title, HEIGHT, parts)


def render_rows(title: str, rows: Sequence[Row], axis: Axis, bars: bool = True) -> str:
    """A row for each name: a bar with its spread, or dots on a line. A row without marks says that it has none."""
    bottom = TOP + ROW * max(1, len(rows))
    values = [value for row in rows for mark in row.marks for value in (mark.value, mark.low, mark.high)]
    if bars and axis.kind == "log":
        values.append(min((value for value in values if value > 0), default=1) / 3)  # the smallest is a bar too
    across = Scale(axis, values, NAMES, WIDTH - 70)
    parts = []
    for at in across.ticks():
        parts.append(_rule(across(at), TOP, across(at), bottom))
        parts.append(_text(across(at), bottom + 14, axis.mark(at), "middle"))
    parts.append(_text((NAMES + WIDTH) / 2, bottom + 30, axis.label, "middle"))
    for index, row in enumerate(rows):
        middle = TOP + ROW * (index + 0.5)
        parts.append(_text(NAMES - 8, middle + 4, plain(row.name, 22), "end"))
        usable = [mark for mark in row.marks if across.shows(mark.value)]
        if usable:
            parts += _mark_row(row, usable, across, middle, bars)
        else:
            parts.append(_text(NAMES + 6, middle + 4, "no figure", "start"))
    return _svg(title, bottom + BOTTOM, parts)


def _mark_row(row: Row, marks: Sequence[Mark], across: Scale, middle: float, bars: bool) -> Iterator[str]:
    show = across.axis.show
    if not bars:
        ends = sorted(across(mark.value) for mark in marks)
        yield f'<path class="line c{row.colour}" d="M{ends[0]:.1f} {middle:.1f}H{ends[-1]:.1f}"/>'
    for mark in marks:
        text = f"{row.name}: {mark.name} {show(mark.value)} ({show(mark.low)}–{show(mark.high)})"
        about = f"<title>{_escaped(text)}</title>"
        at, low, high = (
            across(value if across.shows(value) else mark.value) for value in (mark.value, mark.low, mark.high)
        )
        if not bars:
            yield f'<circle class="dot c{row.colour}" cx="{at:.1f}" cy="{middle:.1f}" r="4">{about}</circle>'
            continue
        size = f'y="{middle - 7:.1f}" width="{max(at - NAMES, 1):.1f}" height="14"'
        yield f'<rect class="bar c{row.colour}" x="{NAMES:.1f}" {size}>{about}</rect>'
        if high > low:
            ends_at = "".join(f"M{end:.1f} {middle - 3:.1f}v6" for end in (low, high))
            yield f'<path class="spread" d="M{low:.1f} {middle:.1f}H{high:.1f}{ends_at}"/>'
        yield _text(max(at, high) + 6, middle + 4, show(mark.value), "start")


def _line(one: Series, across: Scale, up: Scale, dots: bool) -> Iterator[str]:
    piece: list[str] = []
    pieces = [piece]
    for x, y in one.points:
        if across.shows(x) and up.shows(y):
            piece.append(f"{across(x):.1f} {up(y):.1f}")
        elif piece:
            piece = []
            pieces.append(piece)
    drawn = "".join(f"M{'L'.join(piece)}" for piece in pieces if len(piece) > 1)
    if drawn:
        yield f'<path class="line c{one.colour}" data-name="{_escaped(one.name)}" d="{drawn}"/>'
    for piece in pieces:
        for point in piece if dots or len(piece) == 1 else []:
            x_text, _, y_text = point.partition(" ")
            yield f'<circle class="dot c{one.colour}" cx="{x_text}" cy="{y_text}" r="3"/>'


def _strips(series: Sequence[Series], xs: Sequence[float], across: Scale, up: Scale) -> Iterator[str]:
    """An invisible strip for each x, whose <title> says all values there."""
    values = [dict(one.points) for one in series]
    for index, x in enumerate(xs):
        left = (across(xs[index - 1]) + across(x)) / 2 if index else LEFT
        right = (across(x) + across(xs[index + 1])) / 2 if index + 1 < len(xs) else WIDTH - RIGHT
        said = [
            f"{one.name} {up.axis.show(points[x])}"
            for one, points in zip(series, values, strict=True)
            if up.shows(points.get(x, math.nan))
        ]
        text = "\n".join(plain(line) for line in (f"{across.axis.label}: {across.axis.show(x)}", *said))
        yield f'<rect class="strip" x="{left:.1f}" y="{TOP}" width="{max(right - left, 0):.1f}" '
        yield f'height="{HEIGHT - BOTTOM - TOP}"><title>{escape(text)}</title></rect>'


def _grid(across: Scale, up: Scale) -> Iterator[str]:
    for at in up.ticks():
        yield _rule(LEFT, up(at), WIDTH - RIGHT, up(at))
        yield _text(LEFT - 6, up(at) + 4, up.axis.mark(at), "end")
    for at in across.ticks():
        yield _rule(across(at), TOP, across(at), HEIGHT - BOTTOM)
        yield _text(across(at), HEIGHT - BOTTOM + 14, across.axis.mark(at), "middle")


def _labels(x: Axis, y: Axis) -> Iterator[str]:
    yield _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, x.label, "middle")
    middle = (TOP + HEIGHT - BOTTOM) / 2
    turned = f'transform="rotate(-90 12 {middle})"'
    yield f'<text x="12" y="{middle}" text-anchor="middle" {turned}>{_escaped(y.label)}</text>'


def _rule(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="rule" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{_escaped(text)}</text>'


def _escaped(text: str) -> str:
    return escape(plain(text))


def _svg(title: str, height: float, parts: Sequence[str]) -> str:
    label = _escaped(title)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH:.0f} {height:.0f}" role="img"'
    return f'{head} aria-label="{label}">{"".join(parts)}</svg>'


def seconds(value: float) -> str:
    """For a time axis."""
    return clock(value) if value >= 60 else f"{value:.0f} s"
