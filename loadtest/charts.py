"""The charts of a race as PNG files, for the README and the documentation.

In: a Comparison and a folder. Out: a file for each scenario and end, 1,440 pixels wide: horizontal bars by server with
the spread of their rounds, and latency percentiles as dots. What a server does before its 250 is its colour; those that
sync stand together above those that do not. An axis is logarithmic where values lie a hundredfold apart, and says so.
matplotlib is imported here and nowhere else, without a screen. On failure: LoadError when a file cannot be written.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Drawing
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, NullFormatter

from . import LoadError
from .comparison import ENDS, Comparison, Line, Spread
from .figures import FIGURES, KEPT, LATENCY, PERCENTILES, Figure, by_race, kept
from .plot import kind_for
from .show import number, plain, tick

COLOUR = dict(zip(KEPT, ("#0b62a8", "#d97706", "#b91c1c"), strict=True))
WIDTH, ROW, DPI = 9.0, 0.3, 160  # inches, inches, pixels an inch
PANELS = 4
FAINT = "#59636e"


def draw_comparison(comparison: Comparison, folder: Path) -> list[Path]:
    """Writes race-SCENARIO-END.png for each race that has a figure; returns their paths. Raises LoadError."""
    written = []
    for (scenario, end), lines in by_race(comparison).items():
        if not any(line.accepted for line in lines):
            continue
        path = folder / f"race-{scenario}-{end}.png"
        drawing = draw_race(f"{scenario}: {ENDS.get(end, end)}", lines)
        try:
            drawing.savefig(path, dpi=DPI)
        except OSError as error:
            raise LoadError(f"{path} cannot be written: {error.strerror}") from None
        written.append(path)
    return written


def draw_race(title: str, lines: Sequence[Line]) -> Drawing:
    """Four panels: what there is of FIGURES, and the latencies."""
    figures = [figure for figure in FIGURES.values() if any(map(figure.of, lines))][: PANELS - 1]
    places = _places(lines)
    drawing = Drawing(figsize=(WIDTH, 2 * (ROW * (max(places) + 1) + 0.75) + 0.9), layout="constrained")
    FigureCanvasAgg(drawing)
    panels = drawing.subplots(2, 2).flat
    for figure, axes in zip(figures, panels, strict=False):
        _draw_bars(axes, figure, lines, places)
    _draw_latencies(next(panels), lines, places)
    for axes in panels:
        axes.set_axis_off()
    drawing.suptitle(plain(title), parse_math=False, fontsize=12, fontweight="bold")
    patches = [
        Patch(color=COLOUR[claim], label=words)
        for claim, words in KEPT.items()
        if any(kept(line) == claim for line in lines)
    ]
    drawing.legend(handles=patches, loc="outside lower center", ncols=1, fontsize=9, frameon=False)
    return drawing


def _places(lines: Sequence[Line]) -> list[float]:
    """Where each line stands, from above; half a row lies between those that sync and those that do not."""
    places: list[float] = []
    for index, line in enumerate(lines):
        gap = 0.5 if index and (lines[index - 1].claim != line.claim) else 0.0
        places.append(places[-1] + 1 + gap if places else 0.0)
    return places


def _draw_bars(axes: Axes, figure: Figure, lines: Sequence[Line], places: Sequence[float]) -> None:
    spreads = [figure.of(line) for line in lines]
    values = [spread.median for spread in spreads if spread]
    log = kind_for(values) == "log"
    _frame(axes, f"{figure.title}, {figure.unit}", f"{figure.better} is better", lines, places, log)
    if log:
        axes.set_xlim(min(value for value in values if value > 0) / 3, max(values) * 4)
    else:
        axes.set_xlim(0, max(max(spread.high for spread in spreads if spread) * 1.22, 1e-9))
    for line, spread, place in zip(lines, spreads, places, strict=True):
        if spread is None:
            axes.annotate(" no figure", (0, place), xycoords=("axes fraction", "data"), va="center", color=FAINT)
            continue
        axes.barh(place, spread.median, height=0.66, color=COLOUR[kept(line)], xerr=_arms(spread), capsize=2)
        axes.annotate(
            number(spread.median), (spread.high, place), (4, 0), textcoords="offset points", va="center", fontsize=9
        )


def _draw_latencies(axes: Axes, lines: Sequence[Line], places: Sequence[float]) -> None:
    found = [line.end_of_data_ms[name].median for line in lines for name in PERCENTILES if name in line.end_of_data_ms]
    _frame(
        axes,
        f"{LATENCY.title}, ms",
        f"{' – '.join(PERCENTILES.values())}, less is better",
        lines,
        places,
        kind_for(found) == "log",
    )
    for line, place in zip(lines, places, strict=True):
        values = [line.end_of_data_ms[name].median for name in PERCENTILES if name in line.end_of_data_ms]
        if not values:
            axes.annotate(" no figure", (0, place), xycoords=("axes fraction", "data"), va="center", color=FAINT)
            continue
        colour = COLOUR[kept(line)]
        axes.plot([min(values), max(values)], [place, place], color=colour, linewidth=1.2)
        for value, marker in zip(values, "|sDo", strict=False):
            axes.plot([value], [place], marker, color=colour, markersize=6 if marker != "|" else 11)


def _arms(spread: Spread) -> list[list[float]]:
    return [[max(spread.median - spread.low, 0.0)], [max(spread.high - spread.median, 0.0)]]


def _frame(axes: Axes, title: str, note: str, lines: Sequence[Line], places: Sequence[float], log: bool) -> None:
    axes.set_title(title, loc="left", fontsize=10, parse_math=False)
    axes.set_xlabel(f"{note}; logarithmic" if log else note, fontsize=8, color=FAINT, parse_math=False)
    if log:
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
    axes.set_yticks(places, [plain(line.server, 22) for line in lines], fontsize=10, parse_math=False)
    axes.set_ylim(max(places) + 0.6, -0.6)
    axes.tick_params(axis="x", labelsize=8, labelcolor=FAINT)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#dfe3e8", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
