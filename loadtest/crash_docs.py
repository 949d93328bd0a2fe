"""What crash runs have found, for people: a table, and two sections of a document, the promise's figures and the rest.

In: the Records of some commands, the names of all faults. Out: Markdown that reads as well unrendered; a document in
which both sections are made anew, and beside it a JSON file of the same name with all that they are made of, so that a
command renews the rows of the faults that it ran, and no others.
Always: nothing is said that was not run: what is missing is named, and a sweep of which some cases were left out is not
called every step. Not here: what is counted (crash_result).
On failure: LoadError, where a document's markers are not whole or a file cannot be written.
"""

from __future__ import annotations

import fcntl
import os
import textwrap
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from . import LoadError
from .comparison_text import render_table
from .crash_result import Record, Tally, merge, read_records, sum_up, write_records

PROMISE, RESULTS = "promise", "results"
_BEGIN = "<!-- made by python -m loadtest crash --docs: {}, begin -->"
_END = "<!-- made by python -m loadtest crash --docs: {}, end -->"
WIDTH = 120
NO_KILLS = ("kill.term", "kill.stop")  # signals that let a process go on, or end in order


def render_results(tallies: Sequence[Tally]) -> str:
    """A table with a row for each fault."""
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


def count(number: int, one: str, many: str = "") -> str:
    """A number with its noun."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def renew(document: Path, records: Sequence[Record], faults: Collection[str]) -> None:
    """Makes the sections of a document anew, with what is known from earlier commands. `faults` are all that there
    are, in their order. Raises LoadError."""
    with _locked(document):
        _renew(document, records, faults)


def _renew(document: Path, records: Sequence[Record], faults: Collection[str]) -> None:
    known = document.with_suffix(".json")
    kept = merge([*(read_records(known) if known.exists() else ()), *records])
    order = {name: place for place, name in enumerate(faults)}
    for record in kept:
        record.tallies = [tally for tally in record.tallies if tally.name in order]
    tallies = sorted((tally for record in kept for tally in record.tallies), key=lambda tally: order[tally.name])
    try:
        text = document.read_text(encoding="utf-8")
        text = insert(text, PROMISE, _wrap(render_promise(tallies)))
        text = insert(
            text, RESULTS, _render_section(kept, tallies, [name for name in faults if _is_missing(name, tallies)])
        )
        write_records(known, kept)
        document.write_text(text, encoding="utf-8")
    except OSError as error:
        raise LoadError(f"{error.filename} cannot be written: {error.strerror}") from None


@contextmanager
def _locked(document: Path) -> Iterator[None]:
    """Commands may end side by side, and each keeps the rows of the others. Raises LoadError."""
    try:
        folder = os.open(document.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise LoadError(f"{document.parent}: {error.strerror}") from None
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _wrap(text: str) -> str:
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def _is_missing(name: str, tallies: Iterable[Tally]) -> bool:
    return not any(tally.name == name and tally.runs for tally in tallies)


def render_promise(tallies: Sequence[Tally]) -> str:
    """What was done, and that nothing was lost, or what was."""
    total = sum_up("all", tallies)
    runs = {
        group: sum(one.runs for one in tallies if one.name.startswith(f"{group}.") and one.name not in NO_KILLS)
        for group in ("kill", "power", "sweep", "disk", "damage", "network", "limits")
    }
    swept = [one for one in tallies if one.name.startswith("sweep.")]
    steps = "every step" if all(one.whole and not one.why_not for one in swept) else "single steps"
    systems = " and ".join(system for system in ("ext4", "xfs") if any(f".{system}-" in one.name for one in tallies))
    words = {
        "kill": f"**{count(runs['kill'], 'kill')}** of workers, the supervisor, or all of it",
        "power": f"**{count(runs['power'], 'power cut')}** under load",
        "sweep": f"**{count(runs['sweep'], 'power cut')} at {steps}** of the path{f' on {systems}' if systems else ''}",
        "disk": f"**{count(runs['disk'], 'run')} with injected errors** of disks",
        "damage": count(runs["damage"], "damaged spool"),
        "network": f"{count(runs['network'], 'run')} on a network that cuts and loses",
        "limits": f"{count(runs['limits'], 'run')} at the machine's limits",
    }
    parts = [text for group, text in words.items() if runs[group]] or ["no run"]
    what = " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))
    fates = "**no acknowledged message was lost or altered**"
    if total.lost or total.altered:
        fates = f"**{total.lost:,} of their recipients got nothing**, and {total.altered:,} deliveries were altered"
    text = f"In {what}, with {count(total.acked, 'message')} acknowledged, {fates}. "
    text += f"{count(total.duplicates, 'second copy', 'second copies')} came"
    if total.violations:
        return f"{text}; {count(len(total.violations), 'rule was', 'rules were')} broken (see Results)."
    return f"{text}, each where a fault fell between a delivery and its mark."


def _render_section(records: Sequence[Record], tallies: Sequence[Tally], missing: Sequence[str]) -> str:
    commands = []
    for record in records:
        facts = [f"seed {record.seed}"] if "--seed" not in record.command else []
        facts += [fact for fact in (record.version, record.date) if fact]
        commands.append(f"# {', '.join([*facts, count(sum(one.runs for one in record.tallies), 'run')])}")
        commands.append(record.command)
    machines = list(dict.fromkeys(record.machine for record in records if record.machine))
    missed = sum(tally.missed for tally in tallies)
    violations = [violation for tally in tallies for violation in tally.violations]
    reasons = [f"{tally.name}: {tally.why_not}" for tally in tallies if tally.why_not]
    parts = [
        "```\n" + "\n".join(commands) + "\n```",
        *(f"On {machine}." for machine in machines),
        render_results(tallies),
        f"Not counted: {count(missed, 'run')} in which the fault did not strike." if missed else "",
        _wrap(f"Not run: {', '.join(missing)}.") if missing else "",
        "Not to their end:\n\n" + "\n".join(f"- {reason}" for reason in reasons) if reasons else "",
        "Violations:\n\n" + "\n".join(f"- `{one}`" for one in violations) if violations else "Violations: none.",
    ]
    return "\n\n".join(filter(None, parts))


def insert(document: str, name: str, section: str) -> str:
    """A document with this section between its markers. Raises LoadError where they do not stand once each."""
    begin, end = _BEGIN.format(name), _END.format(name)
    before, found, rest = document.partition(begin)
    _, ended, after = rest.partition(end)
    if not found or not ended or begin in after or end in after:
        raise LoadError(f"the markers {begin!r} and {end!r} do not stand once each, in their order")
    return f"{before}{begin}\n\n{section.strip()}\n\n{end}{after}"
