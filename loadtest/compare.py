"""`python -m loadtest compare --against postfix,exim,...`: a fair race between fastsmtp and other servers.

In: names of servers, ends and scenarios. Out: a Markdown table on stdout, what goes on on stderr, and where asked for
JSON, Markdown, a page, charts, and the section of a document. What is needed is fetched; nothing is installed on the
machine, and all of it is gone afterwards unless --cache keeps it.
Exit code 0 when every server ran every round, 1 when one is missing or a round counts for nothing, 130 after Ctrl-C;
what was found is written in each case. Not here: the race (race), the servers (peers).
"""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn

import click

from . import LoadError, generator
from .comparison import ENDS, Comparison
from .comparison_text import insert_section, render_images, render_markdown
from .install import Store
from .measurements import say
from .options import Options
from .peers import OURS, PEERS
from .race import Race, Terms
from .receive import make_folder
from .result import Result, Snapshot
from .scenarios import SCENARIOS

OTHERS = tuple(name for name in PEERS if name not in OURS)
FILE = click.Path(dir_okay=False, path_type=Path)
FOLDER = click.Path(file_okay=False, path_type=Path)


def names_of(known: Iterable[str]) -> Callable[[click.Context, click.Parameter, str], tuple[str, ...]]:
    """For an option that holds names out of a table, comma-separated."""
    known = tuple(known)

    def parse(_: click.Context, __: click.Parameter, text: str) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(filter(None, (part.strip() for part in text.split(",")))))
        for name in names:
            if name not in known:
                raise click.BadParameter(f"{name} is not one of {', '.join(known)}")
        return names

    return parse


def send(options: Options) -> Result:
    """The generator, without a live view."""

    def ignore(_: Snapshot) -> None: ...

    return generator.run(options, ignore)


@click.command("compare")
@click.option(
    "--against",
    default=",".join(OTHERS),
    callback=names_of(PEERS),
    metavar="NAMES",
    help=f"Servers beside fastsmtp, of {', '.join(OTHERS)}. [all]",
)
@click.option(
    "--ends",
    default=",".join(ENDS),
    callback=names_of(ENDS),
    metavar="NAMES",
    help=f"What becomes of the mail, of {', '.join(ENDS)}. [all]",
)
@click.option(
    "--scenarios",
    default="persistent,churn",
    callback=names_of(SCENARIOS),
    metavar="NAMES",
    help="Which load, see `run --help`. [persistent,churn]",
)
@click.option("--rounds", type=click.IntRange(1), default=3, metavar="N", help="Of each server, end and scenario. [3]")
@click.option("--seconds", type=click.FloatRange(0.1), default=5.0, metavar="S", help="Of load in a round. [5]")
@click.option("--drain", type=click.FloatRange(1), default=180.0, metavar="S", help="To finish after a load. [180]")
@click.option("--sessions", type=click.IntRange(1), metavar="N", help="In place of each scenario's own.")
@click.option("--json", "json_file", type=FILE, help="All rounds, for programs.")
@click.option("--markdown", type=FILE, help="The tables go there too.")
@click.option("--report", type=FILE, help="A page with plots.")
@click.option("--charts", type=FOLDER, help="PNG files with charts.")
@click.option("--docs", type=FILE, help="A document whose section between two markers is made anew.")
@click.option("--dir", "where", type=FOLDER, help="Where data lies, on a disk. [beside this folder]")
@click.option("--cache", type=FOLDER, help="Keep what was fetched here, and use it again. [not kept]")
def compare_command(
    against: tuple[str, ...],
    ends: tuple[str, ...],
    scenarios: tuple[str, ...],
    rounds: int,
    seconds: float,
    drain: float,
    sessions: int | None,
    json_file: Path | None,
    markdown: Path | None,
    report: Path | None,
    charts: Path | None,
    docs: Path | None,
    where: Path | None,
    cache: Path | None,
) -> None:
    """Race fastsmtp against other SMTP servers, side by side on this machine.

    As root on Debian it fetches and starts all of them, without touching the machine's own configuration.
    """
    for file in filter(None, (json_file, markdown, report, docs)):
        check_writable(file)
    # As exceptions, so that the servers are stopped too, and once: a second one would interrupt the stopping.
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, _interrupt)
    generator.descriptors()
    folder = make_folder(where or Path.cwd().parent)
    folder.chmod(0o755)  # servers that change their user must reach their own folders
    try:
        store = Store(cache or folder / "store")
        peers = tuple(PEERS[name] for name in dict.fromkeys((*OURS, *against)))
        options = {"sessions": sessions} if sessions else {}
        race = Race(Terms(peers, ends, scenarios, rounds, seconds, drain, folder, store, options), send)
        race.run()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    found = race.comparison(shlex.join(["python", "-m", "loadtest", *sys.argv[1:]]))
    click.echo(render_markdown(found), nl=False)
    write_all(found, json_file, markdown, report, charts, docs)
    if found.interrupted:
        say("interrupted")
        sys.exit(130)
    if found.missing or any(line.problems for line in found.lines):
        sys.exit(1)


def write_all(
    found: Comparison,
    json_file: Path | None,
    markdown: Path | None,
    report: Path | None,
    charts: Path | None,
    docs: Path | None,
) -> None:
    """Raises LoadError."""
    text = render_markdown(found)
    images: list[Path] = []
    try:
        if json_file:
            json_file.write_text(json.dumps(found.as_json(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if markdown:
            markdown.write_text(text, encoding="utf-8")
        if report:
            from .race_page import render_comparison  # only who asks for it needs it

            report.write_text(render_comparison(found, "The race"), encoding="utf-8")
        if charts:
            from .charts import draw_comparison

            charts.mkdir(parents=True, exist_ok=True)
            images = draw_comparison(found, charts)
        if docs:
            section = "\n\n".join([text.strip(), *render_images(images, docs)])
            old = docs.read_text(encoding="utf-8") if docs.exists() else "# Benchmarks\n"
            docs.write_text(insert_section(old, section), encoding="utf-8")
    except OSError as error:
        raise LoadError(f"{error.filename} cannot be written: {error.strerror}") from None


def check_writable(file: Path) -> None:
    """Before the race, not after. Raises LoadError."""
    try:
        with file.open("a"):
            pass
    except OSError as error:
        raise LoadError(f"{file} cannot be written: {error.strerror}") from None


def _stop(signum: int, _: object) -> NoReturn:
    _ignore_more()
    sys.exit(128 + signum)


def _interrupt(_: int, __: object) -> NoReturn:
    _ignore_more()
    raise KeyboardInterrupt


def _ignore_more() -> None:
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, signal.SIG_IGN)
