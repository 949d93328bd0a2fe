"""What crash runs have found, added up.

In: a Finding for each run of a fault. Out: Tallies, one for each fault and one for its group; a Record: what one
command has found, as JSON and read back from it. "lost" are recipients of acknowledged messages that got nothing
(rule A), "altered" deliveries that are not what was sent (B), "duplicates" second copies, those that a fault excuses
included; what no fault excuses is a violation, as every broken rule is.
Always: a violation is named with its fault, seed and run, so that the run can be made again. Not here: the rules
(rules), how it is shown (crash_docs). On failure: LoadError, where JSON is not of this making.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import LoadError


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
    whole: bool = False  # all cases that it has were asked for

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
        """`why_not` only where there is a reason, `whole` only where it is so."""
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
        return values | {name: value for name in ("why_not", "whole") if (value := getattr(self, name))}


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


@dataclass(slots=True)
class Record:
    """What one command has found. `version` is that of what was tested, `machine` where, `date` when it began."""

    command: str
    seed: int
    version: str
    date: str
    machine: str
    tallies: list[Tally]

    def as_json(self) -> dict[str, Any]:
        """`faults` has a key for each group, with its sums; `parts` those of its faults."""
        groups = {
            group: sum_up(group, parts).as_json() | {"parts": {part.name: part.as_json() for part in parts}}
            for group, parts in by_group(self.tallies).items()
        }
        facts = {name: getattr(self, name) for name in ("command", "seed", "version", "date", "machine")}
        return {**facts, "faults": groups}


def parse_record(values: dict[str, Any]) -> Record:
    """What `Record.as_json` made. Raises KeyError, TypeError and AttributeError."""
    tallies = []
    for group in values["faults"].values():
        for name, part in group["parts"].items():
            known = {key: value for key, value in part.items() if key != "slowest_recovery_s"}
            tallies.append(Tally(name, recovery=part["slowest_recovery_s"], **known))
    version, date, machine = (str(values.get(name, "")) for name in ("version", "date", "machine"))
    return Record(values["command"], values["seed"], version, date, machine, tallies)


def read_records(file: Path) -> list[Record]:
    """Of one command, or of several as `write_records` writes them. Raises LoadError."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        return [parse_record(one) for one in values.get("records", [values])]
    except OSError as error:
        raise LoadError(f"{file} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LoadError(f"{file} holds no figures of crash runs: {error!r}") from None


def write_records(file: Path, records: Sequence[Record]) -> None:
    """Raises OSError."""
    text = json.dumps({"records": [record.as_json() for record in records]}, indent=2, ensure_ascii=False)
    file.write_text(f"{text}\n", encoding="utf-8")


def merge(records: Sequence[Record]) -> list[Record]:
    """The same, each fault in the last of those that have it; one that could not be run takes no other's place."""
    latest: dict[str, Tally] = {}
    for tally in (tally for record in records for tally in record.tallies):
        if tally.runs or tally.violations or tally.name not in latest:
            latest[tally.name] = tally
    kept = []
    for record in records:
        record.tallies = [tally for tally in record.tallies if latest[tally.name] is tally]
        if record.tallies:
            kept.append(record)
    return kept
