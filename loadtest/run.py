"""`python -m loadtest run SCENARIO HOST:PORT`: sends mail to a server, and says what came of it.

In: a scenario's name, a target, and options that go before the scenario's. Out: a live view on stderr, a table on
stdout, and where asked for the result as JSON and as a page with plots. The options are those that Options declares.
Always: what was counted is shown, also when the run was interrupted; the files are opened before it begins, so that no
result is lost to a path that cannot be written.
On failure: LoadError when the server cannot be reached; errors during the run are counts, and the exit code is 0.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import MISSING, Field
from pathlib import Path
from typing import Any

import click

from . import LoadError, generator
from .live import LiveView
from .options import Options, declared
from .page import render_page
from .result import Result
from .scenarios import SCENARIOS, find_scenario
from .table import print_result


class Parsed(click.ParamType[Any]):
    """A value of an option that has a notation of its own."""

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return self._parse(value)
        except LoadError as error:
            self.fail(str(error), param, ctx)


def _make_option(each: Field[Any]) -> click.Option:
    """The long option of a field. It has no default of its own: what is not given is the scenario's."""
    facts = each.metadata
    flag = facts["flag"] or f"--{each.name.replace('_', '-')}"
    default = each.default if each.default is not MISSING else ""
    if isinstance(default, bool):
        return click.Option([f"{flag}/--no-{flag[2:]}", each.name], default=None, help=_help(each, default))
    kind: Any = str
    if facts["parse"]:
        kind = Parsed(each.name, facts["parse"])
    elif facts["choices"]:
        kind = click.Choice([choice for choice in facts["choices"] if choice])
    elif isinstance(default, int):
        kind = click.IntRange(min=int(facts["least"]))
    elif isinstance(default, float):
        kind = click.FloatRange(min=facts["least"])
    return click.Option(
        [flag, each.name],
        type=kind,
        default=None,
        metavar=facts["metavar"] or None,
        envvar="LOADTEST_PASSWORD" if each.name == "password" else None,
        help=_help(each, default),
    )


def _help(each: Field[Any], default: object) -> str:
    shown = {True: "on", False: "off"}.get(default, default) if isinstance(default, bool) else default
    return f"{each.metadata['help']} [{shown:g}]" if isinstance(shown, float) else _with(each.metadata["help"], shown)


def _with(text: str, default: object) -> str:
    return f"{text} [{default}]" if default not in ("", (), 0) else str(text)


class RunCommand(click.Command):
    """With the scenarios below the help."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Scenarios"):
            formatter.write_dl([(name, scenario.sentence) for name, scenario in SCENARIOS.items()])


def make_options(scenario: str, target: str, given: dict[str, Any]) -> Options:
    """The scenario's options, and over them those that were given. Raises LoadError."""
    chosen = {name: value for name, value in given.items() if value is not None}
    options = Options(**{**find_scenario(scenario).options, **chosen, "scenario": scenario, "target": target})
    if options.ledger and "oversize" in options.misbehave:
        raise LoadError("--ledger knows nothing of the messages that `oversize` sends: leave one of them out")
    return options


def execute(scenario: str, target: str, **given: Any) -> None:
    """Send mail to HOST:PORT as SCENARIO says, and measure it.

    An option goes before the scenario's own. A TIME is 30s, 5m or 200ms; a SHARE is 5% or 0.05.
    """
    try:
        options = make_options(scenario, target, given)
    except LoadError as error:
        raise click.UsageError(str(error)) from None
    files = {name: _open(name) for name in (options.json, options.report) if name}
    title = f"{scenario} to {target}"
    with LiveView(title, options.duration, options.messages or None) as view:
        result = generator.run(options, view.update)
    print_result(result)
    if options.json:
        _write(files[options.json], render_json(result))
    if options.report:
        _write(files[options.report], render_page([result], title))


def render_json(result: Result) -> str:
    return json.dumps(result.as_json(), indent=2, ensure_ascii=False) + "\n"


def _open(name: str) -> Path:
    """A file that can be written. Raises LoadError."""
    path = Path(name)
    try:
        path.open("a").close()
    except OSError as error:
        raise LoadError(f"{name} cannot be written: {error.strerror}") from None
    return path


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise LoadError(f"{path} cannot be written: {error.strerror}") from None


run_command = RunCommand(
    "run",
    callback=execute,
    help=execute.__doc__,
    params=[
        click.Argument(["scenario"]),
        click.Argument(["target"], metavar="HOST:PORT"),
        *map(_make_option, declared()),
    ],
)
