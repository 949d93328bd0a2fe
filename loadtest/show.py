"""Figures and foreign text as people read them, the same in the live view, the table and the report.

In: numbers of a Result or Snapshot, and text that a server, a file or a command line gave. Out: short text without
markup. Always: what `plain` gives is printable and of one line, so that no reply can move a cursor, turn the direction
of writing or forge a line; escaping for HTML is the page's business. Numbers that are none (nan, inf) are shown as –.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

NONE = "–"
MOST = 200  # characters of foreign text
SIZES = ("octets", "KB", "MB", "GB", "TB")


def plain(text: object, most: int = MOST) -> str:
    """Foreign text on one line: what is not printable becomes a backslash escape."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text)[: most + 1])
    return shown if len(shown) <= most else shown[: most - 1] + "…"


def number(value: float) -> str:
    """Three digits that matter, thousands apart: 0.42, 4.20, 42.0, 420, 42,000."""
    if not math.isfinite(value):
        return NONE
    size = abs(value)
    return f"{value:,.0f}" if size >= 99.95 or value == 0 else f"{value:.1f}" if size >= 9.995 else f"{value:.2f}"


def tick(value: float) -> str:
    """A round number on an axis, without digits that say nothing: 0.5, 40, 2,000."""
    return f"{value:,.6f}".rstrip("0").rstrip(".")


def count(value: int) -> str:
    return f"{value:,}"


def octets(value: float) -> str:
    """In the unit that fits, each a thousand of the one before."""
    if not math.isfinite(value):
        return NONE
    unit = 0
    while abs(value) >= 1000 and unit < len(SIZES) - 1:
        value /= 1000
        unit += 1
    return f"{value:.0f} {SIZES[0]}" if unit == 0 else f"{number(value)} {SIZES[unit]}"


def clock(seconds: float) -> str:
    """0:07, 12:34, 1:00:00."""
    if not math.isfinite(seconds):
        return NONE
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def counts(values: Mapping[str, int]) -> str:
    """What happened and how often, without what never did: "reset ×3, timeout ×1", or "none"."""
    return ", ".join(f"{plain(name, 40)} ×{count(times)}" for name, times in values.items() if times) or "none"
