"""The live view of a load test: 80 columns on a terminal, lines in a file, and nothing raw of what a server said."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from rich.control import strip_control_codes

from loadtest import live
from loadtest.live import BLOCKS, LiveView, sparkline
from tests.load_results import HOSTILE, RAW, latency, snapshot

ROOT = Path(__file__).parents[1]
RUN = """
from loadtest.live import LiveView
from tests.load_results import snapshot
with LiveView("mx-small to 127.0.0.1:2525", seconds=60.0) as view:
    for second in range(1, 8):
        view.update(snapshot(second))
    print("meanwhile")
"""


def terminal(width: int = 80) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, record=True, legacy_windows=False)


def panel(view: LiveView, last: int, width: int = 80, **changes: object) -> str:
    """What stands there after so many seconds."""
    for second in range(1, last + 1):
        view.update(snapshot(second, **changes))
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(view.render_panel(snapshot(last, **changes)))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_everything_of_interest_stands_in_80_columns() -> None:
    view = LiveView("mx-small to 127.0.0.1:2525", seconds=3600.0, messages=1_000_000, console=terminal())
    shown = panel(view, 70, errors={"reset": 2, "timeout": 0}, refused=1, replies={"250": 40_000, "451": 1})
    assert max(map(len, shown.splitlines())) == 80
    for expected in (
        "mx-small to 127.0.0.1:2525",
        "1:10 of 1:00:00",
        "8,000/s now, 4,550/s so far",  # of second 70, and of all
        "318,500 of 1,000,000",
        "700 open",
        "p50 74.0 p99 296 max 1,184 ms",
        "reset ×140",
        "70 messages",
        "250 ×2,800,000, 451 ×70",
        "late by 0.25 ms",
    ):
        assert expected in shown
    assert "timeout" not in shown
    drawn = next(line for line in shown.splitlines() if BLOCKS[-1] in line)
    assert sum(drawn.count(block) for block in BLOCKS) == 60, "the last minute"


def test_an_open_loop_shows_how_long_messages_waited_too() -> None:
    waited = {"end_of_data": latency(1.0), "message": latency(250.0)}
    view = LiveView("x", console=Console(file=io.StringIO()))
    assert "p50 250 p99 1,000 max 4,000 ms" in panel(view, 2, latency_ms=waited)
    assert "message p50 250 p99 1,000" in view.render_line(snapshot(2, latency_ms=waited))


def test_a_narrow_terminal_is_not_overrun() -> None:
    shown = panel(LiveView("mx-small to a target with a long name", console=terminal(40)), 3, 40)
    assert max(map(len, shown.splitlines())) == 40


def test_a_sparkline_grows_with_its_values() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7, 8]) == BLOCKS + BLOCKS[-1]
    assert sparkline([0, 0]) == BLOCKS[0] * 2
    assert sparkline([]) == ""


def test_a_last_instant_is_no_rate() -> None:
    view = LiveView("x", console=terminal())
    panel(view, 3)
    view.update(snapshot(4, seconds=3.01, accepted=50))
    console = Console(file=io.StringIO(), width=80, color_system=None)
    console.print(view.render_panel(snapshot(4)))
    assert isinstance(console.file, io.StringIO)
    assert "1,300/s now" in console.file.getvalue()
    assert "3,650" in console.file.getvalue(), "its messages count"


def test_nothing_of_a_peer_is_raw() -> None:
    for console in (terminal(), Console(file=io.StringIO(), width=80)):
        assert isinstance(console.file, io.StringIO)
        with LiveView(HOSTILE, console=console) as view:
            for second in range(1, 12):
                view.update(snapshot(second, errors={HOSTILE: 1}, replies={HOSTILE: 1}))
        written = console.file.getvalue()
        assert "alert(1)" in written
        for raw in ("\x1b]", "\x1b[2J\x1b]", "\x07", "\u202e", "\x9b"):
            assert raw not in written
    assert not any(raw in written for raw in RAW), "no terminal, no control characters at all"


def test_it_is_drawn_no_more_than_twice_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(live.time, "monotonic", lambda: now)
    drawn: list[int] = []
    view = LiveView("x", console=terminal())
    render = view.render_panel
    monkeypatch.setattr(view, "render_panel", lambda given: [drawn.append(given.second), render(given)][1])
    with view:
        for second in range(1, 41):
            now += 0.1
            view.update(snapshot(second, seconds=second / 10))
    assert len(drawn) == 8


def test_the_cursor_comes_back_when_a_run_is_interrupted() -> None:
    console = terminal()

    def interrupted() -> None:
        with LiveView("x", console=console) as view:
            view.update(snapshot(1))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert isinstance(console.file, io.StringIO)
    written = console.file.getvalue()
    assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l")


def test_without_a_terminal_a_line_every_five_seconds() -> None:
    console = Console(file=io.StringIO(), width=80)
    assert isinstance(console.file, io.StringIO)
    with LiveView("x", seconds=60.0, console=console) as view:
        for second in range(1, 13):
            quiet = second in (1, 2, 3, 4, 5)
            view.update(snapshot(second, errors={} if quiet else {"reset": 1}, refused=0 if quiet else 2))
    first, second_line = console.file.getvalue().splitlines()
    assert first == (
        "0:05: 1,300/s, 6,500 accepted, 50 sessions, end of data p50 9.00 p99 36.0 max 144 ms, late by 0.25 ms"
    )
    assert second_line.startswith("0:10: 1,800/s, 15,500 accepted, 100 sessions")
    assert "10 refused, errors: reset ×5" in second_line


def test_a_run_goes_on_when_nobody_reads() -> None:
    class Closed(io.StringIO):
        writes = 0

        def write(self, _: str) -> int:
            self.writes += 1
            raise BrokenPipeError

    file = Closed()
    with LiveView("x", console=Console(file=file)) as view:
        for second in range(1, 31):
            view.update(snapshot(second))
    assert file.writes == 1


def test_a_real_terminal_gets_the_panel_and_stdout_is_left_alone() -> None:
    ours, theirs = pty.openpty()
    try:
        done = subprocess.run(
            [sys.executable, "-c", RUN],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=theirs,
            timeout=60,
            check=True,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "80", "NO_COLOR": "1"},
        )
        written = os.read(ours, 100_000).decode()
    finally:
        os.close(ours)
        os.close(theirs)
    assert done.stdout == b"meanwhile\n", "it is nobody else's"
    assert "mx-small to 127.0.0.1:2525" in written
    assert "1,100/s now" in strip_control_codes(written)
    assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l")


def test_a_pipe_gets_lines() -> None:
    done = subprocess.run([sys.executable, "-c", RUN], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "meanwhile\n"
    assert [line.partition(":")[2][:2] for line in done.stderr.splitlines()] == ["05"]
