"""The command `fastsmtp reload`: has a running server take its changed configuration, and says what came of it.

In: the configuration, by which the server is found through its data directory; it is checked here first, for then its
errors are told also when no server runs. Out: text, or JSON; exit code 0: new sessions are served by it; 1: nothing has
changed, and why. What needs a restart is named. Not here: what a reload is (holdings.py).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from .command_line import JSON_OPTION, config_option
from .config import ConfigError, load
from .console import ConsoleError, ask_server


@click.command()
@config_option(required=True)
@JSON_OPTION
def reload(file: Path, as_json: bool) -> None:
    """Have the running server take its changed configuration; no session is ended."""
    try:
        answer = ask_server(load(file), {"do": "reload"})
    except ConfigError as error:
        answer = {"file": str(file), "errors": list(map(str, error.errors)), "changed": [], "restart": []}
    except ConsoleError as error:
        answer = {"file": str(file), "errors": [explain(error)], "changed": [], "restart": []}
    if as_json:
        click.echo(json.dumps({"ok": not answer["errors"], **answer}, indent=2, ensure_ascii=False))
    else:
        for line in render(file, answer):
            click.echo(line, err=bool(answer["errors"]))
    sys.exit(1 if answer["errors"] else 0)


def explain(error: ConsoleError) -> str:
    """The new file may name another data directory than the server's."""
    text = str(error)
    return f"{text}; a server keeps its data_dir until it is restarted" if text.startswith("data_dir ") else text


def render(file: Path, answer: dict[str, Any]) -> list[str]:
    """Lines for people."""
    if answer["errors"]:
        return [*answer["errors"], "nothing was changed"]
    changed = ", ".join(answer["changed"])
    lines = [f"{answer['file']}: {f'changed: {changed}' if changed else 'nothing is different'}"]
    if Path(answer["file"]).absolute() != file.absolute():
        lines.append(f"note: that is the file which the server was started with, not {file}")
    if answer["restart"]:
        lines.append(f"note: {', '.join(answer['restart'])}: different too, but this needs a restart")
    return lines
