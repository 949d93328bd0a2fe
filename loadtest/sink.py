"""python -m loadtest sink [HOST:PORT | unix:PATH]: an SMTP or LMTP receiver for relay tests.

In: options. Out: on stderr the address once it listens; at the end, by SIGTERM or SIGINT, the counts, also as JSON; the
record and the messages in files. Exit code 0 at an orderly end, 1 for what failed, 2 for wrong options.
Not here: the server (sink_server), what an option does (sink_plan, sink_service).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from . import LoadError
from .sink_plan import FAULTS, STAGES, parse_answer, parse_delay, parse_failure, parse_fault, parse_hangup
from .sink_server import LISTENING, Settings, serve
from .sink_service import EXTENSIONS, Counts

T = TypeVar("T")


def parsed(parse: Callable[[str], T]) -> Callable[[str], T]:
    """A parser as click wants one: its LoadError becomes an error of the command line."""

    def convert(text: str) -> T:
        try:
            return parse(text)
        except LoadError as error:
            raise click.BadParameter(str(error)) from None

    return convert


def parse_octets(text: str) -> int:
    """`10MB`, `64KB` or `1000`; powers of 1000. Raises LoadError."""
    found = re.fullmatch(r"([0-9]{1,15}) ?(|KB|MB|GB)", text, re.IGNORECASE)
    if found is None:
        raise LoadError(f"{text!r} is no size; 10MB would be")
    return int(found[1]) * int({"": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9}[found[2].upper()])


def render_counts(counts: Counts) -> str:
    """What came, for people; refusals and faults only where there were any."""
    values = counts.as_json()
    lines = [
        f"{counts.messages} messages for {counts.recipients} recipients, {counts.octets} octets,"
        f" {values['rate']:g} a second, over {counts.connections} connections ({counts.sessions_peak} at a time)"
    ]
    if counts.tls or counts.tls_failed:
        lines.append(f"TLS: {counts.tls}, failed: {counts.tls_failed}")
    for what, counted in (("refusals", counts.refusals), ("faults", counts.faults)):
        if counted:
            lines.append(f"{what}: " + ", ".join(f"{name} {count}" for name, count in sorted(counted.items())))
    if counts.unrecorded:
        lines.append(f"refused because they could not be recorded: {counts.unrecorded}")
    return "\n".join(lines)


def _help_of(table: dict[str, str]) -> str:
    return "\n".join(f"  {name:<12}{what}" for name, what in table.items())


EPILOG = (
    "\b\nSTAGE is one of\n"
    + _help_of(STAGES)
    + "\n\n\b\nThe faults are\n"
    + _help_of({name: fault.what for name, fault in FAULTS.items()})
)
_FILE = click.Path(dir_okay=False, path_type=Path)
_EXISTING = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command("sink", epilog=EPILOG)
@click.argument("address", metavar="[HOST:PORT | unix:PATH]", default="127.0.0.1:2525")
@click.option("--lmtp", is_flag=True, help="Speak LMTP (RFC 2033): LHLO, and a reply for each recipient.")
@click.option("--hostname", metavar="NAME", default="sink.test", help="In the greeting.")
@click.option("--record", metavar="FILE", type=_FILE, help="Append a line of JSON for each message, before its 250.")
@click.option(
    "--keep", metavar="DIR", type=click.Path(file_okay=False, path_type=Path), help="Keep each message in a file."
)
@click.option("--fsync", is_flag=True, help="Record and messages are on the disk before the 250.")
@click.option(
    "--answer",
    "answers",
    metavar="RULE",
    multiple=True,
    type=parsed(parse_answer),
    help="'STAGE [PATTERN] [first N] CODE TEXT', such as 'rcpt full@* 452 4.2.2 mailbox full'; with `first N` it holds "
    "so often for each address. The first rule that matches decides. Repeatable.",
)
@click.option(
    "--fail",
    "failures",
    metavar="SHARE[@STAGE]",
    multiple=True,
    type=parsed(parse_failure),
    help="Answer this share 451; without a stage at the end of data. Repeatable.",
)
@click.option(
    "--hangup",
    "hangups",
    metavar="SHARE[@STAGE]",
    multiple=True,
    type=parsed(parse_hangup),
    help="Close the connection on this share instead of answering; without a stage after the final dot. Repeatable.",
)
@click.option(
    "--fault",
    "faults",
    metavar="NAME@STAGE[:SHARE]",
    multiple=True,
    type=parsed(parse_fault),
    help="Misbehave, see below. Repeatable.",
)
@click.option(
    "--delay",
    "delays",
    metavar="[STAGE=]TIME",
    multiple=True,
    type=parsed(parse_delay),
    help="Wait before each reply; without a stage before that to the end of data. Repeatable.",
)
@click.option(
    "--without",
    metavar="EXTENSION",
    multiple=True,
    type=click.Choice(tuple(EXTENSIONS), case_sensitive=False),
    help="Do not offer it, and refuse who uses it. Repeatable.",
)
@click.option("--size", metavar="SIZE", type=parsed(parse_octets), default="0", help="Largest message; 0: any.")
@click.option("--tls", type=click.Choice(("off", "starttls", "implicit")), default="off", help="When TLS begins.")
@click.option("--certificate", metavar="FILE", type=_EXISTING, help="For TLS, PEM; without, one is made.")
@click.option("--key", metavar="FILE", type=_EXISTING, help="Its key, where it is not in the same file.")
@click.option("--user", metavar="NAME", default="", help="Demand AUTH PLAIN or LOGIN with this name.")
@click.option("--password-file", metavar="FILE", type=_EXISTING, help="Its first line is the password for --user.")
@click.option("--processes", metavar="N", type=click.IntRange(1, 256), default=1, help="Processes on the same address.")
@click.option("--seed", metavar="N", type=int, help="Of the shares; the same seed fails the same.")
@click.option("--json", "as_json", is_flag=True, help="Print the counts as a JSON object.")
def sink_command(
    address: str,
    answers: tuple[Any, ...],
    failures: tuple[Any, ...],
    hangups: tuple[Any, ...],
    faults: tuple[Any, ...],
    without: tuple[str, ...],
    password_file: Path | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Take mail by SMTP or LMTP, and deliver it nowhere.

    Listens on 127.0.0.1:2525, if no address is given, until SIGTERM or SIGINT; then prints what came.
    """
    if bool(settings["user"]) != (password_file is not None):
        raise click.UsageError("--user and --password-file belong together")
    if settings["certificate"] is not None and settings["tls"] == "off":
        raise click.UsageError("--certificate needs --tls")
    try:
        given = Settings(
            address,
            rules=(*answers, *hangups, *failures, *faults),
            without=frozenset(without),
            password=password_file.read_text().split("\n")[0] if password_file else "",
            **settings,
        )
        counts = serve(given, lambda where: click.echo(f"{LISTENING}{where}", err=True))
    except (LoadError, OSError, UnicodeDecodeError) as error:
        raise click.ClickException(str(error)) from None
    click.echo(json.dumps(counts.as_json()) if as_json else render_counts(counts))
