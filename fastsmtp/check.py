"""What stands between a configuration and a server on this machine: files, folders, users, asked without starting.

In: a configuration without errors. Out: a place in its file and what is wrong, for each thing. Nothing is made, opened
for writing or bound, no name is resolved, and whoever asks may be another user than the server will be: what is found
wrong is wrong, the rest is said at the start (claim.py, supervisor.py). Not here: the file itself (config.py).
"""

from __future__ import annotations

import os
import pwd
import re
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

from . import tls
from .claim import explain_password, read_password
from .config import Config, Maildir, Pipe, Smtp, Transport, Unix
from .delivery.runner import explain_arguments, make_command
from .toml_lines import Place


def check_machine(config: Config) -> Iterator[tuple[Place, str]]:
    """What stands between this configuration and a server on this machine."""
    if config.tls:
        yield from _check_certificate(config.tls.certificate, config.tls.key)
    if wrong := _check_folder(config.data_dir):
        yield ("data_dir",), wrong
    account = _find_user(config.user)
    if config.user and account is None:
        yield ("user",), f"there is no user {config.user} on this machine"
    for i, listener in enumerate(config.listener):
        for endpoint in listener.address:
            if isinstance(endpoint, Unix) and not endpoint.path.parent.is_dir():
                yield ("listener", i, "address"), f"{endpoint.path.parent} is no folder"
    for name, way in config.transport.items():
        for key, wrong in _check_transport(way, account):
            yield ("transport", name, key), wrong


def _find_user(name: str) -> pwd.struct_passwd | None:
    try:
        return pwd.getpwnam(name) if name else None
    except (KeyError, ValueError):
        return None


def _check_transport(way: Transport, account: pwd.struct_passwd | None) -> Iterator[tuple[str, str]]:
    """`account` is who the server will be."""
    match way:
        case Maildir():
            if wrong := _check_folder(way.root):
                yield "path", wrong
        case Pipe():
            yield from _check_command(way, account)
        case Smtp():
            if way.password_file is not None:
                try:
                    read_password(way.password_file)
                except (OSError, ValueError) as error:
                    yield "password_file", f"{way.password_file} {explain_password(error)}"
            if way.ca_file is not None:
                try:
                    tls.client_context(verify=True, ca_file=way.ca_file)
                except OSError as error:  # ssl.SSLError is one
                    yield "ca_file", f"{way.ca_file} holds no certificate that can be read: {error.strerror}"
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


def _check_folder(folder: Path) -> str:
    """Why mail cannot be kept there; empty when it can, or when the folder can be made."""
    there = next(parent for parent in (folder, *folder.parents) if os.path.lexists(parent))
    if not there.is_dir():
        return f"{there} is no folder"
    if not os.access(there, os.W_OK | os.X_OK, effective_ids=True):
        return f"{there} is not writable" + ("" if there == folder else f", so {folder} cannot be made")
    return ""


def _check_certificate(certificate: Path, key: Path) -> Iterator[tuple[Place, str]]:
    unreadable = False
    for name, path, mark in (
        ("certificate", certificate, rb"-----BEGIN (TRUSTED )?CERTIFICATE-----"),
        ("key", key, rb"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    ):
        try:
            wrong = "" if re.search(mark, path.read_bytes()) else f"there is no PEM {name} in {path}"
        except OSError as error:
            wrong = f"{path} cannot be read: {error.strerror}"
        if wrong:
            unreadable = True
            yield ("tls", name), wrong
    if unreadable:
        return
    try:
        tls.server_context(certificate, key)
    except ssl.SSLError as error:
        if getattr(error, "reason", None) == "KEY_VALUES_MISMATCH":
            yield ("tls", "key"), f"the key in {key} does not belong to the certificate in {certificate}"
        else:
            yield ("tls",), f"{certificate} and {key} cannot be used: {error.args[-1]}"
