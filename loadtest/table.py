"""What a run found, as tables for a terminal or a file.

In: a Result. Out: a rich renderable that fits in 80 columns; what is no terminal gets the same as plain text. Most
important first: what was accepted and how fast, what a reader has to be warned of, then latencies by phase, errors,
replies and misbehaviour; a table without rows is left out. Foreign text is made printable (show).
Not here: the JSON file (result), the report with plots (page), when a warning is due (caveats).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import IO

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from .caveats import caveats
from .result import ERRORS, PHASES, Latency, Result
from .show import NONE, clock, count, number, octets, plain

COLUMNS = 80  # of what is no terminal
LATENCY_HEAD = ("ms", "count", "p50", "p90", "p99", "p99.9", "max")


def print_result(result: Result, file: IO[str] | None = None) -> None:
    """To stdout, or to `file`."""
    console = Console(file=file)
    if not console.is_terminal:
        console = Console(file=file, width=COLUMNS, color_system=None)
    console.print(render_result(result))


def render_result(result: Result) -> RenderableType:
    ended = "interrupted after" if result.interrupted else "in"
    title = (
        f"{plain(result.scenario)} to {plain(result.target)}, {plain(result.started)} {ended} {clock(result.seconds)}"
    )
    parts: list[RenderableType] = [Text(title, "bold"), Text(), _headline(result)]
    parts += [Text(f"warning: {sentence}", "bold yellow") for sentence in caveats(result)]
    parts += [
        table
        for table in (
            _table("latency", LATENCY_HEAD, latency_rows(result)),
            _table("errors", ("kind", "count", "meaning"), error_rows(result), words=(0, 2)),
            _table("replies", ("code", "count", "share"), reply_rows(result)),
            _table("misbehaviour", *misbehaviour_rows(result)),
        )
        if table.row_count
    ]
    return Group(*parts)


def headline(result: Result) -> list[tuple[str, str]]:
    """What is asked first, in pairs of a word and its figure."""
    rows = [
        ("accepted", f"{count(result.messages_accepted)} of {count(result.messages_sent)} messages"),
        ("rate", f"{number(result.rate)} accepted/s over {number(result.seconds)} s"),
        ("octets", f"{octets(result.octets_sent)}, {octets(_per_second(result))}/s"),
        ("sessions", f"{count(result.sessions_peak)} at once, {count(result.sessions_opened)} opened"),
        ("refused", _refused(result)),
        ("unanswered", f"{count(result.messages_unknown)} messages"),
        ("errors", count(sum(result.errors.values()))),
        ("generator", f"{number(result.client_cpu_us_per_message)} µs of CPU a message, {_processes(result)}"),
    ]
    if result.lag_ms:
        rows.append(("", f"late by {number(result.lag_ms.p99)} ms at p99, {number(result.lag_ms.max)} ms at most"))
    return rows


def _per_second(result: Result) -> float:
    return result.octets_sent / result.seconds if result.seconds > 0 else 0.0


def _processes(result: Result) -> str:
    return "1 process" if result.processes == 1 else f"{count(result.processes)} processes"


def _refused(result: Result) -> str:
    of_recipients = f", {count(result.recipients_refused)} recipients" if result.recipients_refused else ""
    return f"{count(result.messages_refused)} messages{of_recipients}"


def latency_rows(result: Result) -> list[tuple[str, ...]]:
    """By phase, in the order of a session; phases that nobody knows come last."""
    known = [name for name in PHASES if name in result.latency_ms]
    rows = [
        latency_row(PHASES.get(name, plain(name)), result.latency_ms[name])
        for name in [*known, *sorted(result.latency_ms.keys() - PHASES.keys())]
    ]
    return rows + ([latency_row("generator late", result.lag_ms)] if result.lag_ms else [])


def latency_row(name: str, latency: Latency) -> tuple[str, ...]:
    values = (latency.p50, latency.p90, latency.p99, latency.p999, latency.max)
    return (name, count(latency.count), *(number(value) for value in values))


def error_rows(result: Result) -> list[tuple[str, ...]]:
    return [
        (plain(kind, 20), count(times), ERRORS.get(kind, ""))
        for kind, times in sorted(result.errors.items(), key=lambda item: -item[1])
        if times
    ]


def reply_rows(result: Result) -> list[tuple[str, ...]]:
    total = sum(result.replies.values())
    return [
        (plain(code, 20), count(times), f"{100 * times / total:.1f} %")
        for code, times in sorted(result.replies.items())
        if times
    ]


def misbehaviour_rows(result: Result) -> tuple[Sequence[str], list[tuple[str, ...]]]:
    """The head too: its columns are the outcomes that happened, `sessions` first."""
    outcomes = {outcome: None for kind in result.misbehaviour.values() for outcome in kind if outcome != "sessions"}
    head = ("kind", "sessions", *(plain(outcome, 20) for outcome in outcomes))
    rows = [
        (plain(name, 20), *(count(of.get(column, 0)) for column in ("sessions", *outcomes)))
        for name, of in result.misbehaviour.items()
    ]
    return head, rows


def _headline(result: Result) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column()
    for name, figure in headline(result):
        table.add_row(name, Text(figure))
    return table


def _table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]], words: tuple[int, ...] = (0,)) -> Table:
    """Columns of words stand left, those of figures right."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False, padding=0)
    for place, name in enumerate(head):
        right = place not in words
        table.add_column(Text(name), justify="right" if right else "left", no_wrap=place != len(head) - 1)
    for row in rows:
        table.add_row(*(Text(cell or NONE) for cell in row))
    return table
