"""python -m loadtest crash: breaks fastsmtp on purpose, in every way it knows, and looks for lost mail.

In: the name of a fault, or of a group of them, or `all`; how many runs; a seed. Out: progress on stderr, each violation
with what it takes to repeat it, a table on stdout, and the same as JSON or as a section of a document. Exit code 0:
every rule held in every run; 1: violations, or a fault that could not be made; 2: the command line is wrong.
Always: what a run does comes from the seed, the fault's name and the run's number; the moments are the machine's. All
that was started and mounted is stopped and unmounted, also by Ctrl-C.
Not here: the faults (crash_kill, crash_power ...), how a run goes (crash_site), what must hold (rules).
"""

from __future__ import annotations

import json
import math
import random
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import NoReturn

import click

from . import LoadError
from .crash_fault import Fault
from .crash_result import Tally, insert_results, render_json, render_results
from .crash_server import ROOT, CrashError
from .crash_site import Bench

MODULES = ("crash_kill", "crash_power", "crash_sweep", "crash_broken", "crash_damage", "crash_network", "crash_limits")
RUNS = 50  # of a group, unless told otherwise


def all_faults() -> dict[str, Fault]:
    """By name."""
    return {fault.name: fault for module in MODULES for fault in import_module(f"{__package__}.{module}").FAULTS}


def choose(name: str) -> list[Fault]:
    """The faults of this name or group. Raises UsageError."""
    faults = all_faults()
    chosen = [fault for key, fault in faults.items() if name in ("all", key, key.partition(".")[0])]
    if not chosen:
        groups = ", ".join(dict.fromkeys(key.partition(".")[0] for key in faults))
        raise click.UsageError(f"there is no fault {name!r}; there are all, {groups}, and those of `crash list`")
    return chosen


def share_out(faults: Sequence[Fault], runs: int | None, first: int) -> dict[str, tuple[int, ...]]:
    """The numbers of the runs of each fault: `runs` for each group, shared among its faults, each one at least. None:
    all that it has."""
    numbers: dict[str, tuple[int, ...]] = {}
    for fault in faults:
        group = [other for other in faults if other.name.partition(".")[0] == fault.name.partition(".")[0]]
        count = max(1, math.ceil((runs or RUNS) * fault.share / sum(other.share for other in group)))
        numbers[fault.name] = () if fault.every and runs is None else tuple(range(first, first + count))
    return numbers


def play(faults: Sequence[Fault], bench: Bench, numbers: dict[str, tuple[int, ...]]) -> list[Tally]:
    """Every fault in its turn; one that cannot be made does not stop the others."""
    tallies = []
    for fault in faults:
        tally = Tally(fault.name)
        tallies.append(tally)
        begun = time.monotonic()
        try:
            for found in fault.play(bench.of(fault.name, numbers[fault.name])):
                for violation in found.violations:
                    click.echo(f"\r{fault.name}, --seed {bench.seed}, run {found.run}: {violation}", err=True)
                tally.add(found, bench.seed)
                _tell(tally, begun)
        except (LoadError, CrashError) as error:
            tally.why_not = str(error)
            click.echo(f"\r{fault.name}: {error}", err=True)
        if sys.stderr.isatty():
            click.echo(err=True)
    return tallies


def _tell(tally: Tally, begun: float) -> None:
    """One line, written over where somebody looks at it; else a line now and then."""
    line = f"{tally.name}: {tally.runs} runs, {tally.acked:,} acknowledged, {time.monotonic() - begun:.0f} s"
    if sys.stderr.isatty():
        click.echo(f"\r{line}", nl=False, err=True)
    elif tally.runs % 25 == 1:
        click.echo(line, err=True)


@click.command("crash")
@click.argument("fault", metavar="FAULT|all|list")
@click.option("--runs", type=click.IntRange(1), metavar="N", help="Of each group of faults. [50; of the sweep: all]")
@click.option("--seed", type=click.IntRange(0), metavar="S", help="What the faults are chosen by. [drawn]")
@click.option("--first", type=click.IntRange(0), default=0, metavar="N", help="The number of the first run. [0]")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="All figures, for programs.")
@click.option("--docs", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="A document whose section between two markers is made anew.")  # fmt: skip
@click.option("--dir", "where", type=click.Path(exists=True, file_okay=False, path_type=Path),
              help="Where data lies: the file system that is tested, and the images of others. [the temporary folder]"
              )  # fmt: skip
@click.option("--package", type=click.Path(exists=True, file_okay=False, path_type=Path), default=ROOT,
              help="The folder that holds the package `fastsmtp` under test. [this one]")  # fmt: skip
def crash_command(
    fault: str,
    runs: int | None,
    seed: int | None,
    first: int,
    json_file: Path | None,
    docs: Path | None,
    where: Path | None,
    package: Path,
) -> None:
    """Break fastsmtp on purpose, and look for lost mail.

    FAULT is one of those that `crash list` shows, or a group of them: the part before the dot. Faults with file systems
    of their own need root. To repeat a run: its FAULT, --seed S --first RUN --runs 1.
    """
    if fault == "list":
        for one in all_faults().values():
            click.echo(f"{one.name}\n{_indented(one.text)}\n")
        return
    faults = choose(fault)
    if not (package / "fastsmtp").is_dir():
        raise click.UsageError(f"{package} holds no package fastsmtp")
    signal.signal(signal.SIGTERM, _stop)
    seed = random.randrange(1 << 32) if seed is None else seed
    click.echo(f"seed {seed}", err=True)
    folder = Path(tempfile.mkdtemp(prefix="crash-", dir=where))
    try:
        bench = Bench(folder, package.resolve(), seed, ())
        tallies = play(faults, bench, share_out(faults, runs, first))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    command = shlex.join(["python", "-m", "loadtest", *sys.argv[1:]])
    _write(tallies, seed, command, json_file, docs)
    if any(tally.violations or tally.why_not for tally in tallies):
        raise SystemExit(1)


def _write(tallies: Sequence[Tally], seed: int, command: str, json_file: Path | None, docs: Path | None) -> None:
    table = render_results(tallies)
    click.echo(table)
    violations = [violation for tally in tallies for violation in tally.violations]
    for violation in violations:
        click.echo(violation)
    click.echo(f"violations: {len(violations) or 'none'}; seed {seed}")
    try:
        if json_file:
            json_file.write_text(json.dumps(render_json(tallies, seed, command), indent=2) + "\n", encoding="utf-8")
        if docs:
            section = f"`{command}`, seed {seed}\n\n{table}\n\nViolations: {len(violations) or 'none'}."
            docs.write_text(insert_results(docs.read_text(encoding="utf-8"), section), encoding="utf-8")
    except OSError as error:
        raise LoadError(f"{error.filename} cannot be written: {error.strerror}") from None


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


def _stop(signum: int, _: object) -> NoReturn:
    """As an exception, so that everything is stopped and unmounted."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(128 + signum)
