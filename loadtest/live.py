"""What a run does at this moment, on stderr, while it runs.

In: a Snapshot each second. Out: on a terminal one panel of 80 columns that is drawn anew and is gone at the end, for
the table takes its place; elsewhere one plain line every five seconds. Drawn when a snapshot comes, and never more
than twice a second: no thread, no timer, less than 1 % of a core. Foreign text is made printable (show). Not here:
what the figures were in the end (table). When nobody reads stderr any more the run goes on without a word.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from .result import Snapshot
from .show import NONE, clock, count, counts, number, octets, plain

COLUMNS = 80
PLAIN_EVERY = 5.0  # seconds between two lines
REDRAW = 0.5  # seconds between two drawings at least
MINUTE = 60  # snapshots in the sparkline
BLOCKS = "▁▂▃▄▅▆▇█"


def sparkline(values: list[float]) -> str:
    """A block for each value, the largest the highest; the lowest block is next to nothing, not nothing."""
    most = max(values, default=0.0)
    if most <= 0:
        return BLOCKS[0] * len(values)
    return "".join(BLOCKS[min(len(BLOCKS) - 1, int(len(BLOCKS) * value / most))] for value in values)


def _latency(snapshot: Snapshot, phase: str) -> str:
    found = snapshot.latency_ms.get(phase)
    return f"p50 {number(found.p50)} p99 {number(found.p99)} max {number(found.max)} ms" if found else NONE


class Sums:
    """What all snapshots so far, or those of some seconds, amount to."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.accepted = self.refused = self.octets = 0
        self.lag_ms = 0.0
        self.errors: Counter[str] = Counter()
        self.replies: Counter[str] = Counter()

    def add(self, snapshot: Snapshot, seconds: float) -> None:
        self.seconds += seconds
        self.accepted += snapshot.accepted
        self.refused += snapshot.refused
        self.octets += snapshot.octets
        self.lag_ms = max(self.lag_ms, snapshot.lag_ms)
        self.errors.update(snapshot.errors)
        self.replies.update(snapshot.replies)

    @property
    def rate(self) -> float:
        return self.accepted / self.seconds if self.seconds > 0 else 0.0


class LiveView:
    """`title` says what is done to whom; `seconds` and `messages` are what ends the run, None where it does not."""

    def __init__(
        self,
        title: str,
        seconds: float | None = None,
        messages: int | None = None,
        console: Console | None = None,
    ) -> None:
        self._title = plain(title, COLUMNS - 30)
        self._of_seconds = seconds
        self._of_messages = messages
        self._console = console or Console(stderr=True)
        self._total = Sums()
        self._part = Sums()  # since the last line or drawing
        self._rates: deque[float] = deque(maxlen=MINUTE)
        self._before = 0.0  # where the last snapshot ended
        self._drawn = 0.0
        self._deaf = False
        screen = self._console.is_terminal and not self._console.is_dumb_terminal
        self._live = (
            Live(console=self._console, auto_refresh=False, transient=True, redirect_stdout=False) if screen else None
        )

    def __enter__(self) -> LiveView:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live:
            try:
                self._live.stop()
            except OSError:  # the terminal is gone
                self._deaf = True

    def update(self, snapshot: Snapshot) -> None:
        took = max(snapshot.seconds - self._before, 0.0)
        self._before = snapshot.seconds
        self._total.add(snapshot, took)
        self._part.add(snapshot, took)
        if took >= REDRAW:  # what comes in the last instant of a run says nothing about a rate
            self._rates.append(snapshot.accepted / took)
        if self._deaf:
            return
        try:
            self._show(snapshot)
        except OSError:  # a closed pipe is no reason to end a measurement
            self._deaf = True

    def _show(self, snapshot: Snapshot) -> None:
        if self._live:
            now = time.monotonic()
            if now - self._drawn < REDRAW:
                return
            self._drawn = now
            self._live.update(self.render_panel(snapshot), refresh=True)
        elif self._part.seconds >= PLAIN_EVERY - 0.5:
            # Not Console.print: on a closed pipe it would end the process, and send stdout to /dev/null.
            self._console.file.write(self.render_line(snapshot) + "\n")
            self._console.file.flush()
        else:
            return
        self._part = Sums()

    def render_panel(self, snapshot: Snapshot) -> Panel:
        """The whole view: what was counted so far, and how it is now."""
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="bold", no_wrap=True)
        grid.add_column(overflow="ellipsis", no_wrap=True)
        total, rates = self._total, list(self._rates) or [0.0]
        grid.add_row("rate", Text(f"{number(rates[-1])}/s now, {number(total.rate)}/s so far", "green"))
        grid.add_row("", Text(sparkline(rates), "cyan"))
        grid.add_row("accepted", f"{count(total.accepted)}{self._share()}, {octets(total.octets)} sent")
        grid.add_row("sessions", f"{count(snapshot.sessions)} open")
        grid.add_row("end of data", Text(_latency(snapshot, "end_of_data"), "yellow"))
        if "message" in snapshot.latency_ms:
            grid.add_row("message", Text(_latency(snapshot, "message"), "yellow"))
        grid.add_row(
            "errors", Text(self._grown(total.errors, self._part.errors), "red" if total.errors.total() else "")
        )
        refused = f"{count(total.refused)} messages" if total.refused else "none"
        grid.add_row("refused", Text(refused, "red" if total.refused else ""))
        grid.add_row("replies", Text(self._grown(total.replies, Counter()), overflow="fold", no_wrap=False))
        grid.add_row("generator", f"late by {number(self._part.lag_ms)} ms at most")
        end = f" of {clock(self._of_seconds)}" if self._of_seconds else ""
        return Panel(
            grid,
            title=Text(self._title, "bold"),
            subtitle=f"{clock(snapshot.seconds)}{end}, Ctrl-C ends it",
            width=min(COLUMNS, self._console.width),
        )

    def render_line(self, snapshot: Snapshot) -> str:
        """The seconds since the line before, for a log."""
        part = self._part
        said = [
            f"{clock(snapshot.seconds)}: {number(part.rate)}/s",
            f"{count(self._total.accepted)} accepted",
            f"{count(snapshot.sessions)} sessions",
            f"end of data {_latency(snapshot, 'end_of_data')}",
        ]
        said += [f"message {_latency(snapshot, 'message')}"] if "message" in snapshot.latency_ms else []
        said += [f"{count(part.refused)} refused"] if part.refused else []
        said += [f"errors: {counts(part.errors)}"] if part.errors.total() else []
        said.append(f"late by {number(part.lag_ms)} ms")
        return ", ".join(said)

    def _share(self) -> str:
        return f" of {count(self._of_messages)}" if self._of_messages else ""

    def _grown(self, total: Counter[str], now: Counter[str]) -> str:
        """Totals, with what came since the last drawing behind them: "reset ×13 (+3)"."""
        shown = [
            f"{plain(name, 20)} ×{count(times)}" + (f" (+{count(now[name])})" if now[name] else "")
            for name, times in total.most_common()
            if times
        ]
        return ", ".join(shown) or "none"
