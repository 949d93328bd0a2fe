"""python -m loadtest verify LEDGER: whether what arrived is what was acknowledged.

In: a ledger, Maildirs and records of a sink, and what the test did meanwhile. Out: each violation in a line, with its
rule, id, recipient and place; then the counts; or all of it as JSON. Exit code 0: every rule holds; 1: violations;
2: it could not be compared.
Not here: the rules (rules), how mailboxes and records are read (deliveries).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from . import LoadError
from .rules import RULES, Circumstances, Report, Violation, verify


def parse_faulted(lines: Iterable[str]) -> tuple[frozenset[str], tuple[tuple[float, float], ...]]:
    """The ids and the times at which faults were made. Raises LoadError."""
    ids: set[str] = set()
    windows: list[tuple[float, float]] = []
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        try:
            times = [float(word) for word in words]
        except ValueError:
            if len(words) != 1:
                raise LoadError(f"line {number} is no id, no time and no two times: {line.strip()!r}") from None
            ids.add(words[0])
            continue
        if len(times) > 2 or times != sorted(times):
            raise LoadError(f"line {number} is no id, no time and no two times: {line.strip()!r}")
        if times:
            windows.append((times[0], times[-1]))
    return frozenset(ids), tuple(windows)


def render_violation(violation: Violation) -> str:
    """One line; a dash where there is nothing to say."""
    words = [violation.rule, violation.id or "-", f"<{violation.recipient}>" if violation.recipient else "-"]
    return f"{' '.join(words)}: {violation.text}{f' ({violation.where})' if violation.where else ''}"


def render_counts(report: Report) -> str:
    """What was compared, and how often each rule was broken."""
    outcomes = ", ".join(f"{count} {outcome}" for outcome, count in report.outcomes.items() if count)
    broken = ", ".join(f"{rule} {count} ({RULES[rule]})" for rule, count in report.broken.items() if count)
    return (
        f"{report.messages} messages ({outcomes or 'none'}); {report.delivered} deliveries, {report.failed} reported as"
        f" failed, {report.still_queued} still queued, {report.duplicates} second copies\n"
        f"violations: {broken or 'none'}"
    )


def render_json(report: Report) -> dict[str, Any]:
    """The fields of Report, and `broken` by rule."""
    return asdict(report) | {"broken": report.broken}


@click.command("verify")
@click.argument("ledger", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--maildir",
    "maildirs",
    metavar="DIR",
    multiple=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A folder with Maildirs at any depth; repeatable. One at DOMAIN/LOCAL is that recipient's.",
)
@click.option(
    "--sink",
    "sinks",
    metavar="FILE",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A record written by `sink --record`; repeatable.",
)
@click.option(
    "--still-queued",
    metavar="DOMAIN",
    multiple=True,
    help="Mail for this domain may still be queued: the test keeps its destination shut. Repeatable.",
)
@click.option(
    "--faulted",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="What a fault may have doubled. A line is an id, the time of a fault (seconds since 1970), or its first and "
    "last moment.",
)
@click.option("--shared", is_flag=True, help="Recipients share mailboxes: only a message itself says for whom it is.")
@click.option("--drained", is_flag=True, help="Temporary files left in the mailboxes are violations (E).")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def verify_command(
    ledger: Path,
    maildirs: tuple[Path, ...],
    sinks: tuple[Path, ...],
    still_queued: tuple[str, ...],
    faulted: Path | None,
    shared: bool,
    drained: bool,
    as_json: bool,
) -> None:
    """Compare LEDGER, written by `run --ledger`, with what arrived.

    Prints each violation with its rule, id, recipient and place. Exit code 0: none, 1: some, 2: not compared.

    \b
    A  an acknowledged message is missing       D  delivered though not sent, not to them, or refused
    B  not what was sent, or not whole          E  a temporary file is left (--drained)
    C  a second copy, and no fault              F  more than one fate, or a report to <>
    """
    if not maildirs and not sinks:
        raise click.UsageError("what is the ledger to be compared with? Give --maildir or --sink")
    try:
        ids, windows = parse_faulted(faulted.read_text().splitlines()) if faulted else (frozenset[str](), ())
        domains = frozenset(domain.lower() for domain in still_queued)
        report = verify(ledger, maildirs, sinks, Circumstances(windows, ids, domains, shared, drained))
    except (LoadError, OSError, UnicodeDecodeError) as error:
        raise click.UsageError(str(error)) from None
    if as_json:
        click.echo(json.dumps(render_json(report), indent=2))
    else:
        for violation in report.violations:
            click.echo(render_violation(violation))
        click.echo(render_counts(report))
    raise SystemExit(1 if report.violations else 0)
