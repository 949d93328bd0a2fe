"""`fastsmtp user ...`: the users of the users file, and whether a password is the right one.

In: arguments, a configuration; a password from a prompt that does not show it, or one line of standard input when that
is no terminal, never from the command line, where everybody on the machine could read it. Out: text for people, or JSON
for programs; exit code 0, 1 (it could not be done, or the password is wrong) or 2 (wrong arguments). Errors are a line
each. It does not matter whether the server runs: it sees the change at the next login. A password is kept as argon2id,
and as SCRAM keys where they are wanted. RFC 4013 (what of a password is compared).
"""

from __future__ import annotations

import functools
import json
import os
import pwd
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn, ParamSpec

import click

from .config import Config, ConfigError, load
from .credentials import canonical
from .credentials.directory import Record
from .credentials.file import UsersError, change_users, read_users, render_line
from .credentials.hashes import hash_password, verify
from .credentials.scram import make_keys
from .credentials.senders import parse_sender, parse_senders
from .queue_command import CONFIG_VARIABLE
from .saslprep import saslprep

PASSWORD_LIMIT = 1024  # octets

P = ParamSpec("P")


@click.group()
def user() -> None:
    """Keep the users file: who may log in, and what they may send as."""


def _command(function: Callable[P, None]) -> Callable[P, None]:
    """A command of the group, with the option that all have; what cannot be done is one line and exit code 1."""

    @functools.wraps(function)
    def run(*arguments: P.args, **options: P.kwargs) -> None:
        try:
            function(*arguments, **options)
            sys.stdout.flush()
        except ConfigError as error:
            _end(*map(str, error.errors))
        except UsersError as error:
            _end(f"fastsmtp: {error}")
        except BrokenPipeError:  # who reads has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

    run = click.option(
        "--config",
        "file",
        type=click.Path(path_type=Path),
        required=True,
        envvar=CONFIG_VARIABLE,
        help=f"The server's configuration (also: {CONFIG_VARIABLE}).",
    )(run)
    return user.command(name=function.__name__.strip("_"))(run)


def _writing(function: Callable[P, None]) -> Callable[P, None]:
    """The options that say what a user has."""
    for option in (
        click.option("--scram/--no-scram", default=None, help="Whether SCRAM keys are kept beside the password."),
        click.option(
            "--sender",
            "senders",
            multiple=True,
            metavar="ADDRESS|@DOMAIN",
            help='What the user may send as, besides the own address; "*" is everything. May be repeated.',
        ),
    ):
        function = option(function)
    return function


def _end(*lines: str) -> NoReturn:
    for line in lines:
        click.echo(line, err=True)
    sys.exit(1)


def _users_file(config: Config) -> Path:
    if config.auth.users_file is None:
        _end("fastsmtp: auth.users_file is not set in the configuration")
    return config.auth.users_file


def _name(text: str) -> str:
    """As the file has it. What stands between its columns cannot be in a name."""
    try:
        name = canonical(saslprep(text))
    except ValueError as error:
        raise click.UsageError(f"{text!r} is no user name: it {error}.") from None
    if name[0] == "#" or any(character in ":," or character.isspace() for character in name):
        raise click.UsageError(f'{text!r} is no user name: without ":", "," and spaces, and no "#" first.')
    return name


def _senders(words: tuple[str, ...]) -> str:
    try:
        return ",".join(dict.fromkeys(map(parse_sender, words)))
    except ValueError as error:
        raise click.UsageError(f"--sender: {error}.") from None


def _ask_password(twice: bool) -> str:
    if sys.stdin.isatty():
        text = click.prompt("Password", hide_input=True, confirmation_prompt=twice, err=True, type=str)
    else:
        line = sys.stdin.buffer.readline(PASSWORD_LIMIT + 2).rstrip(b"\r\n")
        if len(line) > PASSWORD_LIMIT:
            _end(f"fastsmtp: a password has at most {PASSWORD_LIMIT} octets")
        try:
            text = line.decode()
        except UnicodeDecodeError:
            _end("fastsmtp: the password is not UTF-8")
    try:
        return saslprep(text)
    except ValueError as error:
        _end(f"fastsmtp: the password {error}")


def _owner(config: Config) -> int:
    """Who must be able to read the file, where root makes it: whom the server becomes."""
    try:
        return pwd.getpwnam(config.user).pw_uid if config.user else -1
    except KeyError:
        _end(f"fastsmtp: user: there is no user {config.user!r} on this machine")


def _make_record(name: str, password: str, scram: bool, config: Config) -> Record:
    rights = parse_senders("", name, str(config.auth.domain or ""))
    return Record(name, hash_password(password), make_keys(password) if scram else None, rights)


def _unknown(name: str) -> UsersError:
    return UsersError(f"there is no user {name}")


@_command
@click.argument("name")
@_writing
def _add(file: Path, name: str, senders: tuple[str, ...], scram: bool | None) -> None:
    """Add a user; the password is asked for twice, or is the first line of standard input.

    Clients that can do SCRAM never send the password itself. The keys for that are weaker against one who has stolen
    the file than argon2; --no-scram leaves them out, and SCRAM is then offered to nobody.
    """
    config = load(file)
    path, name, words = _users_file(config), _name(name), _senders(senders)

    def check(present: Mapping[str, str]) -> None:
        if name in present:
            raise UsersError(f"user {name} is there already; see `fastsmtp user passwd`")

    if path.exists():  # before a password is asked for
        check(dict.fromkeys(read_users(path), ""))
    record = _make_record(name, _ask_password(twice=True), scram is not False, config)

    def change(present: Mapping[str, str]) -> Mapping[str, str | None]:
        check(present)
        return {name: render_line(record, words)}

    change_users(path, change, _owner(config))


@_command
@click.argument("name")
@_writing
def _passwd(file: Path, name: str, senders: tuple[str, ...], scram: bool | None) -> None:
    """Give a user a new password; the old one is of no use from the next login on.

    What the user may send as stays as it is, unless --sender says it anew.
    """
    config = load(file)
    path, name, words = _users_file(config), _name(name), _senders(senders)
    if name not in read_users(path):
        raise _unknown(name)
    password = _ask_password(twice=True)

    def change(present: Mapping[str, str]) -> Mapping[str, str | None]:
        if name not in present:
            raise _unknown(name)
        columns = present[name].split(":")
        keeps = bool(columns[2]) if scram is None else scram
        return {name: render_line(_make_record(name, password, keeps, config), words or columns[3])}

    change_users(path, change)


@_command
@click.argument("name")
def _delete(file: Path, name: str) -> None:
    """Delete a user, who cannot log in from then on. Sessions that are open stay open."""
    path, name = _users_file(load(file)), _name(name)

    def change(present: Mapping[str, str]) -> Mapping[str, str | None]:
        if name not in present:
            raise _unknown(name)
        return {name: None}

    change_users(path, change)


@_command
@click.option("--json", "as_json", is_flag=True, help="An object in each line.")
def _list(file: Path, as_json: bool) -> None:
    """Show the users, and what they may send as."""
    config = load(file)
    records = read_users(_users_file(config), config.auth.domain or "")
    for record in sorted(records.values(), key=lambda record: record.name):
        senders = sorted(record.rights.addresses) + [
            domain if domain == "*" else f"@{domain}" for domain in sorted(record.rights.domains)
        ]
        if as_json:
            shown = {"name": record.name, "scram": record.keys is not None, "senders": senders}
            click.echo(json.dumps(shown, ensure_ascii=False))
        else:
            click.echo(f"{record.name}  {'scram' if record.keys else 'no scram'}  {' '.join(senders)}".rstrip())


@_command
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Answer in JSON.")
def _check(file: Path, name: str, as_json: bool) -> None:
    """Say whether a password, asked for or in the first line of standard input, is the user's: exit code 0, or 1."""
    config = load(file)
    path, name = _users_file(config), _name(name)
    record = read_users(path).get(name)
    if record is None:
        raise _unknown(name)
    right = bool(record.password) and verify(record.password, _ask_password(twice=False))
    if as_json:
        click.echo(json.dumps({"name": name, "ok": right}))
    else:
        click.echo(f"The password of {name} is {'right' if right else 'wrong'}.")
    if not right:
        sys.exit(1)
