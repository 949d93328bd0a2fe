"""What the commands share: the option --config, how a group gets a command, and how one ends that cannot be done.

In: a function that does it. Out: a command of click. What cannot be done is a line each on standard error and exit code
1, never a traceback; a reader that has seen enough (`| head`) is no error. Not here: any command, and what the
variable is called (config.py), for `sendmail` wants that without click.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, ParamSpec

import click

from .config import CONFIG_VARIABLE, ConfigError

P = ParamSpec("P")
Option = Callable[[Callable[..., Any]], Callable[..., Any]]

JSON_OPTION: Option = click.option("--json", "as_json", is_flag=True, help="Answer in JSON.")


def config_option(what: str = "The server's configuration", without: str = "", required: bool = False) -> Option:
    """The option --config, which the variable stands in for; `without` says what holds when there is neither."""
    return click.option(
        "--config",
        "file",
        type=click.Path(path_type=Path),
        required=required,
        envvar=CONFIG_VARIABLE,
        help=f"{what} (also: {CONFIG_VARIABLE}){f'; without it, {without}' if without else ''}.",
    )


def member(
    group: click.Group, error: type[Exception], *options: Option
) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Makes a function a command of a group, with options that all of it have; `error` says what cannot be done."""

    def add(function: Callable[P, None]) -> Callable[P, None]:
        @functools.wraps(function)
        def run(*arguments: P.args, **given: P.kwargs) -> None:
            try:
                function(*arguments, **given)
                sys.stdout.flush()
            except ConfigError as wrong:
                end(*map(str, wrong.errors))
            except error as wrong:
                end(f"fastsmtp: {wrong}")
            except BrokenPipeError:
                # What is still buffered would fail again at exit.
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

        decorated: Callable[P, None] = run
        for option in options:
            decorated = option(decorated)
        return group.command(name=function.__name__.strip("_"))(decorated)

    return add


def end(*lines: str) -> NoReturn:
    """Ends with errors."""
    for line in lines:
        click.echo(line, err=True)
    sys.exit(1)
