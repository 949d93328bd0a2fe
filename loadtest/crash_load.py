"""Clients that send messages of the ledger while a server is broken, and note what they were answered.

In: an address, a Traffic (how many clients, which sizes, which recipients), a ledger. Out: a line of the ledger for
each message whose envelope was begun; "acked" only behind the 250 that was read. Each client is a thread with a
blocking socket: it sends in pipelined groups, half of them by DATA and half by BDAT, over one connection until that
breaks, then over the next. An id whose outcome is unknown is never sent again.
Not here: the pace of a benchmark (generator). On failure: what a client did not expect ends the load with its error.
"""

from __future__ import annotations

import itertools
import random
import re
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Self

from .ledger import DOMAIN, Ledger, any_size, digest, make_body, outcome_of
from .messages import stuff

TIMEOUT = 60.0
PAUSE = 0.03  # seconds between two groups of a client, on average: so that kills fall on an idle server too
_REPLY_END = re.compile(rb"^[0-9]{3}(?: [^\r\n]*)?\r\n", re.MULTILINE)


class GoneError(Exception):
    """The connection has ended: what became of the message is unknown."""


class Connection:
    """A session that says exactly what it is told, and reads whole replies."""

    def __init__(self, port: int, timeout: float = TIMEOUT) -> None:
        try:
            self._socket = socket.create_connection(("127.0.0.1", port), timeout)
        except OSError as error:
            raise GoneError(str(error)) from None
        self._unread = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def send(self, octets: bytes) -> None:
        try:
            self._socket.sendall(octets)
        except OSError as error:
            raise GoneError(str(error)) from None

    def reply(self) -> bytes:
        """The next one, whole: its last line."""
        while (match := _REPLY_END.search(self._unread)) is None:
            try:
                octets = self._socket.recv(65536)
            except OSError as error:
                raise GoneError(str(error)) from None
            if not octets:
                raise GoneError("end of connection")
            self._unread += octets
        self._unread = self._unread[match.end() :]
        return match[0]

    def code(self) -> int:
        """Of the next reply."""
        return int(self.reply()[:3])

    def hello(self) -> None:
        """Reads the greeting and says who we are. Raises GoneError where it is not welcome."""
        if self.code() != 220:
            raise GoneError("no greeting")
        self.send(b"EHLO client.test\r\n")
        self.code()

    def codes(self, n: int) -> list[int]:
        return [self.code() for _ in range(n)]


@dataclass
class Letter:
    """A message on its way, and what it was answered: `code` 0 while nothing was read. `refused` are recipients."""

    id: str
    body: bytes
    recipients: tuple[str, ...]
    code: int = 0
    refused: tuple[str, ...] = ()
    kept_as: str = ""  # the server's id of it
    sha256: str = field(init=False)
    sender: str = field(init=False)

    def __post_init__(self) -> None:
        self.sha256 = digest(self.body)
        self.sender = f"{self.id}@{DOMAIN}"

    @property
    def envelope(self) -> bytes:
        lines = [f"MAIL FROM:<{self.sender}>", *(f"RCPT TO:<{recipient}>" for recipient in self.recipients)]
        return "".join(f"{line}\r\n" for line in lines).encode()

    @property
    def answers(self) -> int:
        """To the envelope."""
        return 1 + len(self.recipients)

    def note(self, codes: Sequence[int]) -> None:
        """The answers to the envelope, of which those to its recipients stay in mind."""
        pairs = zip(self.recipients, codes[1:], strict=False)
        self.refused = tuple(recipient for recipient, code in pairs if code >= 400)

    def note_end(self, reply: bytes) -> None:
        """The answer to the message itself, which ends with the id."""
        self.code = int(reply[:3])
        self.kept_as = reply.split()[-1].decode("ascii", "replace") if self.code == 250 else ""


def send_data(connection: Connection, group: Sequence[Letter]) -> None:
    """Each end of data with the next envelope behind it. Raises GoneError."""
    connection.send(group[0].envelope + b"DATA\r\n")
    for letter, following in zip(group, [*group[1:], None], strict=True):
        codes = connection.codes(letter.answers + 1)
        letter.note(codes)
        if codes[-1] != 354:
            letter.code = codes[-1]
            return
        connection.send(stuff(letter.body) + (following.envelope + b"DATA\r\n" if following else b""))
        letter.note_end(connection.reply())


def send_bdat(connection: Connection, group: Sequence[Letter], chance: random.Random) -> None:
    """All in one write, every message in two chunks. Raises GoneError."""
    out = b""
    for letter in group:
        half = chance.randrange(len(letter.body) + 1)
        first, last = letter.body[:half], letter.body[half:]
        out += b"%sBDAT %d\r\n%sBDAT %d LAST\r\n%s" % (letter.envelope, len(first), first, len(last), last)
    connection.send(out)
    for letter in group:
        letter.note(connection.codes(letter.answers + 1))
        letter.note_end(connection.reply())


@dataclass(frozen=True)
class Traffic:
    """What is sent. `recipients` are drawn from; a message has one to four of them."""

    recipients: tuple[str, ...]
    size: Callable[[random.Random], int] = any_size
    clients: int = 4
    pause: float = PAUSE


class Load:
    """Clients that run from `start` to `stop`; ids begin with `prefix`."""

    def __init__(self, port: int, traffic: Traffic, ledger: Ledger, prefix: str, seed: int) -> None:
        self._done = threading.Event()
        self._numbers = itertools.count(1)
        self._prefix = prefix
        self._port = port
        self._traffic = traffic
        self._ledger = ledger
        self._errors: list[Exception] = []
        self.acked = threading.Event()  # at least one message was
        self._threads = [
            threading.Thread(target=self._run, args=(random.Random(f"{seed} {number}"),), name=f"client-{number}")
            for number in range(traffic.clients)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def sleep(self, seconds: float) -> None:
        """Raises what a client did not expect."""
        time.sleep(seconds)
        for error in self._errors:
            raise error

    def stop(self) -> None:
        """Waits for what is under way; raises what a client did not expect."""
        self._done.set()
        for thread in self._threads:
            thread.join()
        for error in self._errors:
            raise error

    def _run(self, chance: random.Random) -> None:
        try:
            while not self._done.is_set():
                try:
                    self._session(chance)
                except GoneError:
                    self._done.wait(0.01)
        except Exception as error:
            self._errors.append(error)

    def _session(self, chance: random.Random) -> None:
        with Connection(self._port) as connection:
            connection.hello()
            while not self._done.is_set() and chance.random() < 0.95:
                self._send_group(connection, chance)
                self._done.wait(chance.uniform(0, 2 * self._traffic.pause))

    def _send_group(self, connection: Connection, chance: random.Random) -> None:
        group = [self._letter(chance) for _ in range(chance.choice((1, 1, 2, 5)))]
        try:
            if chance.random() < 0.5:
                send_data(connection, group)
            else:
                send_bdat(connection, group, chance)
        finally:
            for letter in group:
                self._ledger.write(letter, outcome_of(letter.code), letter.code, letter.refused)
                if letter.code == 250:
                    self.acked.set()

    def _letter(self, chance: random.Random) -> Letter:
        name = f"{self._prefix}m{next(self._numbers):06d}"
        body = make_body(name, self._traffic.size(chance), chance)
        return Letter(name, body, tuple(chance.sample(self._traffic.recipients, chance.choice((1, 1, 1, 2, 4)))))
