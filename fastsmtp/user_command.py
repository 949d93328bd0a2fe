"""`fastsmtp user ...`: the users of the users file, and whether a password is the right one.

In: arguments, a configuration; a password from a prompt that does not show it, or one line of standard input when that
is no terminal, never from the command line, where everybody on the machine could read it. Out: text for people, or JSON
for programs; exit code 0, 1 (it could not be done, or the password is wrong) or 2 (wrong arguments). Errors are a line
each. It does not matter whether the server runs: it sees the change at the next login, other senders at the next
message. A password is kept as argon2id, and as SCRAM keys where they are wanted. RFC 4013 (what is compared).
"""

from __future__ import annotations

import json
import pwd
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ParamSpec

import click

from .auth import PASSWORD_LIMIT
from .command_line import JSON_OPTION, config_option, end, member
from .config import Config, load
from .credentials import UnavailableError, canonical
from .credentials.directory import Record
from .credentials.file import UsersError, change_users, parse_line, read_users, render_line
from .credentials.hashes import hash_password, verify
from .credentials.scram import make_keys
from .credentials.senders import parse_sender, parse_senders
from .rights import Rights
from .saslprep import saslprep

SENDER = "ADDRESS|@DOMAIN"

P = ParamSpec("P")


@click.group()
def user() -> None:
    """Keep the users file: who may log in, and what they may send as."""


_command = member(user, UsersError, config_option(required=True))


def _writing(function: Callable[P, None]) -> Callable[P, None]:
    """The options that say what a user has."""
    for option in (
        click.option("--scram/--no-scram", default=None, help="Whether SCRAM keys are kept beside the password."),
        click.option(
            "--sender",
            "senders",
            multiple=True,
            metavar=SENDER,
            help='What the user may send as, besides the own address; "*" is everything. May be repeated.',
        ),
    ):
        function = option(function)
    return function


def _users_file(config: Config) -> Path:
    if config.auth.users_file is None:
        end("fastsmtp: auth.users_file is not set in the configuration")
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


def _words(words: tuple[str, ...], option: str = "--sender") -> list[str]:
    try:
        return list(dict.fromkeys(map(parse_sender, words)))
    except ValueError as error:
        raise click.UsageError(f"{option}: {error}.") from None


def _shown(rights: Rights) -> list[str]:
    """As they are written."""
    return sorted(rights.addresses) + [domain if domain == "*" else f"@{domain}" for domain in sorted(rights.domains)]


def _ask_password(twice: bool) -> str:
    if sys.stdin.isatty():
        text = click.prompt("Password", hide_input=True, confirmation_prompt=twice, err=True, type=str)
    else:
        line = sys.stdin.buffer.readline(PASSWORD_LIMIT + 2).rstrip(b"\r\n")
        if len(line) > PASSWORD_LIMIT:
            end(f"fastsmtp: a password has at most {PASSWORD_LIMIT} octets")
        try:
            text = line.decode()
        except UnicodeDecodeError:
            end("fastsmtp: the password is not UTF-8")
    try:
        return saslprep(text)
    except ValueError as error:
        end(f"fastsmtp: the password {error}")


def _owner(config: Config) -> int:
    """Who must be able to read the file, where root makes it: whom the server becomes."""
    try:
        return pwd.getpwnam(config.user).pw_uid if config.user else -1
    except KeyError:
        end(f"fastsmtp: user: there is no user {config.user!r} on this machine")


def _make_record(name: str, password: str, scram: bool, config: Config) -> Record:
    rights = parse_senders("", name, str(config.auth.domain or ""))
    try:
        hashed = hash_password(password)
    except UnavailableError as error:
        raise UsersError(str(error)) from None
    return Record(name, hashed, make_keys(password) if scram else None, rights)


def _unknown(name: str) -> UsersError:
    return UsersError(f"there is no user {name}")


def _columns(present: Mapping[str, str], name: str) -> list[str]:
    """Of the user's line, which somebody may have edited."""
    if name not in present:
        raise _unknown(name)
    try:
        parse_line(present[name], "")
    except ValueError as error:
        raise UsersError(f"user {name}: {error}") from None
    return present[name].split(":")


@_command
@click.argument("name")
@_writing
def _add(file: Path, name: str, senders: tuple[str, ...], scram: bool | None) -> None:
    """Add a user; the password is asked for twice, or is the first line of standard input.

    Clients that can do SCRAM never send the password itself. The keys for that are weaker against one who has stolen
    the file than argon2; --no-scram leaves them out, and SCRAM is then offered to nobody.
    """
    config = load(file)
    path, name, words = _users_file(config), _name(name), ",".join(_words(senders))

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
    path, name, words = _users_file(config), _name(name), ",".join(_words(senders))
    if name not in read_users(path):
        raise _unknown(name)
    password = _ask_password(twice=True)

    def change(present: Mapping[str, str]) -> Mapping[str, str | None]:
        columns = _columns(present, name)
        keeps = bool(columns[2]) if scram is None else scram
        return {name: render_line(_make_record(name, password, keeps, config), words or columns[3])}

    change_users(path, change)


@_command
@click.argument("name")
@click.option("--sender", "new", multiple=True, metavar=SENDER, help="This in the place of all; may be repeated.")
@click.option("--add", multiple=True, metavar=SENDER, help="This too; may be repeated.")
@click.option("--remove", multiple=True, metavar=SENDER, help="This no more; may be repeated.")
@click.option("--none", is_flag=True, help="Nothing but the own address.")
@JSON_OPTION
def _senders(
    file: Path,
    name: str,
    new: tuple[str, ...],
    add: tuple[str, ...],
    remove: tuple[str, ...],
    none: bool,
    as_json: bool,
) -> None:
    """Show what a user may send as, each in a line; with options, change it first.

    A running server sees it at the user's next message. The own address stays, and the password too.
    """
    if (bool(new) + none + bool(add or remove)) > 1:
        raise click.UsageError("--sender, --none, and --add or --remove say different things: one of them at a time.")
    config = load(file)
    path, name = _users_file(config), _name(name)
    fresh, more, less = _words(new), _words(add, "--add"), _words(remove, "--remove")

    def change(present: Mapping[str, str]) -> Mapping[str, str | None]:
        columns = _columns(present, name)
        words = [parse_sender(word) for each in columns[3].split(",") if (word := each.strip())]
        for word in less:
            if word not in words:
                raise UsersError(f"{word} is not among what user {name} was given")
        changed = fresh if new or none else [word for word in dict.fromkeys([*words, *more]) if word not in less]
        return {name: ":".join([*columns[:3], ",".join(changed)])}

    if new or none or add or remove:
        change_users(path, change)
    record = read_users(path, config.auth.domain or "").get(name)
    if record is None:
        raise _unknown(name)
    senders = _shown(record.rights)
    if as_json:
        click.echo(json.dumps({"name": name, "senders": senders}, ensure_ascii=False))
    else:
        click.echo("\n".join(senders), nl=bool(senders))


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
        senders = _shown(record.rights)
        if as_json:
            shown = {"name": record.name, "scram": record.keys is not None, "senders": senders}
            click.echo(json.dumps(shown, ensure_ascii=False))
        else:
            click.echo(f"{record.name}  {'scram' if record.keys else 'no scram'}  {' '.join(senders)}".rstrip())


@_command
@click.argument("name")
@JSON_OPTION
def _check(file: Path, name: str, as_json: bool) -> None:
    """Say whether a password, asked for or in the first line of standard input, is the user's: exit code 0, or 1."""
    config = load(file)
    path, name = _users_file(config), _name(name)
    record = read_users(path).get(name)
    if record is None:
        raise _unknown(name)
    try:
        right = bool(record.password) and verify(record.password, _ask_password(twice=False))
    except UnavailableError as error:
        raise UsersError(str(error)) from None
    if as_json:
        click.echo(json.dumps({"name": name, "ok": right}))
    else:
        click.echo(f"The password of {name} is {'right' if right else 'wrong'}.")
    if not right:
        sys.exit(1)
