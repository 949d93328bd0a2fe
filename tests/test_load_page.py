"""The reports: what was measured stands in their plots, nothing foreign is markup, and a browser needs no network."""

from __future__ import annotations

import json
import re
import subprocess
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import matplotlib.image
import pytest

from loadtest.page import distribution, render_comparison, render_page
from loadtest.result import Latency
from tests.load_results import HOSTILE, RAW, comparison, hostile_result, latency, line, result, snapshot
from tests.needs import needs

VOID = {"meta", "br", "img", "link", "input", "hr"}
ALLOWED = {
    "html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "dl", "div", "dt", "dd", "figure", "figcaption",
    "small", "span", "table", "thead", "tbody", "tr", "th", "td", "details", "summary",
    "svg", "text", "line", "path", "rect", "circle",
}  # fmt: skip


class Page(HTMLParser):
    """What a page holds; a tag that is not closed, or not allowed, fails."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: set[tuple[str, str]] = set()
        self.cells: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []
        assert set(self.tags) <= ALLOWED

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes |= {(tag, name) for name, _ in attrs}
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "dd", "p", "h2"):
            self.cells.append(data)


def plots(html: str) -> dict[str, ElementTree.Element]:
    found = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL)]
    return {svg.attrib["aria-label"]: svg for svg in found}


def lines(svg: ElementTree.Element) -> dict[str, list[tuple[float, float]]]:
    """By name, in the plot's coordinates."""
    return {
        element.attrib["data-name"]: [
            (float(x), float(y)) for x, y in (point.split() for point in element.attrib["d"][1:].split("L"))
        ]
        for element in svg.iter()
        if element.get("data-name")
    }


def rising(values: list[float]) -> bool:
    return all(one < other for one, other in pairwise(values))


def test_a_run_is_drawn_second_by_second() -> None:
    html = render_page([result()], "A run")
    Page(html)
    found = plots(html)
    assert list(found) == ["Throughput", "Sessions", "Latency, end of data to its reply", "Percentiles by phase"]
    for title, names in {
        "Throughput": ["accepted"],
        "Sessions": ["open sessions"],
        "Latency, end of data to its reply": ["p50", "p90", "p99", "max"],
    }.items():
        drawn = lines(found[title])
        assert list(drawn) == names
        for points in drawn.values():
            assert len(points) == 10
            assert rising([x for x, _ in points])
            assert rising([-y for _, y in points]), "the samples grow every second"
    # 1,100/s at first and 2,000/s at last: a straight line, and 2,000 at the axis' upper end.
    accepted = lines(found["Throughput"])["accepted"]
    steps = {round(one[1] - other[1], 0) for one, other in pairwise(accepted)}
    assert len(steps) == 1
    assert accepted[-1][1] == pytest.approx(10, abs=0.1)
    assert "time: 10 s\naccepted 2,000" in html


def test_percentiles_stand_over_one_less_the_share() -> None:
    drawn = lines(plots(render_page([result()], "x"))["Percentiles by phase"])
    assert list(drawn) == ["TCP connection", "end of data to its reply", "whole session"]
    ended = drawn["end of data to its reply"]
    assert rising([x for x, _ in ended])
    assert rising([-y for _, y in ended])
    # 90 %, 99 % and 99.9 % are equally far apart.
    assert ended[2][0] - ended[1][0] == pytest.approx(ended[3][0] - ended[2][0], abs=0.2)
    assert len(drawn["whole session"]) == 4, "400 of them have no p99.9"


@pytest.mark.parametrize(
    ("count", "expected"),
    [(1, [2]), (50, [2, 10, 50]), (100, [2, 10, 100]), (2000, [2, 10, 100, 1000, 2000])],
)
def test_a_percentile_needs_enough_samples(count: int, expected: list[float]) -> None:
    points = distribution(Latency(count, 1, 2, 3, 4, 5))
    assert [at for at, _ in points] == expected
    assert points[-1][1] == (5 if count in (50, 2000) else points[-1][1])


def test_errors_and_refusals_are_drawn_by_kind() -> None:
    timeline = [
        snapshot(n, errors={"reset": n, "tls": 0}, replies={"250": 9, "451": n, "552": 1}, refused=n)
        for n in range(1, 6)
    ]
    html = render_page([result(timeline=timeline, errors={"reset": 15})], "x")
    found = plots(html)
    assert list(lines(found["Errors by kind"])) == ["reset"]
    assert rising([-y for _, y in lines(found["Errors by kind"])["reset"]])
    assert list(lines(found["Refusing replies by code"])) == ["451", "552"]
    assert list(lines(found["Throughput"])) == ["accepted", "refused"]


def test_tables_and_warnings_are_those_of_the_terminal() -> None:
    page = Page(
        render_page(
            [
                result(
                    errors={"reset": 1234},
                    misbehaviour={"drip": {"sessions": 5, "closed": 4321}},
                    interrupted=True,
                    limits=["20,000 descriptors"],
                    lag_ms=latency(0.125),
                )
            ],
            "x",
        )
    )
    for expected in (
        "15,500 of 15,530 messages", "1,234", "4,321", "72.0", "75.0 %", "limit hit: 20,000 descriptors",
        "interrupted: the figures are those of the first 10.0 s", "generator late",
    ):  # fmt: skip
        assert expected in page.cells


def test_a_run_of_which_nothing_is_known_has_a_page() -> None:
    empty = result(timeline=[], latency_ms={}, replies={}, errors={}, seconds=0.0, machine={}, options={})
    html = render_page([empty], "nothing")
    Page(html)
    assert plots(html) == {}


def test_runs_at_several_rates_show_the_knee() -> None:
    runs = [
        result(
            options={"rate": rate},
            rate=min(rate, 2500.0),
            latency_ms={"message": latency(p50), "end_of_data": latency(1)},
        )
        for rate, p50 in ((3000.0, 300.0), (1000.0, 2.0), (2000.0, 4.0))
    ]
    html = render_page(runs, "x")
    Page(html)
    found = plots(html)
    knee = lines(found["Latency by offered rate"])
    assert list(knee) == ["p50", "p99", "p99.9"]
    assert rising([x for x, _ in knee["p99"]]), "in the order of the rates"
    first, second, third = (y for _, y in knee["p99"])
    assert second - third > 3 * (first - second) > 0
    taken = [y for _, y in lines(found["Accepted by offered rate"])["accepted"]]
    assert taken[0] - taken[1] > taken[1] - taken[2] > 0
    assert list(lines(found["End of data to its reply"])) == [
        "mx-small, 3,000/s offered", "mx-small, 1,000/s offered", "mx-small, 2,000/s offered",
    ]  # fmt: skip


def test_runs_of_one_name_are_told_apart() -> None:
    html = render_page([result(), replace(result(), target="mx.test:25")], "x")
    assert list(lines(plots(html)["End of data to its reply"])) == [
        "mx-small to 127.0.0.1:2525", "mx-small to mx.test:25",
    ]  # fmt: skip
    same = render_page([result(), result()], "x")
    assert len(lines(plots(same)["End of data to its reply"])) == 2
    assert "Latency by offered rate" not in plots(same)


def race() -> str:
    return render_comparison(
        comparison(
            line("kept", "fsync", 1000.0, cpu=200.0),
            line("liar", "fsync", 500.0, cpu=400.0, before=0.25),
            line("loose", "nothing", 2000.0, cpu=100.0, before=0.0),
            replace(
                line("broken", "nothing", 1.0), accepted=None, cpu_us=None, memory=None, latency_ms={}, problems=("no",)
            ),
            missing={"absent": "no package"},
        ),
        "A race",
    )


def test_an_open_loop_shows_the_latency_from_when_a_message_was_due() -> None:
    timeline = [
        snapshot(n, latency_ms={"message": latency(100.0 * n), "end_of_data": latency(1.0)}, lag_ms=n / 10)
        for n in range(1, 6)
    ]
    found = plots(render_page([result(timeline=timeline, lag_ms=latency(0.1))], "x"))
    waited = lines(found["Latency, from when it was due to its reply"])
    assert list(waited) == ["p50", "p90", "p99", "max"]
    assert rising([-y for _, y in waited["p99"]])
    assert rising([-y for _, y in lines(found["Lateness of the generator itself"])["late at most"]])


def test_a_race_is_drawn_by_server() -> None:
    html = race()
    page = Page(html)
    found = plots(html)
    assert list(found) == ["Accepted", "Server's CPU", "Server's memory", "End of data to its reply"]
    bars = [element for element in found["Accepted"].iter() if "bar" in element.get("class", "")]
    widths = [float(bar.attrib["width"]) for bar in bars]
    assert widths == pytest.approx([widths[2] / 2, widths[2] / 4, widths[2]], abs=0.2)
    assert len({bar.attrib["class"] for bar in bars}) == 3, "kept, lied about, not kept"
    assert "kept: median 1,000 (900–1,100)" in html
    assert html.count(">no figure<") == 4
    dots = [float(dot.attrib["cx"]) for dot in found["End of data to its reply"].iter() if "cx" in dot.attrib][:4]
    assert rising(dots)
    for expected in ("broken: no", "absent took no part: no package", "1.00, 2.00", "syncs less than it claims"):
        assert expected in page.cells


def test_a_hundredfold_is_drawn_on_a_logarithmic_axis() -> None:
    html = render_comparison(comparison(line("a", "fsync", 100.0), line("b", "nothing", 10_000.0)), "x")
    assert "messages/s, logarithmic" in html
    assert "µs/message, logarithmic" not in html


@pytest.mark.parametrize("title", ["x", HOSTILE])
def test_nothing_foreign_becomes_markup(title: str) -> None:
    hostile = replace(line(HOSTILE, "fsync", 10.0), version=HOSTILE, scenario=HOSTILE, end=HOSTILE, problems=(HOSTILE,))
    race = comparison(
        hostile, command=HOSTILE, machine={HOSTILE: HOSTILE}, versions={HOSTILE: HOSTILE}, accounting=HOSTILE,
        missing={HOSTILE: HOSTILE}, started=HOSTILE,
    )  # fmt: skip
    for html in (render_page([hostile_result(), hostile_result()], title), render_comparison(race, title)):
        page = Page(html)
        assert ("meta", "content") in page.attributes
        assert not {name for _, name in page.attributes if name in ("src", "href", "style") or name.startswith("on")}
        assert any("<script>alert(1)</script>" in cell for cell in page.cells), "it can be read"
        assert not any(raw in html for raw in RAW)


class Visit:
    """What a browser did with a file. No name is resolved and nothing listens where it may connect to."""

    def __init__(self, folder: Path, html: str, *options: str) -> None:
        needs("chromium")
        folder.mkdir()
        file, log = folder / "page.html", folder / "net.json"
        file.write_text(html, encoding="utf-8")
        command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"]
        command += ["--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND", f"--log-net-log={log}"]
        command += [f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr", "--v=0", *options]
        done = subprocess.run([*command, file.as_uri()], capture_output=True, text=True, timeout=120, check=True)
        self.dom = done.stdout
        self.console = [text for text in done.stderr.splitlines() if ":CONSOLE" in text]
        logged = json.loads(log.read_text())
        start = logged["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
        started = [event["params"] for event in logged["events"] if event["type"] == start and "url" in event["params"]]
        # What the browser asks for by itself (updates, the time) has no page as its origin.
        self.requests = [params["url"] for params in started if params["initiator"] != "not an origin"]


def test_a_browser_draws_a_report_and_asks_for_nothing(tmp_path: Path) -> None:
    visit = Visit(tmp_path / "visit", render_page([hostile_result(), result()], HOSTILE), "--dump-dom")
    assert visit.requests == []
    assert visit.console == []
    assert "<script" not in visit.dom
    paths = re.findall(r'<path [^>]*d="([^"]*)"', visit.dom)
    assert len(paths) > 8
    assert all(re.fullmatch(r"[MLHv\d. ]+", d) for d in paths)


def test_a_page_that_asks_is_noticed_and_our_policy_stops_it(tmp_path: Path) -> None:
    asks = '<img src="http://127.0.0.1:9/x.png"><script>console.error("ran")</script>'
    visit = Visit(tmp_path / "asks", f"<!DOCTYPE html><body>{asks}</body>", "--dump-dom")
    assert visit.requests == ["http://127.0.0.1:9/x.png"]
    assert any('"ran"' in text for text in visit.console)
    unescaped = render_page([result()], "x").replace("<h1>x</h1>", f"<h1>x</h1>{asks}")
    stopped = Visit(tmp_path / "stopped", unescaped, "--dump-dom")
    assert stopped.requests == []
    assert not any('"ran"' in text for text in stopped.console)


@pytest.mark.parametrize(
    ("options", "back", "line_colour"),
    [((), (0xFF, 0xFF, 0xFF), (0x0B, 0x62, 0xA8)), (("--force-dark-mode",), (0x14, 0x17, 0x1B), (0x5C, 0xB3, 0xFF))],
    ids=["light", "dark"],
)
def test_it_is_seen_in_light_and_in_dark(
    tmp_path: Path, options: tuple[str, ...], back: tuple[int, ...], line_colour: tuple[int, ...]
) -> None:
    shot = tmp_path / "shot.png"
    html = render_comparison(comparison(line("a", "fsync", 100.0), line("b", "fsync", 200.0)), "x")
    Visit(tmp_path / "visit", html, f"--screenshot={shot}", "--window-size=1300,900", *options)
    pixels = (matplotlib.image.imread(shot)[:, :, :3] * 255).round().astype(int).reshape(-1, 3)
    assert tuple(pixels[0]) == back
    assert sum((pixels == line_colour).all(axis=1)) > 1000, "its bars"
