"""What a crash run has found, added up, and how it is shown.

In: a Finding for each run of a fault. Out: Tallies, one for each fault and one for its group, as a table for people, as
JSON, and as a section of a document. "lost" are recipients of acknowledged messages that got nothing (rule A),
"altered" deliveries that are not what was sent (B), "duplicates" second copies, those that a fault excuses included;
what no fault excuses is a violation, as every broken rule is.
Always: a violation is named with its fault, seed and run, so that the run can be made again. Not here: the rules
(rules).
On failure: LoadError, where a document's markers are not whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from . import LoadError
from .comparison_text import render_table

BEGIN = "<!-- made by python -m loadtest crash --docs: begin -->"
END = "<!-- made by python -m loadtest crash --docs: end -->"


@dataclass(slots=True)
class Finding:
    """One run of one fault. `struck` False: the fault did not happen, and the run counts for nothing but its
    violations."""

    run: int
    acked: int = 0
    lost: int = 0
    altered: int = 0
    duplicates: int = 0
    recovery: float = 0.0  # seconds from the restart, or the death of a worker, until it accepted
    violations: list[str] = field(default_factory=list)
    struck: bool = True


@dataclass(slots=True)
class Tally:
    """All runs of one fault, or of a group of faults."""

    name: str
    runs: int = 0
    missed: int = 0  # runs in which the fault did not strike
    acked: int = 0
    lost: int = 0
    altered: int = 0
    duplicates: int = 0
    recovery: float = 0.0
    violations: list[str] = field(default_factory=list)
    why_not: str = ""  # it could not be run, or not to its end

    def add(self, found: Finding, seed: int) -> None:
        self.runs += found.struck
        self.missed += not found.struck
        self.acked += found.acked
        self.lost += found.lost
        self.altered += found.altered
        self.duplicates += found.duplicates
        self.recovery = max(self.recovery, found.recovery)
        self.violations += [f"{self.name}, --seed {seed}, run {found.run}: {text}" for text in found.violations]

    def as_json(self) -> dict[str, Any]:
        """`why_not` only where there is a reason."""
        values: dict[str, Any] = {
            "runs": self.runs,
            "missed": self.missed,
            "acked": self.acked,
            "lost": self.lost,
            "altered": self.altered,
            "duplicates": self.duplicates,
            "slowest_recovery_s": round(self.recovery, 3),
            "violations": self.violations,
        }
        return values | ({"why_not": self.why_not} if self.why_not else {})


def sum_up(name: str, tallies: Iterable[Tally]) -> Tally:
    """The tally of a group."""
    total = Tally(name)
    for tally in tallies:
        total.runs += tally.runs
        total.missed += tally.missed
        total.acked += tally.acked
        total.lost += tally.lost
        total.altered += tally.altered
        total.duplicates += tally.duplicates
        total.recovery = max(total.recovery, tally.recovery)
        total.violations += tally.violations
        total.why_not = total.why_not or (f"{tally.name}: {tally.why_not}" if tally.why_not else "")
    return total


def by_group(tallies: Sequence[Tally]) -> dict[str, list[Tally]]:
    """The part of a fault's name before its dot is its group."""
    groups: dict[str, list[Tally]] = {}
    for tally in tallies:
        groups.setdefault(tally.name.partition(".")[0], []).append(tally)
    return groups


def render_results(tallies: Sequence[Tally]) -> str:
    """A table with a row for each fault; a Markdown table that is aligned for the terminal too."""
    rows: list[tuple[str, ...]] = [
        ("fault", "runs", "acknowledged", "lost", "altered", "duplicates", "slowest recovery")
    ]
    rows += [
        (
            tally.name,
            *(f"{count:,}" for count in (tally.runs, tally.acked, tally.lost, tally.altered, tally.duplicates)),
            f"{tally.recovery:.1f} s" if tally.recovery else "–",
        )
        for tally in tallies
    ]
    return render_table(rows, texts=1)


def render_json(tallies: Sequence[Tally], seed: int, command: str) -> dict[str, Any]:
    """`faults` has a key for each group, with its sums; `parts` those of its faults."""
    groups = {
        group: sum_up(group, parts).as_json() | {"parts": {part.name: part.as_json() for part in parts}}
        for group, parts in by_group(tallies).items()
    }
    return {"command": command, "seed": seed, "faults": groups}


def insert_results(document: str, section: str) -> str:
    """A document with this section between its markers. Raises LoadError where they do not stand once each."""
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in after or END in after:
        raise LoadError(f"the markers {BEGIN!r} and {END!r} do not stand once each, in their order")
    return f"{before}{BEGIN}\n\n{section.strip()}\n\n{END}{after}"
