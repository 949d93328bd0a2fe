"""Servers with mail that cannot be delivered yet, and the command line that looks at it; for the tests of both.

Mail for `bad.test` is deferred: a plain file stands where the folder of its mailboxes would be. `unblock` removes it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result
from peer import Peer
from servers import Server, running, toml

from fastsmtp.cli import main

SUBJECT = b"Subject: one\r\n\r\nhello\r\n"


def queue(folder: Path, *arguments: str) -> Result:
    """`fastsmtp queue ...` with the configuration of the server in `folder`."""
    return CliRunner().invoke(main, ["queue", *arguments, "--config", str(folder / "fastsmtp.toml")])


def rows(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """What `queue list --json` says."""
    result = queue(folder, "list", "--json", *arguments)
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def block(folder: Path) -> None:
    (folder / "mail").mkdir(exist_ok=True)
    (folder / "mail" / "bad.test").touch()


def unblock(folder: Path) -> None:
    os.unlink(folder / "mail" / "bad.test")


@contextmanager
def blocked(folder: Path, workers: int = 1, tables: str = "") -> Iterator[Server]:
    """A server that cannot deliver to `bad.test`."""
    block(folder)
    with running(folder, toml(folder, workers=workers, tables=tables)) as server:
        yield server


def send(server: Server, recipients: list[str], octets: bytes = SUBJECT) -> str:
    """Sends a message over a connection of its own; its id."""
    with Peer(server.address) as peer:
        reply = peer.data(recipients, octets)
        assert reply.startswith("250 "), reply
        peer.ask("QUIT")
    return reply.split()[-1]


def send_deferred(server: Server, n: int, domain: str = "bad.test") -> list[str]:
    """Sends messages, and waits until each was tried once; their ids."""
    ids = [send(server, [f"box{number}@{domain}"]) for number in range(n)]
    for message_id in ids:
        server.wait_for("deferred", id=message_id)
    return ids
