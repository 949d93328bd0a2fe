"""Plots and the seconds behind them: coordinates are finite and in order, gaps stay gaps, thinning loses nothing."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from xml.etree import ElementTree

import pytest

from loadtest.plot import Axis, Mark, Row, Scale, Series, kind_for, render_lines, render_rows, seconds
from loadtest.result import Latency
from loadtest.timeline import make_steps
from tests.load_results import HOSTILE, latency, snapshot

SVG = "{http://www.w3.org/2000/svg}"
X, Y = Axis("x"), Axis("y")


def drawn(svg: str, kind: str) -> list[ElementTree.Element]:
    return [element for element in ElementTree.fromstring(svg).iter() if kind in element.get("class", "").split()]


def path(svg: str, index: int = 0) -> list[list[tuple[float, float]]]:
    """The pieces of a line."""
    pieces = drawn(svg, "line")[index].attrib["d"].split("M")[1:]
    return [[(float(x), float(y)) for x, y in (point.split() for point in piece.split("L"))] for piece in pieces]


def test_a_line_stands_where_its_values_are() -> None:
    (points,) = path(render_lines("t", [Series("a", [(0, 0), (5, 50), (10, 100)])], X, Y))
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x0 < x1 < x2
    assert y0 > y1 > y2, "SVG counts from above"
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2)


def test_on_a_logarithmic_axis_equal_factors_are_equal_ways() -> None:
    svg = render_lines("t", [Series("a", [(1, 0.1), (10, 10), (100, 1000)])], Axis("x", "log"), Axis("y", "log"))
    (points,) = path(svg)
    assert points[1][0] - points[0][0] == pytest.approx(points[2][0] - points[1][0], abs=0.2)
    assert points[0][1] - points[1][1] == pytest.approx(points[1][1] - points[2][1], abs=0.2)


@pytest.mark.parametrize(
    "values",
    [
        [math.nan, math.inf, -math.inf],
        [0.0, 0.0],
        [5.0],
        [],
        [1e-12, 1e15],
        [-5.0, 5.0],
        [1e300, 1.0],
        [math.nan, 3.0, math.inf, 4.0],
    ],
)
@pytest.mark.parametrize("kind", ["linear", "log"])
def test_every_coordinate_is_finite(values: Sequence[float], kind: str) -> None:
    points = list(enumerate(values))
    rows = [Row("r", 0, [Mark("m", value, math.nan, math.inf) for value in values])]
    for svg in (
        render_lines("t", [Series("a", [(float(x), y) for x, y in points])], X, Axis("y", kind), dots=True),
        render_rows("t", rows, Axis("x", kind)),
        render_rows("t", rows, Axis("x", kind), bars=False),
    ):
        for element in ElementTree.fromstring(svg).iter():
            for name, value in element.attrib.items():
                if name in ("d", "x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "width", "height"):
                    assert not re.search("nan|inf", value), (name, value)


def test_a_value_that_is_none_makes_a_gap() -> None:
    svg = render_lines("t", [Series("a", [(0, 1), (1, 2), (2, math.nan), (3, 4), (4, 5)])], X, Y)
    assert [len(piece) for piece in path(svg)] == [2, 2]
    zero = render_lines("t", [Series("a", [(0, 1), (1, 2), (2, 0), (3, 4), (4, 5)])], X, Axis("y", "log"))
    assert [len(piece) for piece in path(zero)] == [2, 2]


def test_a_point_between_gaps_is_seen() -> None:
    svg = render_lines("t", [Series("a", [(0, math.nan), (1, 2), (2, math.nan)])], X, Y)
    assert len(drawn(svg, "dot")) == 1


def test_what_stands_under_the_pointer() -> None:
    svg = render_lines("t", [Series("a", [(1, 10), (2, 20)]), Series("b", [(2, 5)])], Axis("time", "time", seconds), Y)
    titles = [strip.findtext(f"{SVG}title") for strip in drawn(svg, "strip")]
    assert titles == ["time: 1 s\na 10.0", "time: 2 s\na 20.0\nb 5.00"]
    strips = [(float(strip.attrib["x"]), float(strip.attrib["width"])) for strip in drawn(svg, "strip")]
    assert strips[0][0] + strips[0][1] == pytest.approx(strips[1][0], abs=0.2), "no place between them"


@pytest.mark.parametrize(
    ("axis", "high", "expected"),
    [
        (X, 100.0, [0, 20, 40, 60, 80, 100]),
        (X, 0.7, [0, 0.2, 0.4, 0.6, 0.8]),
        (Axis("n", step=1), 2.0, [0, 1, 2]),
        (Axis("t", "time"), 300.0, [0, 60, 120, 180, 240, 300]),
        (Axis("t", "time"), 7200.0, [0, 900, 1800, 2700, 3600, 4500, 5400, 6300, 7200]),
    ],
)
def test_ticks_are_round(axis: Axis, high: float, expected: list[float]) -> None:
    assert Scale(axis, [high], 0, 100).ticks() == pytest.approx(expected)


def test_logarithmic_ticks() -> None:
    assert Scale(Axis("x", "log"), [3.0, 40.0], 0, 100).ticks() == pytest.approx([2, 5, 10, 20, 50])
    assert Scale(Axis("x", "log"), [0.5, 40_000.0], 0, 100).ticks() == pytest.approx([1, 10, 100, 1000, 10_000])


def test_far_apart_is_logarithmic() -> None:
    assert kind_for([1, 99]) == "linear"
    assert kind_for([0, math.nan, 1, 100]) == "log"
    assert kind_for([]) == "linear"


def test_bars_are_as_long_as_their_values_and_show_their_spread() -> None:
    rows = [
        Row("one", 0, [Mark("median", 50, 40, 60)]),
        Row("two", 1, [Mark("median", 100, 100, 100)]),
        Row("x", 2, []),
    ]
    svg = render_rows("t", rows, Axis("messages/s"))
    one, two = drawn(svg, "bar")
    assert float(two.attrib["width"]) == pytest.approx(2 * float(one.attrib["width"]), abs=0.2)
    (spread,) = drawn(svg, "spread")
    low, high = (float(value) for value in re.findall(r"M([\d.]+) [\d.]+v6", spread.attrib["d"]))
    middle = float(one.attrib["x"]) + float(one.attrib["width"])
    assert middle - low == pytest.approx(high - middle, abs=0.2)
    assert one.findtext(f"{SVG}title") == "one: median 50.0 (40.0–60.0)"
    assert "no figure" in svg


def test_the_smallest_bar_of_a_logarithmic_axis_is_seen() -> None:
    rows = [Row(str(value), 0, [Mark("median", value, value, value)]) for value in (10.0, 10_000.0)]
    small, large = drawn(render_rows("t", rows, Axis("x", "log")), "bar")
    assert 20 < float(small.attrib["width"]) < float(large.attrib["width"])


def test_names_are_escaped() -> None:
    for svg in (
        render_lines(HOSTILE, [Series(HOSTILE, [(1, 1), (2, 2)])], Axis(HOSTILE), Axis(HOSTILE)),
        render_rows(HOSTILE, [Row(HOSTILE, 0, [Mark(HOSTILE, 1, 1, 1)])], Axis(HOSTILE)),
    ):
        names = {element.tag.removeprefix(SVG) for element in ElementTree.fromstring(svg).iter()}
        assert names <= {"svg", "text", "line", "path", "rect", "title", "circle"}
        assert "\x1b" not in svg


def test_a_long_run_becomes_few_steps_and_nothing_is_lost() -> None:
    timeline = [
        snapshot(second, accepted=second, errors={"reset": 1}, replies={"451": 2}, latency_ms={"mail": latency(second)})
        for second in range(1, 1001)
    ]
    steps = make_steps(timeline, 300)
    assert len(steps) == 250
    assert sum(step.accepted for step in steps) == sum(range(1, 1001))
    assert sum(step.errors["reset"] for step in steps) == 1000
    assert sum(step.replies["451"] for step in steps) == 2000
    assert [step.end for step in steps[:2]] == [4.0, 8.0]
    assert steps[0].per_second(steps[0].accepted) == 2.5
    assert steps[0].latency_ms["mail"] == Latency(400_000, 4.0, 8.0, 16.0, 32.0, 64.0), "the worst second"
    assert steps[0].sessions == 40, "at its end"


def test_a_last_instant_joins_the_second_before() -> None:
    steps = make_steps([snapshot(1, accepted=100), snapshot(2, accepted=100), snapshot(3, seconds=2.01, accepted=50)])
    assert [round(step.per_second(step.accepted)) for step in steps] == [100, 149]


def test_no_time_no_steps() -> None:
    assert make_steps([]) == []
    assert make_steps([snapshot(0, seconds=0.0)]) == []
    assert len(make_steps([snapshot(1, seconds=0.01)])) == 1
