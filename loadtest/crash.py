"""python -m loadtest crash: breaks fastsmtp on purpose, in every way it knows, and looks for lost mail.

In: the name of a fault, or of a group of them, or `all`; how many runs; a seed. Out: progress on stderr, each violation
with what it takes to repeat it, a table on stdout, and the same as JSON or as sections of a document. Exit code 0:
every rule held in every run; 1: violations, or a fault that could not be made; 2: the command line is wrong.
Always: what a run does comes from the seed, the fault's name and the run's number; the moments are the machine's. All
that was started and mounted is stopped and unmounted, also by Ctrl-C. What lay on the disks when a rule was broken is
kept: log, ledger, what the sink recorded, spool and mailboxes.
Not here: the faults (crash_kill, crash_power ...), how a run goes (crash_site), what must hold (rules).
"""

from __future__ import annotations

import json
import math
import random
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import NoReturn

import click

from . import LoadError
from .crash_docs import count, render_results, renew
from .crash_fault import Fault
from .crash_result import Record, Tally, read_records
from .crash_server import ROOT, CrashError
from .crash_site import Bench
from .machine import describe_machine

MODULES = ("crash_kill", "crash_power", "crash_sweep", "crash_broken", "crash_damage", "crash_network", "crash_limits")
# Of a group, unless told otherwise: what the promise of docs/durability.md is made from. Of `sweep` and of the cuts
# at every octet: all.
RUNS = {"kill": 1250, "power": 200, "disk": 110, "damage": 100, "network": 90, "limits": 30}
EVIDENCE = 5  # runs of which is kept what they left behind
EVIDENCE_FOLDER = "evidence"


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
        wanted = runs or RUNS.get(fault.name.partition(".")[0], 1)
        share = max(1, math.ceil(wanted * fault.share / sum(other.share for other in group)))
        numbers[fault.name] = () if fault.every and runs is None else tuple(range(first, first + share))
    return numbers


def play(fault: Fault, bench: Bench, evidence: Path) -> Tally:
    """All runs of a fault; one that cannot be made does not stop others. What broke a rule leaves `evidence`."""
    tally = Tally(fault.name, whole=not bench.numbers)
    begun = time.monotonic()
    try:
        for found in fault.play(bench):
            for violation in found.violations:
                click.echo(f"\r{fault.name}, --seed {bench.seed}, run {found.run}: {violation}", err=True)
            if found.violations:
                _keep(bench.folder, evidence, f"{fault.name}-{found.run}")
            tally.add(found, bench.seed)
            _tell(tally, begun)
    except (LoadError, CrashError) as error:
        tally.why_not = str(error)
        click.echo(f"\r{fault.name}: {error}", err=True)
    if sys.stderr.isatty():
        click.echo(err=True)
    return tally


def _keep(left: Path, evidence: Path, name: str) -> None:
    """What a run left behind, copied while the server still stands there; without images and sockets."""
    if left.exists() and len(list(evidence.glob("*"))) < EVIDENCE:
        try:
            shutil.copytree(left, evidence / name, ignore=_not_copied, symlinks=True)
        except OSError as error:  # the server goes on: a file may be gone meanwhile
            click.echo(f"not all evidence of {name} could be kept: {error}", err=True)


def _not_copied(folder: str, names: list[str]) -> list[str]:
    def is_foreign(path: Path) -> bool:
        mode = path.lstat().st_mode
        return path.suffix == ".image" or not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode))

    return [name for name in names if is_foreign(Path(folder, name))]


def _tell(tally: Tally, begun: float) -> None:
    """One line, written over where somebody looks at it; else a line now and then."""
    line = f"{tally.name}: {count(tally.runs, 'run')}, {tally.acked:,} acknowledged, {time.monotonic() - begun:.0f} s"
    if sys.stderr.isatty():
        click.echo(f"\r{line}", nl=False, err=True)
    elif tally.runs % 25 == 1:
        click.echo(line, err=True)


@click.command("crash")
@click.argument("fault", metavar="FAULT|all|list")
@click.option("--runs", type=click.IntRange(1), metavar="N",
              help="Of each group of faults, shared among them. [as `list` says]")  # fmt: skip
@click.option("--seed", type=click.IntRange(0), metavar="S", help="What the faults are chosen by. [drawn]")
@click.option("--first", type=click.IntRange(0), default=0, metavar="N", help="The number of the first run. [0]")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="All figures, for programs.")
@click.option("--docs", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="A document between whose markers the rows of these faults are made anew. Beside it, as .json, lie"
              " all figures that it shows.")  # fmt: skip
@click.option(
    "--from",
    "sources",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    multiple=True,
    metavar="FILE",
    help="Run nothing: the figures are those of an earlier --json. More than once.",
)
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
    sources: tuple[Path, ...],
    where: Path | None,
    package: Path,
) -> None:
    """Break fastsmtp on purpose, and look for lost mail.

    FAULT is one of those that `crash list` shows, or a group of them: the part before the dot. Faults with file systems
    of their own need root. `crash all` takes some hours; `crash all --runs 12` shows in minutes that everything can be
    made here. To repeat a run: its FAULT, --seed S --first RUN --runs 1.
    """
    if fault == "list":
        _list()
        return
    faults = choose(fault)
    if sources:
        names = {one.name for one in faults}
        records = [record for source in sources for record in read_records(source)]
        for record in records:
            record.tallies = [tally for tally in record.tallies if tally.name in names]
    else:
        if not (package / "fastsmtp").is_dir():
            raise click.UsageError(f"{package} holds no package fastsmtp")
        asked = {"--runs": runs, "--seed": seed, "--first": first or None}
        words = [word for name, value in asked.items() if value is not None for word in (name, str(value))]
        command = shlex.join(["python", "-m", "loadtest", "crash", fault, *words])
        seed = random.randrange(1 << 32) if seed is None else seed
        record = Record(command, seed, describe_version(package), time.strftime("%F"), _describe(where), [])
        _run(record, faults, share_out(faults, runs, first), package, where, json_file)
        records = [record]
    _write(records, json_file, docs)
    if any(tally.violations or tally.why_not for record in records for tally in record.tallies):
        raise SystemExit(1)


def _run(
    record: Record,
    faults: Sequence[Fault],
    numbers: dict[str, tuple[int, ...]],
    package: Path,
    where: Path | None,
    json_file: Path | None,
) -> None:
    """In a folder of its own. The file has what was found so far, should somebody end a run of hours."""
    signal.signal(signal.SIGTERM, _stop)
    click.echo(f"seed {record.seed}", err=True)
    folder = Path(tempfile.mkdtemp(prefix="crash-", dir=where))
    bench = Bench(folder, package.resolve(), record.seed, ())
    try:
        for fault in faults:
            record.tallies.append(play(fault, bench.of(fault.name, numbers[fault.name]), folder / EVIDENCE_FOLDER))
            if json_file:
                _write_json([record], json_file)
    finally:
        evidence = folder / EVIDENCE_FOLDER
        for path in folder.iterdir():
            if path != evidence:
                shutil.rmtree(path, ignore_errors=True)
        if evidence.exists():
            click.echo(f"what lay there when rules were broken is kept in {evidence}", err=True)
        else:
            folder.rmdir()


def describe_version(package: Path) -> str:
    """What is tested: its commit, where it has one, and whether its modules are compiled."""
    git = ["git", "-C", str(package), "describe", "--always", "--dirty=, with changes"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        commit = ""
    sources = {file.stem for file in package.glob("fastsmtp/*.py")}
    compiled = any(file.name.partition(".")[0] in sources for file in package.glob("fastsmtp/*.so"))
    return ", ".join(filter(None, [commit, "compiled" if compiled else "from its sources"]))


def _describe(where: Path | None) -> str:
    found = describe_machine(where or Path(tempfile.gettempdir()))
    return ", ".join(f"{name} {found[name]}" for name in ("system", "kernel", "file system", "python") if name in found)


def _list() -> None:
    group = ""
    for one in all_faults().values():
        if group != (group := one.name.partition(".")[0]):
            click.echo(f"# {group}: {f'{RUNS[group]:,} runs' if group in RUNS else 'all its cases'}\n")
        every = " All its cases are run, unless told otherwise." if one.every and group in RUNS else ""
        click.echo(f"{one.name}\n{_indented(one.text + every)}\n")


def _write(records: Sequence[Record], json_file: Path | None, docs: Path | None) -> None:
    tallies = [tally for record in records for tally in record.tallies]
    click.echo(render_results(tallies))
    violations = [violation for tally in tallies for violation in tally.violations]
    for violation in violations:
        click.echo(violation)
    seeds = ", ".join(dict.fromkeys(str(record.seed) for record in records))
    click.echo(f"violations: {len(violations) or 'none'}; seed {seeds}")
    if json_file:
        _write_json(records, json_file)
    if docs:
        renew(docs, records, list(all_faults()))


def _write_json(records: Sequence[Record], file: Path) -> None:
    values = records[0].as_json() if len(records) == 1 else {"records": [one.as_json() for one in records]}
    try:
        file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise LoadError(f"{file} cannot be written: {error.strerror}") from None


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


def _stop(signum: int, _: object) -> NoReturn:
    """As an exception, so that everything is stopped and unmounted."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(128 + signum)
