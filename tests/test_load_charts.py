"""The charts of a race: bars as long as the figures, axes and colours as they must be, and files that can be read."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

from loadtest import LoadError
from loadtest.charts import COLOUR, DPI, WIDTH, draw_comparison, draw_race
from loadtest.comparison import Line
from loadtest.figures import BROKEN
from tests.load_results import HOSTILE, comparison, line

ROOT = Path(__file__).parents[1]


def panels(*lines: Line) -> dict[str, Axes]:
    """By title; those that are empty have none."""
    return {axes.get_title(loc="left"): axes for axes in draw_race("x", lines).axes if axes.axison}


def bars(axes: Axes) -> list[Rectangle]:
    return [patch for patch in axes.patches if isinstance(patch, Rectangle)]


def test_bars_are_the_medians_in_the_order_of_the_lines() -> None:
    lines = (
        line("kept", "fsync", 1000.0, cpu=300.0),
        line("liar", "fsync", 500.0, before=0.5),
        line("loose", "nothing", 2000.0),
    )
    found = panels(*lines)
    assert list(found) == [
        "Accepted, messages/s", "Server's CPU, µs/message", "Server's memory, MB", "End of data to its reply, ms",
    ]  # fmt: skip
    accepted = found["Accepted, messages/s"]
    assert [bar.get_width() for bar in bars(accepted)] == pytest.approx([1000, 500, 2000])
    assert [label.get_text() for label in accepted.get_yticklabels()] == ["kept", "liar", "loose"]
    assert accepted.yaxis_inverted(), "the first stands above"
    assert [to_hex(bar.get_facecolor()) for bar in bars(accepted)] == [
        COLOUR["fsync"], COLOUR[BROKEN], COLOUR["nothing"],
    ]  # fmt: skip
    assert [bar.get_width() for bar in bars(found["Server's CPU, µs/message"])] == pytest.approx([300, 200, 200])
    places = [bar.get_y() for bar in bars(accepted)]
    assert places[2] - places[1] > places[1] - places[0], "those that do not sync stand apart"


def test_an_axis_is_logarithmic_where_figures_are_far_apart() -> None:
    found = panels(line("a", "fsync", 50.0, cpu=100.0), line("b", "fsync", 5000.0, cpu=5000.0))
    assert found["Accepted, messages/s"].get_xscale() == "log"
    assert "logarithmic" in found["Accepted, messages/s"].get_xlabel()
    assert found["Server's CPU, µs/message"].get_xscale() == "linear"
    assert found["Accepted, messages/s"].get_xlim()[0] < 50 < 5000 < found["Accepted, messages/s"].get_xlim()[1]


def test_what_is_delivered_has_a_panel_where_it_is_counted() -> None:
    found = panels(line("a", "fsync", 1000.0, end="maildir"))
    assert [bar.get_width() for bar in bars(found["Delivered, messages/s"])] == pytest.approx([800])


def test_a_server_without_figures_stays_in_the_chart() -> None:
    broken = replace(line("broken", "fsync", 1.0), accepted=None, cpu_us=None, memory=None, latency_ms={})
    accepted = panels(line("a", "fsync", 1000.0), broken)["Accepted, messages/s"]
    assert [label.get_text() for label in accepted.get_yticklabels()] == ["a", "broken"]
    assert len(bars(accepted)) == 1
    assert any("no figure" in text.get_text() for text in accepted.texts)


def test_files_are_as_wide_as_a_readme_wants(tmp_path: Path) -> None:
    race = comparison(
        line("a", "fsync", 1000.0),
        line(HOSTILE, "nothing", 2000.0),
        line("$\\frac{$", "nothing", 2000.0),  # an error if it were read as a formula
        line("a", "fsync", 900.0, end="maildir"),
        replace(line("none", "fsync", 1.0, end="relay"), accepted=None),
    )
    written = draw_comparison(race, tmp_path)
    assert [path.name for path in written] == ["race-mx-small-discard.png", "race-mx-small-maildir.png"]
    for path in written:
        pixels = matplotlib.image.imread(path)
        assert pixels.shape[1] == int(WIDTH * DPI)
        assert pixels.shape[0] < pixels.shape[1]
        assert tuple(pixels[0, 0][:3]) == (1, 1, 1)


def test_a_folder_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"race-mx-small-discard\.png cannot be written: No such file"):
        draw_comparison(comparison(line("a", "fsync", 1000.0)), tmp_path / "missing")


def test_nothing_else_needs_matplotlib() -> None:
    code = "import sys, loadtest.page, loadtest.table, loadtest.live; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
