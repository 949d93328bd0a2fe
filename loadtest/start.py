"""Starts a server of a race in a folder of its own, and counts the mail that has come out of it.

In: a Peer, its packages, an end. Out: a Running server that has greeted, with its address, its processes' account and
how many messages are in its mailboxes or at the sink. Always: what was started is stopped, and its folder is gone, when
`stop` returns. Not here: how a server is configured (peers), whose CPU it is (accounting). On failure: LoadError, with
nothing left behind.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import time
from pathlib import Path

from . import LoadError
from .accounting import GRACE_SECONDS, Supervised
from .install import Installed, Store
from .peers import PEERS, Job, Peer, Plan
from .private import INSIDE, own, private_command
from .processes import START_SECONDS, free_port
from .syncs import TRACE, Tracer

HOST = "127.0.0.1"
LOG = "output"  # what a server says on standard output and standard error, in its folder
_COUNTER = re.compile(rb"mesg=(\d+)\r")
_TAIL = 256  # octets in which the last of smtp-sink's counters stands


class Sink:
    """Postfix's smtp-sink, which is cheaper than whatever relays to it, and its count."""

    def __init__(self, server: Supervised, port: int, log: Path) -> None:
        self.port = port
        self._server = server
        self._log = log

    def messages(self) -> int:
        """So far; it writes its counters anew for each message."""
        with self._log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
            found = _COUNTER.findall(file.read())
        return int(found[-1]) if found else 0

    def stop(self) -> None:
        self._server.stop()


def start_sink(store: Store, folder: Path) -> Sink:
    """Raises LoadError."""
    peer = PEERS["smtp-sink"]
    port = free_port()
    installed = peer.install(store)
    plan = peer.plan(Job(folder, "discard", port, 0, installed))
    command = plan.command
    if installed.tree:
        command = private_command(folder, [installed.tree], {}, {}, command)
    log = folder / "sink"
    server = Supervised("sink", command, log)
    try:
        _wait_ready(server, port, folder / "log")
    except BaseException:
        server.stop()
        raise
    return Sink(server, port, log)


class Running:
    """A server that takes mail."""

    def __init__(self, peer: Peer, end: str, port: int, folder: Path, server: Supervised, sink: Sink | None) -> None:
        self.peer = peer
        self.end = end
        self.port = port
        self.server = server
        self._folder = folder
        self._sink = sink

    def delivered(self) -> int | None:
        """Messages in its mailboxes, or at the sink. None: nothing is counted at this end."""
        if self.end == "maildir":
            return mail_below(self._folder / "mail")
        return self._sink.messages() if self._sink else None

    def clear(self) -> None:
        """Empties its mailboxes, so that each round begins with the same ones."""
        mail_below(self._folder / "mail", remove=True)

    def trace(self) -> Path:
        """The file of its tracer."""
        return self._folder / TRACE

    def stop(self) -> int:
        """Its exit code."""
        try:
            return self.server.stop()
        finally:
            if self._sink:
                self._sink.stop()
            shutil.rmtree(self._folder, ignore_errors=True)


def mail_below(folder: Path, remove: bool = False) -> int:
    """Messages in all new/ below a folder."""
    count = 0
    try:
        entries = list(os.scandir(folder))
    except FileNotFoundError:
        return 0
    for entry in entries:
        if folder.name == "new":
            count += 1
            if remove:
                os.unlink(entry)
        elif entry.name not in ("cur", "tmp") and entry.is_dir(follow_symlinks=False):
            count += mail_below(Path(entry.path), remove)
    return count


def start(
    peer: Peer,
    installed: Installed,
    store: Store,
    folder: Path,
    end: str,
    tracer: Tracer | None = None,
) -> Running:
    """Returns when it greets; `folder` is made, and a sink started where the end asks for one. With a tracer the
    server's calls stand in folder/TRACE. Raises LoadError.
    """
    if end not in peer.claims:
        raise LoadError(f"{peer.name} cannot {end}")
    folder.mkdir(mode=0o755)
    sink = None
    try:
        sink = start_sink(store, folder) if end == "relay" else None
        server, port = _start(peer, installed, store, folder, end, sink, tracer)
    except BaseException as error:
        if sink:
            sink.stop()
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise LoadError(f"{peer.name} cannot be started: {error}") from None
        raise
    return Running(peer, end, port, folder, server, sink)


def _start(
    peer: Peer,
    installed: Installed,
    store: Store,
    folder: Path,
    end: str,
    sink: Sink | None,
    tracer: Tracer | None,
) -> tuple[Supervised, int]:
    trees = [tree for tree in (installed.tree, tracer.tree if tracer else None) if tree]
    view = INSIDE if peer.private else folder
    job = Job(view, end, port := free_port(), sink.port if sink else 0, installed)
    plan = peer.plan(job)
    command = plan.command
    if command[0] == "node":
        command[0] = str(store.node())
    if tracer:
        command = tracer.command(view / TRACE, command)
    _prepare(folder, plan)
    if peer.private or trees:
        command = private_command(folder, trees, plan.etc, plan.binds, command)
    grace = 0 if tracer else GRACE_SECONDS
    server = Supervised(peer.name, command, folder / LOG, environment=plan.environment, grace=grace)
    try:
        _wait_ready(server, port, folder / "log")
    except BaseException:
        server.stop()
        raise
    return server, port


def _prepare(folder: Path, plan: Plan) -> None:
    for name, text in plan.files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    for name, user in plan.folders.items():
        (folder / name).mkdir(parents=True)
        (folder / name).chmod(0o711)  # others may pass: what OpenSMTPD asks of its queue, and suits the rest
        if user:
            own(folder / name, user)


def _wait_ready(server: Supervised, port: int, logs: Path) -> None:
    """Until it greets: only its first octets say that every process is there. Raises LoadError."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        server.check_alive()
        try:
            with socket.create_connection((HOST, port), timeout=START_SECONDS) as connection:
                if connection.recv(512).startswith(b"220"):
                    connection.sendall(b"QUIT\r\n")
                    return
        except OSError:
            pass
        if time.monotonic() > deadline:
            own = [text.splitlines()[-1] for file in logs.glob("*") if (text := file.read_text(errors="replace"))]
            said = "; ".join([server.last_words(), *own])
            raise LoadError(f"{server.name} does not greet within {START_SECONDS:.0f} s: {said}")
        time.sleep(0.05)
