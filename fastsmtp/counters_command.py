"""The command `fastsmtp counters`: what a running server has counted since its start, over all of its workers.

In: the configuration, by which the server is found through its data directory. Out: a table for people, JSON, or the
text format of Prometheus, which a collector of text files takes; exit code 0, or 1 where no server runs: counters live
as long as one. In the table stand only the reasons of refusals that there have been, the most frequent first; the
others have all. Refusals are one metric with a label, `reason`. Not here: what is counted (metrics.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import click

from .command_line import JSON_OPTION, config_option, end
from .config import ConfigError, default, load
from .console import ConsoleError, ask_server

REFUSED = "Refusals, by the word that stands in the log, too"


class Counted(NamedTuple):
    """A counter; `reason` is that of the refusals that it counts, else empty."""

    name: str
    reason: str
    help: str
    value: int


@click.command()
@config_option(without="the embedded default")
@JSON_OPTION
@click.option("--prometheus", is_flag=True, help="Answer in the text format of Prometheus.")
def counters(file: Path | None, as_json: bool, prometheus: bool) -> None:
    """Show what the running server has counted since its start."""
    if as_json and prometheus:
        raise click.UsageError("Give either --json or --prometheus.")
    try:
        answer = ask_server(load(file) if file else default(), {"do": "counters"})
    except ConfigError as error:
        end(*map(str, error.errors))
    except ConsoleError as error:
        end(f"fastsmtp: {error}")
    counted = [Counted(*(row[name] for name in Counted._fields)) for row in answer["counters"]]
    render = render_json if as_json else render_prometheus if prometheus else render_table
    click.echo("\n".join(render(counted)))


def render_table(counted: list[Counted]) -> Iterator[str]:
    refused = sorted((row for row in counted if row.reason and row.value), key=lambda row: -row.value)
    width = max(len(row.reason or row.name) for row in counted)
    for row in counted:
        if not row.reason:
            yield f"{row.name:<{width}} {row.value:>14,}  {row.help}"
    if refused:
        yield from ("", "refused, by reason")
    for row in refused:
        yield f"{row.reason:<{width}} {row.value:>14,}  {row.help}"


def render_json(counted: list[Counted]) -> Iterator[str]:
    found: dict[str, dict[str, dict[str, object]]] = {"counters": {}, "refused": {}}
    for row in counted:
        told = found["refused" if row.reason else "counters"]
        told[row.reason or row.name] = {"value": row.value, "help": row.help}
    yield json.dumps(found, indent=2, ensure_ascii=False)


def render_prometheus(counted: list[Counted]) -> Iterator[str]:
    for row in counted:
        if not row.reason:
            name = f"fastsmtp_{row.name}_total"
            yield from (f"# HELP {name} {row.help}", f"# TYPE {name} counter", f"{name} {row.value}")
    name = "fastsmtp_refused_total"
    yield from (f"# HELP {name} {REFUSED}", f"# TYPE {name} counter")
    for row in counted:
        if row.reason:
            yield f"{name}{{reason={json.dumps(row.reason, ensure_ascii=False)}}} {row.value}"
