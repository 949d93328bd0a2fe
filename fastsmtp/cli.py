"""The command line: `fastsmtp serve` and `fastsmtp check`; other commands stand in files of their own.

In: arguments and a configuration file. Out: text for people (stdout: what was asked for; stderr: errors, and the
banner of `serve`), or JSON for programs; exit code 0, 1 (the configuration or the machine does not allow it) or
2 (wrong arguments). What an operator can cause is one clear line each, never a traceback. A reader that goes
away or a closed stdout changes neither the work nor the exit code. Nothing is served here: the supervisor does.
"""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Iterable
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import Any

import click

from . import sendmail
from .as_command import AsError, parse_wishes, play, render_json, render_text
from .check import check_machine
from .command_line import JSON_OPTION, config_option
from .config import (
    DEFAULT,
    FIXED,
    SECTIONS,
    Config,
    ConfigError,
    Domain,
    Lmtp,
    Maildir,
    Pipe,
    Problem,
    Smtp,
    Transport,
    default,
    default_of,
    kind_of,
    load,
    problem_at,
    warnings,
)
from .counters_command import counters
from .list_watch import check_lists
from .queue_command import queue
from .reload_command import reload
from .toml_lines import Place
from .user_command import user


def _version() -> str:
    try:
        return metadata.version("fastsmtp-mta")
    except metadata.PackageNotFoundError:  # run from a source tree that was never installed
        return "unknown"


def _say(*lines: str, err: bool = False) -> None:
    """Prints lines, or loses them when nobody reads any more."""
    try:
        for line in lines:
            click.echo(line, err=err)
    except OSError:
        # What is still buffered would fail again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2 if err else 1)


def _open_standard_descriptors() -> None:
    """Where 0, 1 or 2 is closed, a socket or a database would get that number, and stray output with it."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)


class _Program(click.Group):
    """The program, which is another one under another name: a link `sendmail` to it is all that others ask for."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if Path(sys.argv[0]).name == "sendmail":
            options |= {"args": ["sendmail", *sys.argv[1:]], "prog_name": "fastsmtp"}
        return super().__call__(*arguments, **options)


@click.group(cls=_Program)
@click.version_option(_version(), prog_name="fastsmtp")
def main() -> None:
    """An SMTP server that says 250 only when the message is on stable storage."""
    _open_standard_descriptors()


@main.command()
@config_option("The configuration", without="an embedded default")
def serve(file: Path | None) -> None:
    """Serve until told to stop (Ctrl-C or SIGTERM)."""
    try:
        config = load(file) if file else default()
    except ConfigError as error:
        _say(*map(str, error.errors), err=True)
        sys.exit(1)
    # The loop and the database's library come with these; `check` needs neither.
    from . import server, supervisor
    from .claim import StartError

    def announce(addresses: list[str]) -> None:
        if file is None:
            _say(*_banner(config, addresses), err=True)

    try:
        source = None if file is None else lambda: read_checked(file)
        sys.exit(supervisor.run(config, announce, worker=server.run, source=source, file=str(file or "")))
    except StartError as error:
        _say(f"fastsmtp: {error}", err=True)
        sys.exit(1)


def read_checked(file: Path) -> Config:
    """A configuration with which a server would start on this machine, if its lists can be compiled: nobody can wait
    here for that. Raises ConfigError."""
    config = load(file)
    if problems := _place(file, check_machine(config)):
        raise ConfigError(problems)
    return config


def _place(file: Path, found: Iterable[tuple[Place, str]]) -> list[Problem]:
    """In the order of the file."""
    problems = [problem_at(file, place, message) for place, message in found]
    return sorted(problems, key=lambda problem: problem.line)


def _banner(config: Config, addresses: list[str]) -> list[str]:
    """What the embedded default does, for someone who has just started it."""
    mail = next(way.path for way in config.transport.values() if isinstance(way, Maildir))
    return [
        f"fastsmtp {_version()} listens on {', '.join(addresses)}. There is no configuration file, so it",
        "takes mail for every address and delivers it to a Maildir for each:",
        "",
        f"    mail lies in    {mail.format(domain='<domain>', local='<local-part>')}/",
        f"    send some       swaks --server {addresses[0]} --to b@y.test",
        "    stop            Ctrl-C",
        "    configure       fastsmtp serve --config FILE   (keys: fastsmtp check --describe)",
        "",
    ]


class _Verbatim(click.Command):
    """A command whose arguments are its own to read."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.params["arguments"] = tuple(args)
        return []


@main.command(cls=_Verbatim, name="sendmail")
def hand_over(arguments: tuple[str, ...]) -> None:
    """Hand a message from standard input to the server, as cron and PHP do (see sendmail --help)."""
    sys.exit(sendmail.run(arguments))


main.add_command(queue)
main.add_command(user)
main.add_command(reload)
main.add_command(counters)


@main.command()
@config_option("The configuration file")
@JSON_OPTION
@click.option(
    "--as",
    "envelope",
    metavar="WORDS",
    help='Play an envelope and say what decides it: "client=203.0.113.9 helo=x.test from=a@x.test to=b@y.test", '
    "perhaps user= and listener=.",
)
@click.option("--describe", is_flag=True, help="Print the reference of all keys, in Markdown, and end.")
def check(file: Path | None, as_json: bool, envelope: str | None, describe: bool) -> None:
    """Say what is wrong with a configuration, where, and what was expected; exit code 0 or 1."""
    if describe:
        _say(render_reference().removesuffix("\n"))
        return
    if file is None:
        raise click.UsageError("Missing option '--config' (or '--describe').")
    config, problems = None, []
    try:
        config = load(file)
        problems = _place(file, chain(check_machine(config), check_lists(config)))
    except ConfigError as error:
        problems = error.errors
    if envelope is not None and config is not None and not problems:
        _explain(config, envelope, as_json)
        return
    if as_json:
        _say(json.dumps(_report(config, problems), indent=2, ensure_ascii=False))
    else:
        _say(*map(str, problems), err=True)
        if config is not None and not problems:
            _say(f"{file}: no errors", *_summary(config))
    sys.exit(1 if problems else 0)


def _explain(config: Config, envelope: str, as_json: bool) -> None:
    """What becomes of an envelope; exit code 1 when that cannot be said."""
    try:
        wishes = parse_wishes(envelope)
        decisions = play(config, wishes)
    except AsError as error:
        _say(f"--as: {error}", err=True)
        sys.exit(1)
    _say(*([render_json(wishes, decisions)] if as_json else render_text(decisions)))


def _report(config: Config | None, problems: list[Problem]) -> dict[str, object]:
    return {
        "ok": not problems,
        "errors": [vars(problem) for problem in problems],
        "warnings": warnings(config) if config else [],
    }


def _senders(data_dir: Path) -> str:
    """Which users of this machine reach the sockets for their mail."""
    for folder in (data_dir, *data_dir.absolute().parents):
        if folder.is_dir() and not folder.stat().st_mode & stat.S_IXOTH:
            return f"root and the user of the server: {folder} is closed to others (chmod o+x)"
    return "all users of this machine"


def _recipients(domain: Domain) -> str:
    if domain.recipients == "any":
        return "any recipient"
    known = domain.recipients
    return f"{len(known)} recipients" if isinstance(known, tuple) else f"recipients of {known}"


def _summary(config: Config) -> list[str]:
    """What a server with this configuration would do, and what seems odd about it."""
    lines = ["", f"{config.hostname}: {config.worker_count} workers, spool in {config.data_dir}", ""]
    for listener in config.listener:
        where = ", ".join(map(str, listener.address))
        lines.append(f"listener   {where}  role {listener.role}, tls {listener.tls}")
    lines += [f"domain     {row.name}  {_recipients(row)}, by {row.transport}" for row in config.domain]
    lines += [f"route      {route.domain}  by {route.transport}" for route in config.route]
    if config.relay.transport:
        users = ["users"] if config.auth.stores and any(listener.auth for listener in config.listener) else []
        who = ", ".join([*users, *map(str, config.relay.networks)]) or "nobody"
        lines.append(f"relay      any other domain, for {who}, by {config.relay.transport}")
    elif not any(route.domain == "*" for route in config.route):
        told = "goes to the postmaster" if config.queue.report_postmaster else "is only logged"
        lines.append(f"relay      nothing; a report to a sender whom no route reaches {told}")
    for name, way in config.transport.items():
        lines.append(f"transport  {name}  {way.type} {_where(way)}".rstrip())
    lines.append(f"sendmail   for {_senders(config.data_dir)}")
    lines += ["", *(f"warning: {warning}" for warning in warnings(config))]
    lines.append(f"note: `fastsmtp reload` applies changes; {', '.join(map(str, FIXED))} need a restart")
    return lines


def _where(way: Transport) -> str:
    """Where a transport takes mail."""
    match way:
        case Maildir():
            return way.path
        case Smtp():
            return f"to {way.smarthost}, tls {way.tls}" if way.smarthost else f"by MX, tls {way.tls}"
        case Lmtp():
            return f"to {way.address}"
        case Pipe():
            return f"to {way.command[0]}"
    return ""


# The reference of all keys.

_INTRODUCTION = """\
# Configuration

<!-- Made by `fastsmtp check --describe` from fastsmtp/config_tables.py and config_outgoing.py; to be changed there. -->

One TOML file: `fastsmtp serve --config FILE` reads it, `fastsmtp check --config FILE` says what is wrong in it and
where. A **duration** is text such as `"30s"`, `"5m"`, `"1h30m"` or `"5d"`, or a number of seconds. A **size** is
text such as `"64KB"`, `"50MB"` or `"1GB"` (1 KB is 1,024 octets), or a number of octets. Relative paths start at
the file's folder. Domain names may be written in any script. A key without a default must be given where its table
stands. Changes take effect at a
restart or, without ending a session, at `fastsmtp reload --config FILE` (or SIGHUP to the server's first process): a
wrong configuration changes nothing, and what needs a restart is named. That is:
FIXED.

Without a file this holds, and relative paths start at the current folder:
"""


def render_reference() -> str:
    """All keys with type, default and help, in Markdown."""
    introduction = _INTRODUCTION.replace("FIXED", ", ".join(f"`{fixed}`" for fixed in FIXED))
    lines = [introduction, "```toml", DEFAULT + "```"]
    for section in SECTIONS:
        title = f"`{section.heading}`" if section.heading else "Top of the file"
        choice = f' with `type = "{section.choice}"`' if section.choice else ""
        lines += ["", f"## {title}{choice}", ""]
        if section.heading:
            lines += [" ".join((section.model.__doc__ or "").split()), ""]
        lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
        lines += [
            f"| `{name}` | {kind_of(field)} | {default_of(field)} | {field.description} |"
            for name, field in section.keys.items()
        ]
    return "\n".join(lines) + "\n"
