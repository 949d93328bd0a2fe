"""What stands between a configuration and a server on this machine: files, folders, users, asked without starting.

In: a configuration without errors. Out: a place in its file and what is wrong, for each thing. Nothing is made, opened
for writing or bound, and no name is resolved. Where root asks, what the server reads and writes as another user is
looked at as that user; whoever else asks is told what holds for himself. The rest is said at the start (claim.py,
supervisor.py). Not here: the file itself (config.py), lists (list_watch.py).
"""

from __future__ import annotations

import os
import pwd
import socket
import stat
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from . import tls
from .certificates import CertificateError, files_of, read_demands, read_file, read_pair, read_pairs, try_all
from .claim import explain_password, read_password
from .config import Auth, Config, Pipe, Postgresql, Smtp, Sql, Transport, Unix
from .credentials.file import UsersError, read_users
from .credentials.oauth import missing_library, parse_keys
from .delivery.runner import explain_arguments, make_command
from .folders import ask_as, explain_folder, find_closed, nearest
from .sql import missing_driver
from .toml_lines import Place


def check_machine(config: Config) -> Iterator[tuple[Place, str]]:
    """What stands between this configuration and a server on this machine."""
    yield from _check_tls(config)
    if wrong := explain_folder(config.data_dir):
        yield ("data_dir",), wrong
    account = _find_user(config.user)
    if config.user and account is None:
        yield ("user",), f"there is no user {config.user} on this machine"
    for i, listener in enumerate(config.listener):
        for endpoint in listener.address:
            if isinstance(endpoint, Unix) and not os.path.isdir(endpoint.path.parent):
                yield ("listener", i, "address"), f"{endpoint.path.parent} is no folder"
    if (oauth := config.auth.oauth) is not None and (wrong := _check_password(oauth.client_secret_file)):
        yield ("auth", "oauth", "client_secret_file"), wrong
    for name, database in config.sql.items():
        if wrong := _check_password(database.password_file):
            yield ("sql", name, "password_file"), wrong
    for name, way in config.transport.items():
        for key, wrong in _check_transport(way, account):
            yield ("transport", name, key), wrong
    becomes = account if os.geteuid() == 0 and account is not None and account.pw_uid else None
    try:
        yield from ask_as(becomes, partial(_check_as_server, config, becomes.pw_name if becomes else ""))
    except OSError as error:
        yield ("user",), str(error.strerror)


def _check_as_server(config: Config, became: str) -> Iterator[tuple[Place, str]]:
    """What the server needs when it is its user already; the folder of its data it makes before it `became` that."""
    there = nearest(config.data_dir.parent)
    if became and not os.access(there, os.X_OK):
        yield ("data_dir",), f"{there} is closed to the user {became}"
    for path, wrong in _check_auth(config.auth):
        yield ("auth", *path), wrong
    for name, database in config.sql.items():
        for key, wrong in _check_database(database):
            yield ("sql", name, key), wrong
    for name, way in config.transport.items():
        if isinstance(way, Smtp) and way.ca_file is not None and (wrong := _check_authorities(way.ca_file)):
            yield ("transport", name, "ca_file"), wrong
    yield from find_closed(config)


def _check_auth(auth: Auth) -> Iterator[tuple[tuple[str, ...], str]]:
    if auth.users_file is not None:
        try:
            read_users(auth.users_file)
        except UsersError as error:
            yield ("users_file",), str(error)
    if auth.dovecot is not None and (wrong := _check_socket(auth.dovecot.socket)):
        yield ("dovecot", "socket"), wrong
    oauth = auth.oauth
    if oauth is None:
        return
    if oauth.ca_file is not None and (wrong := _check_authorities(oauth.ca_file)):
        yield ("oauth", "ca_file"), wrong
    if not oauth.introspection and (wrong := missing_library()):
        yield ("oauth",), wrong
    elif oauth.keys_file is not None:
        try:
            parse_keys(oauth.keys_file.read_bytes())
        except OSError as error:
            yield ("oauth", "keys_file"), f"{oauth.keys_file} cannot be read: {error.strerror}"
        except ValueError as error:
            yield ("oauth", "keys_file"), f"{oauth.keys_file}: {error}"


def _check_socket(path: Path) -> str:
    try:
        there = path.stat()
    except OSError as error:
        return f"{path} cannot be reached: {error.strerror}"
    return "" if stat.S_ISSOCK(there.st_mode) else f"{path} is no socket"


def _check_authorities(path: Path) -> str:
    try:
        tls.client_context(verify=True, ca_file=path)
    except OSError as error:  # ssl.SSLError is one
        return f"{path} holds no certificate that can be read: {error.strerror}"
    return ""


def _check_database(section: Sql) -> Iterator[tuple[str, str]]:
    if isinstance(section.database, Postgresql):
        if wrong := missing_driver():
            yield "database", wrong
    elif not os.access(section.database.path, os.R_OK):
        yield "database", f"{section.database.path} cannot be read"


def _check_password(path: Path | None) -> str:
    if path is None:
        return ""
    try:
        read_password(path)
    except (OSError, ValueError) as error:
        return f"{path} {explain_password(error)}"
    return ""


def _find_user(name: str) -> pwd.struct_passwd | None:
    try:
        return pwd.getpwnam(name) if name else None
    except (KeyError, ValueError):
        return None


def _check_transport(way: Transport, account: pwd.struct_passwd | None) -> Iterator[tuple[str, str]]:
    """`account` is who the server will be."""
    match way:
        case Pipe():
            yield from _check_command(way, account)
        case Smtp():
            if wrong := _check_password(way.password_file):
                yield "password_file", wrong
            for address in way.source:
                if not _is_ours(str(address)):
                    yield "source", f"{address} is no address of this machine"


def _check_command(way: Pipe, account: pwd.struct_passwd | None) -> Iterator[tuple[str, str]]:
    if wrong := explain_arguments(way.command):
        yield "command", wrong
    elif not os.path.lexists(way.command[0]):
        yield "command", f"there is no {way.command[0]}"
    if way.user and _find_user(way.user) is None:
        yield "user", f"there is no user {way.user} on this machine"
    elif os.geteuid() == 0:  # as the server will be, then
        try:
            make_command(["/"], way.user, account.pw_uid if account else 0, way.timeout, way.concurrency)
        except ValueError as error:
            yield "user", str(error).removeprefix("user: ")


def _is_ours(address: str) -> bool:
    """Whether a connection can come from there."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def _check_tls(config: Config) -> Iterator[tuple[Place, str]]:
    """Certificates, keys, and what is asked of clients."""
    good = True
    for number, files in enumerate(files_of(config)):
        place: Place = ("tls", "also", number - 1) if number else ("tls",)
        wrong: list[CertificateError] = []
        keys = ("certificate", "key") if files[0] != files[1] else ("certificate",)
        for path, key in zip(files, keys, strict=False):
            try:
                read_file(path, key)
            except CertificateError as error:
                wrong.append(error)
        if not wrong:
            try:
                read_pair(*files)
            except CertificateError as error:
                wrong.append(error)
        for one in wrong:
            good = False
            yield (*place, *([one.key] if one.key else [])), str(one)
    try:
        demands = read_demands(config)
        if good and demands:
            try_all(demands.values(), read_pairs(config))
    except CertificateError as error:
        who = [i for i, one in enumerate(config.listener) if one.client_ca and str(one.client_ca) in str(error)]
        yield (("listener", who[0], "client_ca") if error.key == "client_ca" else ("tls", "ciphers")), str(error)
