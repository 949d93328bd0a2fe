"""The tables of a race as Markdown, for a terminal, a file and the documentation.

In: a Comparison. Out: text: what was raced where and how, then for each scenario and end a table, those that sync above
those that do not, and below it whatever went wrong. Cells are padded, so that it reads as well unrendered.
Always: what stands between the two markers of a document is replaced, and nothing else. Not here: pages, charts, JSON.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from . import LoadError
from .comparison import ENDS, Comparison, Line, Spread
from .figures import BROKEN, FIGURES, by_race, kept
from .show import NONE, count, number, plain

BEGIN = "<!-- made by python -m loadtest compare --docs: begin -->"
END = "<!-- made by python -m loadtest compare --docs: end -->"
DRAINED = {"maildir": "in the mailbox/s", "relay": "at the sink/s", "discard": "drained/s"}
LATENCIES = ("p50", "p99")


def render_markdown(comparison: Comparison) -> str:
    """The whole race."""
    parts = [_facts(comparison)]
    for (scenario, end), lines in by_race(comparison).items():
        parts.append(f"### {plain(scenario)}, {end}")
        parts.append(f"{comparison.scenarios.get(scenario, '')} The mail is {ENDS.get(end, end)}.".lstrip())
        parts.append(render_race(end, lines))
        if problems := [f"- **{line.server}**: {_cell(problem)}" for line in lines for problem in line.problems]:
            parts.append("\n".join(problems))
    if comparison.missing:
        lines_ = [f"- **{name}** took no part: {_cell(why)}" for name, why in comparison.missing.items()]
        parts.append("\n".join(lines_))
    return "\n\n".join(parts) + "\n"


def _facts(comparison: Comparison) -> str:
    machine = ", ".join(f"{name} {_cell(value)}" for name, value in comparison.machine.items())
    versions = ", ".join(f"{name} {_cell(version)}" for name, version in comparison.versions.items())
    how = f"{count(comparison.rounds)} interleaved rounds of {number(comparison.seconds)} s of load each"
    cut = " It was interrupted: not all rounds were run." if comparison.interrupted else ""
    return (
        f"```\n{comparison.command}\n```\n\n"
        f"{comparison.started}. Machine: {machine}. Servers: {versions}.\n\n"
        f"{how}, client and server on one machine; medians, in parentheses the smallest and the largest round.{cut} "
        "CPU is that of all processes of a server until it has nothing left to do, "
        f"by {comparison.accounting or 'nothing'}. Memory is the proportional set size of all of them late in the "
        "load. Syncs are the calls that wait for the disk, counted with strace while one session sends one message "
        "after the other: those before the 250, and in all. Latency is from the end of a message to its reply."
    )


def render_race(end: str, lines: Sequence[Line]) -> str:
    """One table."""
    head = ["server", "kept before 250", "syncs", "accepted/s", DRAINED[end], "CPU µs", "memory MB"]
    head += [f"{name} ms" for name in LATENCIES]
    rows = [_row(line) for line in lines]
    used = [at for at in range(len(head)) if at < 4 or any(row[at] != NONE for row in rows)]
    return render_table([[cells[at] for at in used] for cells in (head, *rows)], texts=2)


def _row(line: Line) -> list[str]:
    before = number(line.syncs.before_250) if line.syncs else NONE
    syncs = f"{before}, {number(line.syncs.in_all)}" if line.syncs else NONE
    claim = f"**claims {line.claim}, counted {before}**" if kept(line) == BROKEN else line.claim
    spreads = [figure.of(line) for figure in FIGURES.values()]
    latencies = [line.end_of_data_ms.get(name) for name in LATENCIES]
    return [line.server, claim, syncs, *map(show_spread, (*spreads, *latencies))]


def show_spread(spread: Spread | None) -> str:
    """The median, with the smallest and largest of several rounds."""
    if spread is None:
        return NONE
    middle = number(spread.median)
    return middle if len(spread.rounds) == 1 else f"{middle} ({number(spread.low)}–{number(spread.high)})"


def render_table(rows: Sequence[Sequence[str]], texts: int) -> str:
    """A Markdown table, the first row its head; the first `texts` columns are text, the others figures."""
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]

    def render(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if at < texts else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * width if at < texts else f"{'-' * (width - 1)}:" for at, width in enumerate(widths)]
    return "\n".join([render(rows[0]), render(rule), *map(render, rows[1:])])


def _cell(value: object) -> str:
    """Foreign text that cannot end a cell or begin markup."""
    return re.sub(r"([|*_`<>\[\]])", r"\\\1", plain(value))


def insert_section(document: str, section: str) -> str:
    """A document with this section between its markers; at its end where it has none. Raises LoadError."""
    whole = f"{BEGIN}\n\n{section.strip()}\n\n{END}"
    if BEGIN not in document and END not in document:
        return f"{document.rstrip()}\n\n## The race\n\n{whole}\n"
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in after or END in after:
        raise LoadError("the markers of the race's section do not stand once each, in their order")
    return f"{before}{whole}{after}"


def render_images(charts: Sequence[Path], document: Path) -> Iterator[str]:
    """Links from a document to charts."""
    for chart in charts:
        yield f"![{chart.stem}]({os.path.relpath(chart, document.parent)})"
