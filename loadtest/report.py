"""What is required of each measurement, what was found, and both as a table for people or as JSON for programs.

In: rows of figures, one for each round. Out: text. A row's `value` is what its goal is about, in the goal's unit; less
is always better. Medians stand in the table, with the smallest and the largest round behind them.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median


@dataclass(frozen=True)
class Goal:
    """What a value may be at most."""

    what: str
    required: float
    aim: float
    unit: str


RATIO = "× smtp-sink"
S_SERVER = "× s_server"
# "No difference" between 500 and 10,000 sessions is what rounds of one measurement differ by.
NOISE = 3

GOALS = {
    "persistent": Goal("nothing kept, 100 persistent sessions, 1 KB", 1.3, 1.0, RATIO),
    "churn": Goal("nothing kept, a connection per message, 1 KB", 1.3, 0.9, RATIO),
    "big": Goal("nothing kept, persistent, 50 KB", 0.5, 0.25, RATIO),
    "fsync": Goal("250 after fsync, discard, persistent, 1 KB", 2.5, 1.8, RATIO),
    "maildir": Goal("250 after fsync, Maildir, one mailbox, persistent, 1 KB", 8, 5, RATIO),
    "maildir-1000": Goal("the same over 1,000 mailboxes", 12, 7, RATIO),
    "latency": Goal("end-of-data to 250 after fsync, discard, 100 sessions, p99", 10, 4, "ms"),
    "latency-maildir": Goal("the same with Maildir, p99", 10, 4, "ms"),
    "idle": Goal("memory of an idle, greeted session, plain", 3.5, 2, "KB"),
    "idle-tls": Goal("the same in TLS", 32, 28, "KB"),
    "large": Goal("small mail beside ten messages of 20 MB, end-of-data to 250, p99", 50, 20, "ms"),
    "large-memory": Goal("growth of the process meanwhile", 64, 32, "MB"),
    "crowd": Goal("nothing kept, 10,000 sessions of which 500 send, against 500", 25, NOISE, "% slower"),
    "crowd-fsync": Goal("the same, 250 after fsync", 25, NOISE, "% slower"),
    "lmtp": Goal("LMTP to the sink over a unix socket, CPU, 1 KB", 1.2, 0.9, "× SMTP relay"),
    "million-memory": Goal("memory with 1,000,000 deferred messages, above idle", 200, 50, "MB"),
    "million-rate": Goal("accepting new mail beside them, 250 after fsync", 20, NOISE, "% slower"),
    "million-start": Goal("from the start with them to the first new 250", 5, 1, "s"),
    "flat-memory": Goal("memory over 1,000,000 messages, slope", 1, 0.1, "octets a message"),
    "flat-descriptors": Goal("descriptors open after them, beyond those at first", 4, 0, "descriptors"),
    "refused": Goal("a good client's session beside 10,000 refused connections a second, p99", 3, 1.5, "× quiet"),
    "access": Goal("a message more with long lists and all limits, CPU", 5, 3, "µs"),
    "access-connection": Goal("the same, a connection for each message", 5, 3, "µs"),
    "guesses": Goal("a user's session while 10,000 passwords are guessed, p99", 2, 1.3, "× quiet"),
    "handshake": Goal("a connection with a full TLS 1.3 handshake, ECDSA P-256, CPU", 1.15, 1.05, S_SERVER),
    "resumed": Goal("the same, resumed", 1.4, 1.2, S_SERVER),
    "resumed-elsewhere": Goal("the same, on either of two workers", 1.4, 1.2, S_SERVER),
}


@dataclass
class Row:
    """One measurement; the lists have one figure for each round, and are empty where there is none."""

    name: str
    values: list[float]
    fastsmtp_us: list[float] = field(default_factory=list)
    smtp_sink_us: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def goal(self) -> Goal:
        return GOALS[self.name]

    @property
    def value(self) -> float:
        return median(self.values)

    @property
    def met(self) -> str:
        if self.value <= self.goal.aim:
            return "aim"
        return "required" if self.value <= self.goal.required else "NO"


def _show(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "–"
    middle = _show(median(values))
    return middle if len(values) == 1 else f"{middle} ({_show(min(values))}–{_show(max(values))})"


HEAD = ("measurement", "fastsmtp µs", "smtp-sink µs", "messages/s", "ratio or figure", "required", "aim", "met")


def render_table(rows: Sequence[Row]) -> str:
    """One line for each row, medians (smallest–largest round), and what each name means below."""
    cells = [HEAD]
    for row in rows:
        goal = row.goal
        cells.append(
            (
                row.name,
                _spread(row.fastsmtp_us),
                _spread(row.smtp_sink_us),
                _spread(row.rates),
                f"{_spread(row.values)} {goal.unit}",
                f"≤ {goal.required:g}",
                f"≤ {goal.aim:g}",
                row.met,
            )
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]
    lines.insert(1, "  ".join("-" * width for width in widths))
    lines.append("")
    lines += [f"{row.name}: {'; '.join([row.goal.what, *row.notes])}" for row in rows]
    return "\n".join(lines)


def render_json(rows: Sequence[Row]) -> str:
    """All rounds of all rows, their goals, and the machine and command that they come from."""
    machine = {
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": sys.argv[1:],
        "cores": len(os.sched_getaffinity(0)),
        "processor": _processor(),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }
    figures = [asdict(row) | {"value": row.value, "met": row.met, "goal": asdict(row.goal)} for row in rows]
    return json.dumps({"machine": machine, "measurements": figures}, indent=2, ensure_ascii=False) + "\n"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
